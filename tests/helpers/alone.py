"""A runner alone, without a job: the test is its coordinator."""

from __future__ import annotations

from collections import deque
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from common import PATIENCE

from twostage import Outcome
from twostage.base.as_completed import AsCompleted
from twostage.base.runner import Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.base.as_completed import Event
    from twostage.base.records import Call
    from twostage.base.runner import Clock, Runner


class Alone:
    """A runner with a clock that stands still, unless the test puts it forward.

    Args:
        make: Makes the runner.
        fetch: The function, which is given the call.
    """

    def __init__(
        self,
        make: Callable[[Work, AsCompleted, Clock], Runner],
        fetch: Callable[[Call], object],
        *,
        workers: int,
        attempt_timeout: float | None = None,
    ) -> None:
        self.now = 1000.0
        self.ends: list[tuple[Call, Any, BaseException | None]] = []
        self.completions = AsCompleted()
        self._events: deque[Event] = deque()
        work = Work("stage two", fetch, self._same, self._end, workers, copy_context(), None, attempt_timeout)
        self.runner = make(work, self.completions, lambda: self.now)

    def _same(self, call: Call) -> Call:
        return call

    def _end(self, call: Call, answer: object, error: BaseException | None) -> None:
        self.ends.append((call, answer, error))

    def step(self) -> None:
        """Handles what has happened next, after waiting for it."""
        if not self._events:
            self._events.extend(self.completions.take(PATIENCE))
            assert self._events
        handler, subject, answer, error = self._events.popleft()
        handler(subject, answer, error)

    def take(self, number: int) -> None:
        """Handles events until so many ends have come."""
        while len(self.ends) < number:
            self.step()

    def close(self) -> None:
        self.runner.stop()
        while self.runner.out:
            self.step()
        self.runner.join()


def numbered(item: int) -> Call:
    return Outcome(item, item)


def number_of(call: Call) -> int:
    assert isinstance(call, Outcome)
    return call.index
