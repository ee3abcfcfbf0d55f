"""Items of many tokens: what stage one gives is a list of them, and each is a call of stage two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from twostage.answers.answers import token_list
from twostage.base.records import ListedToken, TokenList

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twostage.base.records import Batch
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome

__all__ = ["Many", "drop"]


class Many:
    """Makes calls of lists of tokens, for a job."""

    def __init__(self, job: Coordinator) -> None:
        self._job = job
        job.spread = self._spread

    def _spread(self, batch: Batch, outcomes: Sequence[AnyOutcome]) -> list[ListedToken]:
        """Returns a call for each token of items that have a list of them; one that has none is done."""
        having = self._checked(batch, outcomes)
        self._job.hears.tell_tokens(having)
        return self._calls(having)

    def _checked(self, batch: Batch, outcomes: Sequence[AnyOutcome]) -> list[AnyOutcome]:
        """Returns those that have a list of tokens; what is none is its item's failure."""
        having: list[AnyOutcome] = []
        for outcome in outcomes:
            try:
                outcome.token = token_list(outcome.token)
                having.append(outcome)
            except Exception as error:  # noqa: BLE001 - a collection of the user's may raise anything
                outcome.token = None
                if not self._job.ending:
                    self._job.fail(self._job.lines[0], batch, [outcome], error.with_traceback(None))
        return having

    def _calls(self, outcomes: Sequence[AnyOutcome]) -> list[ListedToken]:
        calls: list[ListedToken] = []
        for outcome in outcomes:
            tokens = cast("list[Any]", outcome.token)
            if not tokens:
                self._job.settle(outcome.answer([]))
                continue
            self._job.enter(len(tokens) - 1)
            self._job.handing.add_surplus(outcome.index, len(tokens) - 1)
            listed = TokenList(outcome, len(tokens))
            calls += [ListedToken(listed, place, token) for place, token in enumerate(tokens)]
        return calls


def drop(job: Coordinator, tokens: TokenList) -> None:
    """Forgets an item's tokens, as it begins again; those that run or wait for a due time end unheard."""
    tokens.dropped = True
    job.enter(-job.lines[1].forget_dropped())
    job.handing.forget_surplus(tokens.outcome.index)
