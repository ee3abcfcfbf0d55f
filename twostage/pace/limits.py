"""How many attempts of a stage may run at once, if that is fewer than its workers, and how it changes."""

from __future__ import annotations

import math

__all__ = ["Limit"]

FIRST = 8  # of an adaptive limit


class Limit:
    """The most attempts at once: fixed, or *adaptive*, which is found out by what the API refuses.

    After a pause or an outage it begins at half and doubles for each limit-full of successes.

    An adaptive limit comes down to what was running when the API refused a call, for that is what it
    takes, though to no less than half in a round trip, or in a limit-full of refusals. It grows by 1 after
    two limit-fulls of successes, then by 2, 4, 8 after one: so it starts fast, follows an API that takes
    more, and exceeds by 1 one that does not. (Additive increase, multiplicative decrease, as TCP has it,
    needs a hundred round trips for what takes 7 here, and does not know what the API takes.)

    Args:
        workers: The most that it can be.
        adaptive: Whether it is found out.

    Attributes:
        most: How many attempts may run at once when it is not climbing.
        full: To be set when it has held a call back: if it did not, it need not grow.
        round_trip: To be set to how long the last success took.
    """

    def __init__(self, workers: int, *, adaptive: bool) -> None:
        self.full = False
        self.round_trip = math.inf
        self._workers = workers
        self._adaptive = adaptive
        self.most: float = min(workers, FIRST) if adaptive else workers
        self._ramp = math.inf  # on the way up to it
        self._successes = 0  # since it was last changed
        self._step = 1.0
        self._least = self.most / 2  # that it may come down to for now
        self._least_since = 0.0
        self._refused = 0  # since then

    @property
    def at_once(self) -> int:
        """How many attempts may run at once."""
        return max(1, int(min(self.most, self._ramp)))

    @property
    def slows(self) -> bool:
        """Whether it is, or may be, less than the stage's workers."""
        return self._adaptive or self._ramp < self.most

    def begin_at_half(self) -> None:
        """Begins to climb anew."""
        self._ramp = self.most / 2
        self._successes = 0

    def succeeded(self) -> bool:
        """Hears of a success; returns whether that was one for each attempt at once: a round trip or more."""
        self._successes += 1
        if self._successes < self.at_once:
            return False
        self._successes = 0
        if self._ramp < self.most:
            self._ramp *= 2
        if self._ramp >= self.most:
            self._ramp = math.inf
            if self._adaptive and self.full:
                self.most = min(self.most + self._step, self._workers)
                self._step *= 2
        self.full = False
        return True

    def refused(self, running: float, now: float) -> None:
        """Comes down, if adaptive, as the API takes no more than what was running when it refused a call."""
        if not self._adaptive:
            return
        self._refused += 1
        if now >= self._least_since + self.round_trip or self._refused > self.most:
            self._least = self.most / 2
            self._least_since = now
            self._refused = 0
        self.most = max(1.0, self._least, min(self.most - 1, running))
        self._step = 1.0
        self._successes = -self.at_once  # a limit-full is let by before the next attempt to grow
