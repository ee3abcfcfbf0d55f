"""When a job has had too many failures."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from twostage.base.checks import positive_int
from twostage.base.records import failure_of
from twostage.base.words import brief
from twostage.errors import TooManyFailures

if TYPE_CHECKING:
    from twostage.base.options import JobOptions
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

    @classmethod
    def of(cls, options: JobOptions, *, many: bool) -> FailureLimit | None:
        """Returns what `max_failures` asks for.

        Raises:
            TypeError: It is no number, or failures are not wanted at all.
            ValueError: It is below 1, and no share.
        """
        most: object = options.max_failures
        if most is None:
            return None
        if not options.return_exceptions:
            raise TypeError(
                "max_failures is given without return_exceptions=True, so that the first failure ends the job"
            )
        if not isinstance(most, float):
            return cls(positive_int(most, "max_failures"), many=many)
        if not 0 < most < 1:
            raise ValueError(
                f"max_failures is {most}; expected a number of failures, or a share between 0 and 1"
            )
        return cls(most, many=many)

    def attach(self, job: Coordinator) -> None:
        """Has the job end when it is passed."""

        def done(outcome: AnyOutcome) -> None:
            if (error := self.passed(outcome)) is not None:
                job.end(error)

        job.hears.done.append(done)

    def passed(self, outcome: AnyOutcome) -> TooManyFailures | None:
        """Hears of an outcome; returns what ends the job if it is one failure too many."""
        failure = failure_of(outcome, many=self._many)
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
