"""When a stage's API is down, and when the next call may look whether it still is."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twostage.base.records import Call

__all__ = ["Outage"]

LEAST_LOST = 8  # different calls: fewer failures in a row are no outage, however few workers there are
LONG = 10.0  # seconds without a success, after which that many are enough
DOUBLINGS = 3  # of the time between probes: 1, 2, 4 and then 8 s
PROBE_LEAD = 0.1  # of another call over the one that was the last probe: that one may be what always fails


class Outage:
    """Whether the API is down: many different calls in a row were not answered, though one was before.

    One call that always fails says nothing, nor does an API that has never answered. While it is down, one
    call at a time probes it: at once, then after 1, 2, 4, 8, 8 ... s, less up to a half of that.

    Attributes:
        since: Since when the API is down; `None` if it is up.
        lost: The calls that were not answered since the last success.
        next_probe: When a call may look whether the API is still down; infinite while one does.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.lost: set[Call] = set()
        self._lost_since = math.inf  # when the first of them ended
        self._probe: Call | None = None
        self._probed: Call | None = None  # the last one that failed
        self._probes = 0
        self.next_probe = math.inf

    def lose(self, call: Call, now: float, limit: float, *, suspected: bool) -> bool:
        """Hears of a call that was not answered; returns whether that makes the API count as down.

        Args:
            call: It.
            now: The time.
            limit: How many attempts may run: as many different calls have to be lost.
            suspected: Whether one is enough.
        """
        self.lost.add(call)
        self._lost_since = min(self._lost_since, now)
        if now - self._lost_since >= LONG:
            limit = 0  # a rate lets so few begin that there may never be as many
        if len(self.lost) < max(limit, LEAST_LOST) and not suspected:
            return False
        self.since = self.next_probe = now
        self._probes = 0
        return True

    def end(self) -> None:
        """Begins anew: the API has answered, or is not waited for."""
        self.lost.clear()
        self._lost_since = math.inf
        self.since = self._probe = self._probed = None

    def began_probe(self, call: Call) -> None:
        """Hears that `call` does."""
        self._probe = call
        self._probes += 1
        self.next_probe = math.inf

    def took_back(self, call: Call) -> None:
        """Hears that a call did not begin."""
        if call is self._probe:
            self._probe = None
            self.next_probe = -math.inf

    def ended(self, call: Call, now: float) -> None:
        """Hears that an attempt of `call` has ended."""
        if call is self._probe:
            self._probe, self._probed = None, call
            wait = 2.0 ** min(self._probes - 1, DOUBLINGS)
            self.next_probe = now + wait * random.uniform(0.5, 1)  # noqa: S311 - no secret

    def put_off(self, call: Call, due: float) -> float:
        """Returns when a call that is due at `due` may wait in line: a probe not before the next one."""
        return max(due, self.next_probe + PROBE_LEAD) if call is self._probed else due
