"""What becomes of each request to the embedded API, whatever it asks for: the faults of whole requests.

Those of `EACH` are functions of the seed, of what a request asks for, and of how often that was asked: in
which order requests come changes nothing. `errors` are drawn in that order, `bursts` befall requests by their
count, and an `outage` befalls all that are to be answered while it lasts.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from email.utils import formatdate
from http import HTTPStatus
from itertools import cycle
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from twostage.demo.answers import Faults

__all__ = ["BURST", "DROPPED", "LOSSES", "OUTAGE", "Fate", "Fates"]

Headers: TypeAlias = tuple[tuple[str, str], ...]

DROPPED: Final = 0  # beside the statuses: the connection ends without an answer
ERRORS: Final = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, DROPPED)
DOWN: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT, DROPPED)

EACH: Final = ("throttled", "hangs", "resets", "truncated", "spikes")
"""The faults that befall one request by itself; the first that does is its own."""

LOSSES: Final = frozenset({"hangs", "resets", "truncated"})
"""Those of them by which the answer is lost, although the call was carried out."""

SPIKE: Final = 20  # times the latency, but no more than
LONGEST_SPIKE: Final = 0.3
BURST: Final = 5  # requests in a row
OUTAGE: Final = 5.0  # seconds, of which an outage takes its share


class Fate(NamedTuple):
    """What becomes of a request.

    Attributes:
        fault: What befalls it, by its name in `FAULTS`; empty if nothing does.
        latency: How many seconds it takes.
        status: What it is answered by instead of being carried out, or `DROPPED`; 200 if it is carried out.
        headers: What such an answer says besides.
    """

    fault: str
    latency: float
    status: int = HTTPStatus.OK
    headers: Headers = ()


class Fates:
    """Tells each request's fate. It has no lock: who asks it sees to that.

    Args:
        faults: What goes wrong.
        latencies: How many seconds a request takes at most, by its kind.
        outage_after: How many requests come before the outage begins.
        seed: Of the latencies and `errors`.
    """

    def __init__(
        self, faults: Faults, latencies: Mapping[str, float], outage_after: int, *, seed: int
    ) -> None:
        self._faults = faults
        self._latencies = latencies
        self._outage_after = outage_after
        self._random = random.Random(seed)
        self._requests = 0
        self._turns: Counter[str] = Counter()
        self._retry_afters = _retry_afters()
        self._down = cycle(DOWN)
        self._up_again = 0.0  # when, on the clock of `monotonic`

    def next(self, kind: str, request: str) -> Fate:
        """Returns the fate of a request that has come, for the time when it is to be answered.

        Args:
            kind: Of which latency it is.
            request: What it asks for.
        """
        latency = self._random.uniform(0, self._latencies[kind])
        befallen = self._random.random() < self._faults.shares.get("errors", 0.0)
        error = self._random.choice(ERRORS) if befallen else None
        number = self._requests
        self._requests += 1
        self._turns[request] += 1
        if number == self._outage_after:
            self._up_again = monotonic() + OUTAGE * self._faults.shares.get("outage", 0.0)
        if self._faults.hits("bursts", number // BURST):
            headers = (("Retry-After", "0"),) if number % 2 else ()
            return Fate("bursts", latency, HTTPStatus.SERVICE_UNAVAILABLE, headers)
        if error is not None:
            return Fate("errors", latency, error)
        turn = self._turns[request]
        fault = next((name for name in EACH if self._faults.hits(name, request, turn)), "")
        if fault == "throttled":
            return Fate(fault, latency, HTTPStatus.TOO_MANY_REQUESTS, next(self._retry_afters))
        if fault == "spikes":
            latency = max(latency, min(SPIKE * latency, LONGEST_SPIKE))
        return Fate(fault, latency)

    def in_outage(self) -> Fate | None:
        """Returns what becomes of a request that is to be answered at this moment, if the API is down."""
        return Fate("outage", 0, next(self._down)) if monotonic() < self._up_again else None


def _retry_afters() -> Iterator[Headers]:
    """Yields each form in which APIs say how long to wait, over and over."""
    while True:
        yield (("Retry-After", "0"),)
        now = time.time()  # in HTTP's dates a whole number of seconds, and so are their differences
        yield (("Date", formatdate(now, usegmt=True)), ("Retry-After", formatdate(now + 1, usegmt=True)))
        yield (("retry-after-ms", "50"),)
        yield (("Retry-After", "soon"),)  # of no form that there is
