"""What a gate is: what may hold a stage's starts back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twostage.base.records import Call
    from twostage.base.runner import Runner

__all__ = ["Gate", "Refused"]


class Refused(Exception):  # noqa: N818 - it is no failure of ours
    """A call may never start."""


class Gate:
    """Answers one question of a stage, and hears what it needs for that.

    All is called in the coordinator's thread, so none may wait; the waiting is the coordinator's business.
    """

    def when_may_start(self, now: float, runner: Runner, call: Call | None = None) -> float:
        """Returns the earliest time at which `call`, or else any, may start; `now` or less: at once.

        Infinite: not before an attempt ends.

        Raises:
            Refused: `call` may never start; the `__cause__` is its failure.
        """
        raise NotImplementedError

    def check_patience(self, now: float, runner: Runner) -> None:
        """Raises if calls have waited here for so long that the job is to end."""

    def started(self, call: Call, now: float) -> None:
        """Hears that `call` was handed over."""

    def taken_back(self, call: Call) -> None:
        """Hears that it was taken back before it began."""

    def ended(self, call: Call, answer: object, error: BaseException | None, now: float) -> None:
        """Hears that an attempt of it has ended."""
