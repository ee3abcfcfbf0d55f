"""Items whose token is no good any more: they go back to stage one for a new one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from twostage.answers.many import drop
from twostage.answers.splits import halves
from twostage.base.checks import failure_test
from twostage.base.records import Batch, ListedToken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.base.options import JobOptions
    from twostage.base.records import Call, Member
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome
    from twostage.core.lines import Line

__all__ = ["Refreshing"]


class Refreshing:
    """Sends items back, each no more than so often.

    Attributes:
        wants: Whether a failure of stage two means that the token is no good any more.
    """

    def __init__(self, wants: Callable[[Exception], bool], most: int) -> None:
        self.wants = wants
        self._most = most
        self._times: Counter[int] = Counter()  # by the item's index

    @classmethod
    def of(cls, options: JobOptions) -> Refreshing | None:
        """Returns what `refresh_token_on` asks for."""
        if options.refresh_token_on is None:
            return None
        return cls(failure_test(options.refresh_token_on, "refresh_token_on"), options.max_refreshes)

    def attach(self, job: Coordinator) -> None:
        """Is of that job."""
        self._job = job
        job.send_back = self.send_back
        job.hears.done.append(self._done)

    def _done(self, outcome: AnyOutcome) -> None:
        if self._times:
            self._times.pop(outcome.index, None)

    def send_back(self, line: Line, call: Call, members: Sequence[Any], error: Exception) -> None:
        """Sends members of a call back, unless they were so too often: then `error` is theirs."""
        others = [member for member in members if not self._goes_back(member)]
        if line.refusals is not None:
            line.refusals.tainted = True
        if len(members) > 1 and line.refusals is not None:
            line.due += [Batch(half) for half in halves(others)]  # some of them may be innocent
        elif others:
            self._job.fail(line, call, others, error)

    def _goes_back(self, member: Member) -> bool:
        if member.dropped:
            self._job.enter(-1)
            return True
        outcome = member.outcome
        if self._times[outcome.index] >= self._most:
            return False
        self._times[outcome.index] += 1
        if isinstance(member, ListedToken):
            drop(self._job, member.tokens)
        outcome.token = None
        outcome.attempts = 0
        outcome.retry_state = None
        self._job.lines[0].back.append(outcome)
        return True
