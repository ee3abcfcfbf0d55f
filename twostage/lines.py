"""A stage's line: the calls that wait for a worker, and what decides on their starts."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.calls import Call
    from twostage.gates import Gate
    from twostage.retry import Judge
    from twostage.runners import Runner

__all__ = ["Line"]


class Line:
    """One stage as the coordinator sees it: its calls that wait, and what decides on them.

    Args:
        name: How messages call the stage.
        limit: How many attempts may be handed to the runner; infinite if it keeps a limit of its own
            and gives back what has not begun, so that its workers need never wait for the coordinator.
        check: Takes an answer and the number of items it is for; returns what is to be made of it.
        judge: Decides what becomes of failed attempts.
        gates: What else may hold starts back. What was handed over can't be held, so with gates
            `limit` is the number that may run.
    """

    runner: Runner

    def __init__(
        self,
        name: str,
        limit: float,
        check: Callable[[Any, int], Any],
        judge: Judge,
        gates: Sequence[Gate] = (),
    ) -> None:
        self.name = name
        self.limit = limit
        self.check = check
        self.judge = judge
        self.gates = gates
        self.waiting: deque[Call] = deque()
        self.due: deque[Call] = deque()
        self.has_retried = False

    def opens(self, now: float) -> float:
        """Returns when the next call may start as far as the gates are concerned."""
        return max((gate.when_may_start(now) for gate in self.gates), default=now)

    def room(self, now: float) -> float:
        """Returns how many calls the runner may be given now; under gates it is one at a time."""
        room = self.limit - self.runner.out
        if self.gates and room > 0:
            return 1 if self.opens(now) <= now else 0
        return room

    def start(self, calls: Sequence[Call], now: float, *, first: bool = False) -> None:
        """Hands calls to the runner."""
        for gate in self.gates:
            for call in calls:
                gate.started(call, now)
        self.runner.start(calls, first=first)  # last, when the books are right: it can raise

    def start_due(self, now: float) -> None:
        """Starts calls whose time has come, before all others of the stage."""
        while self.due and self.room(now) > 0:
            self.start([self.due.popleft()], now, first=True)

    def start_waiting(self, now: float) -> None:
        """Starts waiting calls, as many as there is room for."""
        while self.waiting and (room := self.room(now)) > 0:
            if room >= len(self.waiting):
                calls, self.waiting = list(self.waiting), deque()
            else:
                calls = [self.waiting.popleft() for _ in range(int(room))]
            self.start(calls, now)
