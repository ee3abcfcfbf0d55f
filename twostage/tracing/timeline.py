"""What a trace's attempts were like over time: who ran them, how many ran, how many tokens waited."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from twostage.observing.record import Attempts

__all__ = ["Steps", "area", "calls_running", "covered", "lanes", "sums", "tokens_waiting"]

Steps = list[tuple[float, int]]
"""From when on there were how many, in order."""


def lanes(attempts: Attempts) -> list[int]:
    """Returns for each attempt a lane, from 0, of as few as there have to be: it stands for a worker."""
    lane_of = [0] * len(attempts.began)
    busy: list[tuple[float, int]] = []  # a heap: till when which lane is
    free: list[int] = []  # a heap, so that the first lanes are the fullest
    for one in sorted(range(len(lane_of)), key=attempts.began.__getitem__):
        while busy and busy[0][0] <= attempts.began[one]:
            heappush(free, heappop(busy)[1])
        lane_of[one] = heappop(free) if free else len(busy)
        heappush(busy, (attempts.ended[one], lane_of[one]))
    return lane_of


def calls_running(attempts: Attempts) -> Steps:
    """Returns how many attempts of a stage ran."""
    return sums([*((began, 1) for began in attempts.began), *((ended, -1) for ended in attempts.ended)])


def tokens_waiting(first: Attempts, second: Attempts) -> Steps:
    """Returns how many tokens were there, and their first attempt had not begun."""
    begun = [
        (began, -size)
        for began, size, number in zip(second.began, second.size, second.number, strict=True)
        if number == 1
    ]
    steps = sums([*zip(first.ended, first.answers, strict=True), *begun])
    # Tokens from a journal were there before: as many at least as else would be missing.
    missing = -min((number for _, number in steps), default=0)
    return [(time, number + max(0, missing)) for time, number in steps]


def sums(changes: Iterable[tuple[float, int]]) -> Steps:
    """Returns the sums of changes, one for each time: what ends makes room for what begins with it."""
    by_time: dict[float, int] = {}
    for time, change in changes:
        by_time[time] = by_time.get(time, 0) + change
    times = sorted(by_time)
    return list(zip(times, accumulate(by_time[time] for time in times), strict=True))


def area(steps: Sequence[tuple[float, int]], end: float) -> float:
    """Returns the area under steps, up to a time."""
    ends = [time for time, _ in steps[1:]] + [end]
    return sum(number * max(0.0, until - since) for (since, number), until in zip(steps, ends, strict=True))


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Returns how long at least one of several spans was."""
    covered, end = 0.0, -math.inf
    for since, until in sorted(spans):
        covered += max(0.0, until - max(since, end))
        end = max(end, until)
    return covered
