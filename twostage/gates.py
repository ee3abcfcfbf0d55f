"""What may hold a stage's starts back: a rate, a pause, an adaptive limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from twostage.calls import Call

__all__ = ["Gate"]


class Gate(Protocol):
    """Answers one question of a stage, and hears what it needs for that.

    All three are called in the coordinator's thread, so none may wait; the waiting is the
    coordinator's business.
    """

    def when_may_start(self, now: float) -> float:
        """Returns the earliest time at which the stage's next attempt may start; `now` or less: at once."""

    def started(self, call: Call, now: float) -> None:
        """Hears that `call` was handed over."""

    def ended(self, call: Call, now: float) -> None:
        """Hears that an attempt of `call` has ended."""
