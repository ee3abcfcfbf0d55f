"""List scheduling in first-come order, with no overhead and no bound: what the coordinator is held against.

R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17 (1969): whenever a worker
is free, it takes the first call of its stage's line. Calls whose retry has come due go before all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple, TypeAlias

__all__ = ["Attempt", "bound", "makespan"]


class Attempt(NamedTuple):
    """What one attempt takes, in seconds, and whether it fails."""

    seconds: float
    fails: bool


Draw: TypeAlias = Callable[[int, int, int], Attempt]
"""Takes the stage, the call's first item and the attempt's number, from 1."""


def makespan(items: int, batch_size: int, workers: tuple[int, int], delay: float, draw: Draw) -> float:
    """Returns when the last call ends, if each failed attempt is tried again after `delay` seconds."""
    lines = (deque((first, 1) for first in range(0, items, batch_size)), deque[tuple[int, int]]())
    free = list(workers)
    tie = count()
    # Ends of attempts, and retries that come due: (when, tie, stage, first item, attempt, whether it has run)
    events: list[tuple[float, int, int, int, int, bool]] = []
    now = 0.0
    while True:
        for stage in (0, 1):
            while free[stage] and lines[stage]:
                first, attempt = lines[stage].popleft()
                free[stage] -= 1
                heappush(
                    events, (now + draw(stage, first, attempt)[0], next(tie), stage, first, attempt, True)
                )
        if not events:
            return now
        now = events[0][0]
        due = [deque[tuple[int, int]](), deque[tuple[int, int]]()]
        while events and events[0][0] == now:
            _, _, stage, first, attempt, has_run = heappop(events)
            if not has_run:
                due[stage].append((first, attempt))
                continue
            free[stage] += 1
            if draw(stage, first, attempt).fails:
                heappush(events, (now + delay, next(tie), stage, first, attempt + 1, False))
            elif stage == 0:
                lines[1].extend((item, 1) for item in range(first, min(first + batch_size, items)))
        for stage in (0, 1):
            lines[stage].extendleft(reversed(due[stage]))


def bound(items: int, batch_size: int, workers: tuple[int, int], delay: float, draw: Draw) -> float:
    """Returns a time that no schedule can beat: a stage's work on all its workers, or its longest call."""
    work, longest = [0.0, 0.0], [0.0, 0.0]
    for stage, step in ((0, batch_size), (1, 1)):
        for first in range(0, items, step):
            chain, attempt = 0.0, 1
            while True:
                seconds, fails = draw(stage, first, attempt)
                work[stage] += seconds
                chain += seconds
                if not fails:
                    break
                chain += delay
                attempt += 1
            longest[stage] = max(longest[stage], chain)
    return max(*(done / number for done, number in zip(work, workers, strict=True)), *longest)
