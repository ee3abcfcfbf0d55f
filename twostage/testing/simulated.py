"""An API that is simulated: its calls take virtual time, and fail as often as is said."""

from __future__ import annotations

import heapq
import math
import random
import threading
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from twostage.testing.virtual import clock, sleep

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ApiError", "Latency", "SimulatedApi"]

ArgumentT = TypeVar("ArgumentT")
AnswerT = TypeVar("AnswerT")

Latency: TypeAlias = "float | tuple[float, float] | Callable[[random.Random], float]"
"""Seconds: always the same, uniform between two, or drawn by a function from the generator it is given."""

TOO_MANY_REQUESTS = 429
SERVICE_UNAVAILABLE = 503


class ApiError(Exception):
    """What a simulated API answers when it fails; transient, as its `status` is.

    Attributes:
        status: 503 for a failure, 429 if more calls than its limit were made at once.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class SimulatedApi(Generic[ArgumentT, AnswerT]):
    """A function with the latency, the failures and the limit of an API.

    It works in virtual time and, for tests of threads, in real time.

    Args:
        answer: Makes the answer to a call; raise here what a bad argument should give.
        latency: How long a call takes, in seconds.
        fail: The share of calls that take their time and then raise an `ApiError` of status 503.
        limit: How many calls may run at once; one more gets an `ApiError` of status 429 at once.
        seed: What latencies and failures are drawn from, in the order in which calls begin.

    Raises:
        ValueError: A setting can't be. (The calls raise `ApiError`.)

    Attributes:
        calls: How many calls were made.
        most_at_once: How many ran at the same time, at most.

    >>> fetch_result = SimulatedApi(str.upper, latency=0.1, fail=0.05, limit=32)
    """

    def __init__(
        self,
        answer: Callable[[ArgumentT], AnswerT],
        *,
        latency: Latency = 0.0,
        fail: float = 0.0,
        limit: float = math.inf,
        seed: int = 0,
    ) -> None:
        if not 0 <= fail <= 1:
            raise ValueError(f"fail is {fail}; expected a share from 0 to 1")
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1")
        if not callable(latency) and min(latency if isinstance(latency, tuple) else (latency,)) < 0:
            raise ValueError(f"latency is {latency}; expected no negative seconds")
        self.calls = 0
        self.most_at_once = 0
        self._answer = answer
        self._latency = latency
        self._fail = fail
        self._limit = limit
        self._random = random.Random(seed)  # noqa: S311 - nothing secret is drawn
        self._ends: list[float] = []  # a heap: when the calls that run will end
        self._last = 0.0
        self._lock = threading.Lock()

    def __call__(self, argument: ArgumentT) -> AnswerT:
        """Answers a call, after its latency."""
        with self._lock:
            now = clock()
            self.calls += 1
            latency, fails = self._draw(), self._random.random() < self._fail
            if now < self._last:
                self._ends.clear()  # of another virtual time
            self._last = now
            while self._ends and self._ends[0] <= now:
                heapq.heappop(self._ends)
            if len(self._ends) >= self._limit:
                raise ApiError(TOO_MANY_REQUESTS)
            heapq.heappush(self._ends, now + latency)
            self.most_at_once = max(self.most_at_once, len(self._ends))
        sleep(latency)
        if fails:
            raise ApiError(SERVICE_UNAVAILABLE)
        return self._answer(argument)

    def _draw(self) -> float:
        if callable(self._latency):
            return self._latency(self._random)
        if isinstance(self._latency, tuple):
            return self._random.uniform(*self._latency)
        return self._latency
