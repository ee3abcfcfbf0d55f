"""What is to be recorded of what a job's calls give: rows for the journal, wherever its file is."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tenacity import RetryError

from twostage.base.kinds import Kind, RemoteError
from twostage.base.records import ListedToken
from twostage.failing.clients import status_of
from twostage.failing.transient import kind_of
from twostage.journal.values import Codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from twostage.base.records import Member
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome
    from twostage.journal.journal import Journal

__all__ = ["Collector", "Rows"]

AnyT = TypeVar("AnyT")

# What says nothing of the item: a policy that has refused its result, such as "not ready"; an executor that
# was shut down.
NO_ANSWER = (RetryError, CancelledError)


class Rows(NamedTuple):
    """What was heard of between two commits, as the values of each kind of statement, in their order."""

    forgotten: list[tuple[str]]
    tokens: list[tuple[Any, ...]]
    results: list[tuple[Any, ...]]
    failures: list[tuple[Any, ...]]


class Collector:
    """Hears of tokens, results and failures, and makes rows of them.

    Args:
        journal: What was said of the journal.
        keys: The items', by their index.
        many: Whether items have lists of tokens.

    Attributes:
        partial: The indices of items of which a part is not recorded as an answer.
    """

    def __init__(self, journal: Journal, keys: Mapping[int, Any], *, many: bool) -> None:
        self.partial: set[int] = set()
        self._journal = journal
        self._keys = keys
        self._many = many
        self._codec = Codec(journal.encode, journal.decode)
        self._left_out: set[Member] = set()
        self._finished: list[int] = []  # the indices of items that are done
        self._rows = Rows([], [], [], [])

    def attach(self, job: Coordinator) -> None:
        """Hears of that job."""
        job.hears.tokens.append(self.lists if self._many else self.tokens)
        job.hears.results.append(lambda members, results: self.results(zip(members, results, strict=True)))
        job.hears.given.append(self.leave_out)
        job.hears.failed.append(
            lambda stage, members, error, may_pass: self.failed(stage, members, error, may_pass=may_pass)
        )
        job.hears.done.append(self.finished)

    def leave_out(self, members: Iterable[Member]) -> None:
        """Hears of what a policy gives in an answer's place, which the API has not given."""
        self._left_out.update(members)

    def _is_left_out(self, member: Member) -> bool:
        if member not in self._left_out:
            return False
        self._left_out.discard(member)
        return True

    def tokens(self, outcomes: Iterable[AnyOutcome]) -> None:
        """Hears of items' tokens.

        Raises:
            Exception: One can't be recorded; the others are.
        """
        if self._journal.tokens:
            _each(self._token, outcomes)

    def _token(self, outcome: AnyOutcome) -> None:
        if not self._is_left_out(outcome):
            written = self._codec.write(outcome.token, "token", outcome.item)
            self._rows.tokens.append((self._keys[outcome.index], 0, None, written, time.time()))

    def lists(self, outcomes: Iterable[AnyOutcome]) -> None:
        """Hears of the tokens of items that may have many; those of an older list count no more.

        Raises:
            Exception: As from `tokens`.
        """
        _each(self._list, outcomes)

    def _list(self, outcome: AnyOutcome) -> None:
        tokens: Sequence[object] = outcome.token or ()
        key, size, now = self._keys[outcome.index], len(tokens), time.time()
        self._rows.forgotten.append((key,))
        if self._is_left_out(outcome):
            self.partial.add(outcome.index)
        elif not tokens:
            self._rows.tokens.append((key, 0, 0, None, now))
        elif self._journal.tokens:
            self._rows.tokens.extend(
                [
                    (key, place, size, self._codec.write(token, "token", outcome.item), now)
                    for place, token in enumerate(tokens)
                ]
            )

    def results(self, results: Iterable[tuple[Member, object]]) -> None:
        """Hears of results of items, or of some of their tokens.

        Raises:
            Exception: As from `tokens`.
        """
        _each(self._result, results)

    def _result(self, answered: tuple[Member, object]) -> None:
        member, result = answered
        key, index, place, size, item = self._place(member)
        if self._is_left_out(member):
            self.partial.add(index)
        elif not (isinstance(member, ListedToken) and member.tokens.dropped):
            self._rows.results.append(
                (key, place, size, self._codec.write(result, "result", item), time.time())
            )

    def failed(self, stage: int, members: Iterable[Member], error: Exception, *, may_pass: bool) -> None:
        """Hears of the failure of items, or of some of their tokens, at a stage.

        Args:
            stage: Which it is, 1 or 2.
            members: They.
            error: Their failure.
            may_pass: Whether it is known to be none that lasts.
        """
        name = error.type_name if isinstance(error, RemoteError) else type(error).__name__
        passing = may_pass or isinstance(error, NO_ANSWER) or kind_of(error) is not Kind.LASTING
        text = _text(error) if self._journal.texts else None
        what = (stage, name, status_of(error), passing, text, time.time())
        for member in members:
            key, index, place, size, _ = self._place(member)
            self.partial.add(index)
            self._rows.failures.append((key, place, size, *what))
            if stage == 1 and self._many:
                self._rows.forgotten.append((key,))  # an older list, which was asked for anew

    def finished(self, outcome: AnyOutcome) -> None:
        """Hears that an item is done."""
        self._finished.append(outcome.index)

    def take_finished(self) -> list[int]:
        """Returns the indices of items that are done since the last time."""
        finished, self._finished = self._finished, []
        return finished

    def is_whole(self, index: int) -> bool:
        """Whether an item that is done is recorded, with all its parts; to be asked once."""
        if index not in self.partial:
            return True
        self.partial.discard(index)
        return False

    def _place(self, member: Member) -> tuple[str, int, int, int | None, object]:
        """Returns the key and index of a member's item, its place there and of how many, and the item."""
        if isinstance(member, ListedToken):
            outcome, size = member.outcome, len(member.tokens.results)
            return self._keys[outcome.index], outcome.index, member.place, size, outcome.item
        return self._keys[member.index], member.index, 0, None, member.item

    def take_rows(self) -> Rows | None:
        """Returns what was heard of since the last time, if anything was."""
        rows, self._rows = self._rows, Rows([], [], [], [])
        return rows if any(rows) else None


def _each(record: Callable[[AnyT], None], heard: Iterable[AnyT]) -> None:
    """Records each of several, and only then raises if one could not be."""
    problem: Exception | None = None
    for one in heard:
        try:
            record(one)
        except Exception as error:  # noqa: BLE001 - the user's `encode` may raise anything
            problem = problem or error
    if problem is not None:
        raise problem


def _text(error: Exception) -> str:
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception as broken:  # noqa: BLE001 - the user's `__str__` may raise anything
        return f"<{type(broken).__name__} in its text>"
