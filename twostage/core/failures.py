"""When a job has had too many failures."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from twostage.base.words import brief
from twostage.errors import TooManyFailures

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome

__all__ = ["FailureLimit"]

RECENT = 100
LEAST_RECENT = 20
"""A share of failures is that among the last outcomes: of so many at most, and not before so many."""


class FailureLimit:
    """Says when a job has had too many failures; an item with a failed token is one.

    Args:
        most: How many failures are not too many; below 1 a share of the last `RECENT` outcomes.
        many: Whether items have lists of results, failures among them.
    """

    def __init__(self, most: float, *, many: bool) -> None:
        self._most = most
        self._many = many
        self._failures = 0
        self._last: tuple[Exception, object] | None = None  # and its item
        self._recent: deque[bool] | None = deque(maxlen=RECENT) if most < 1 else None

    def ends(self, job: Coordinator) -> Callable[[AnyOutcome], None]:
        """Returns what hears of outcomes and ends a job."""

        def done(outcome: AnyOutcome) -> None:
            if (error := self.passed(outcome)) is not None:
                job.end(error)

        return done

    def passed(self, outcome: AnyOutcome) -> TooManyFailures | None:
        """Hears of an outcome; returns what ends the job if it is one failure too many."""
        failure = self._failure(outcome)
        self._failures += failure is not None
        if failure is not None:
            self._last = failure, outcome.item
        most, of_these = self._most, ""
        if self._recent is not None:
            if len(self._recent) == RECENT:
                self._failures -= self._recent[0]
            self._recent.append(failure is not None)
            looked_at = len(self._recent)
            most = most * looked_at if looked_at >= LEAST_RECENT else looked_at
            of_these = f" of the last {looked_at}"
        if self._last is None or self._failures <= most:
            return None
        last, item = self._last
        error = TooManyFailures(
            f"{self._failures} items failed{of_these}, more than max_failures={self._most:g} allows; "
            f"the last one is {brief(item)}"
        )
        error.__cause__ = last
        return error

    def _failure(self, outcome: AnyOutcome) -> Exception | None:
        if outcome.exception is not None or not self._many:
            return outcome.exception
        return next((one for one in outcome.result if isinstance(one, Exception)), None)
