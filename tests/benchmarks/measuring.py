"""How every benchmark measures: whole runs in turns, their medians, and a bar for a ratio of two."""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Measurement", "medians"]


class Measurement(NamedTuple):
    """A figure beside its bar; `remark` says what it was made of."""

    what: str
    measured: float
    must_be: Literal["<=", ">="]
    bar: float
    remark: str

    @property
    def met(self) -> bool:
        return self.measured <= self.bar if self.must_be == "<=" else self.measured >= self.bar


def medians(rounds: int, *ways: Callable[[], object]) -> list[float]:
    """Returns the median seconds of each way to do a job, run in turns: noise hits all of them alike.

    What a way returns tells whether the job was done: it has to be the same for all.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        answers = []
        for way, taken in zip(ways, seconds, strict=True):
            gc.collect()  # nobody pays for what another one left
            begin = time.perf_counter()
            answers.append(way())
            taken.append(time.perf_counter() - begin)
        assert all(answer == answers[0] for answer in answers), "the ways did not do the same job"
    return [median(taken) for taken in seconds]
