"""Makespans under virtual time against those of list scheduling on the same draws, over a grid of jobs.

`python tests/scheduling/grid.py` runs a fixed sample of 200 cells, with `--full` all of them.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from statistics import NormalDist, median
from typing import TYPE_CHECKING, NamedTuple

import reference
from tenacity import Retrying, wait_fixed

from twostage import Stage, iter_two_stage, run_two_stage
from twostage.testing import VirtualTime, sleep
from twostage.testing import virtual as testing

if TYPE_CHECKING:
    from collections.abc import Callable

DELAY = 1.0
MEAN = 0.1  # seconds of a stage-two call; stage one's follow from the bottleneck
SAMPLE = 200
MEDIAN_BAR, WORST_BAR = 1.02, 1.10

standard = NormalDist()
LATENCIES: dict[str, Callable[[float], float]] = {  # of mean 1, from a uniform draw
    "constant": lambda _: 1.0,
    "uniform": lambda u: 2 * u,
    "lognormal": lambda u: math.exp(standard.inv_cdf(u or 1e-12) - 0.5),
    "stalls": lambda u: (20.0 if u < 0.01 else 1.0) / 1.19,
}


class Cell(NamedTuple):
    """One job of the grid."""

    items: int
    batch_size: int
    workers: tuple[int, int]
    latency: str
    fail: float
    slower: str  # which stage is the bottleneck
    form: str


GRID = [
    Cell(*values)
    for values in product(
        (100, 1_000, 10_000, 100_000),
        (1, 10, 100, 500),
        ((1, 1), (1, 32), (4, 32), (10, 10), (32, 4), (4, 1000), (1000, 1000)),
        LATENCIES,
        (0.0, 0.05, 0.20),
        ("one", "two", "neither"),
        ("list", "stream", "ordered"),
    )
]


class Found(NamedTuple):
    """What came of a cell."""

    cell: Cell
    ratio: float  # to list scheduling
    to_bound: float  # to the time below which no schedule can come


class ApiError(Exception):
    """A failure that passes."""


class Draws:
    """The same latency and failure for the same attempt, in whatever order the attempts are made."""

    def __init__(self, cell: Cell, seed: int) -> None:
        tokens_a_result = cell.workers[0] * cell.batch_size / cell.workers[1]
        slower = {"one": 3.0, "two": 1 / 3, "neither": 1.0}[cell.slower]
        self.means = (MEAN * tokens_a_result * slower, MEAN)
        self.shape = LATENCIES[cell.latency]
        self.fail = cell.fail
        self.seed = seed

    def __call__(self, stage: int, first: int, attempt: int) -> reference.Attempt:
        drawn = random.Random(hash((self.seed, stage, first, attempt)))
        return reference.Attempt(self.means[stage] * self.shape(drawn.random()), drawn.random() < self.fail)


def makespan(cell: Cell, draws: Draws) -> float:
    """Returns the virtual time that the job takes with the production coordinator."""

    def fetch(stage: int, first: int) -> None:
        attempts[stage, first] += 1
        seconds, fails = draws(stage, first, attempts[stage, first])
        sleep(seconds)
        if fails:
            raise ApiError

    def fetch_tokens(items: list[int]) -> list[int]:
        fetch(0, items[0])
        return items

    def fetch_result(token: int) -> int:
        fetch(1, token)
        return token

    attempts: Counter[tuple[int, int]] = Counter()
    retry = Retrying(stop=lambda _: False, wait=wait_fixed(DELAY))
    first: Stage[int, int] = Stage(
        fetch_tokens, batch_size=cell.batch_size, workers=cell.workers[0], retry=retry
    )
    second = Stage(fetch_result, workers=cell.workers[1], retry=retry)
    with VirtualTime() as virtual:
        if cell.form == "list":
            assert run_two_stage(range(cell.items), first, second) == list(range(cell.items))
        else:
            with iter_two_stage(range(cell.items), first, second, ordered=cell.form == "ordered") as outcomes:
                assert sum(1 for _ in outcomes) == cell.items
        return virtual.now


def conserves_work(driver: testing._VirtualDriver) -> bool:
    """Whether no worker idles while a call waits that may start."""
    coordinator = driver._coordinator
    if coordinator is None or coordinator.ending:
        return True
    lines = coordinator.lines
    least = 1 if coordinator.reading.ended else coordinator.reading.size
    fits = len(lines[0].waiting) >= least and coordinator.in_progress < coordinator.bound
    return not any(
        runner.idle
        and (runner._first or runner._queue or line.due or (fits if line is lines[0] else line.waiting))
        for runner, line in zip(driver._runners, lines, strict=True)
    )


def prepare() -> None:
    """Has every run of this process stop where work is not conserved, and log nothing."""
    logging.getLogger("twostage").setLevel(logging.ERROR)
    handle = testing._VirtualDriver.handle

    def checked(self: testing._VirtualDriver, now: float) -> None:
        handle(self, now)
        assert conserves_work(self), "a worker idles while a call waits"

    testing._VirtualDriver.handle = checked  # type: ignore[method-assign]


def measure(cell: Cell) -> Found:
    """Runs one cell."""
    draws = Draws(cell, seed=1)
    job = (cell.items, cell.batch_size, cell.workers, DELAY, draws)
    seconds = makespan(cell, draws)
    return Found(cell, seconds / reference.makespan(*job), seconds / reference.bound(*job))


def main() -> int:
    """Returns 1 if a bar is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"all {len(GRID):,} cells: hours")
    parser.add_argument("--cells", type=int, default=SAMPLE, help="size of the sample (default: %(default)s)")
    arguments = parser.parse_args()
    cells = GRID if arguments.full else random.Random(1).sample(GRID, arguments.cells)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), prepare) as pool:
        found = list(pool.map(measure, cells, chunksize=4))
    print("makespans, as multiples of list scheduling's")
    missed = False
    for form in ("list", "stream", "ordered"):
        ratios = [one.ratio for one in found if one.cell.form == form]
        print(f"{form:8} {len(ratios):5} cells: median {median(ratios):.3f}, worst {max(ratios):.3f}")
        missed |= form != "ordered" and max(ratios) > WORST_BAR
    overall = median(one.ratio for one in found)
    print(
        f"all: median {overall:.3f}; {median(one.to_bound for one in found):.3f} of the bound of any schedule"
    )
    for one in sorted(found, key=lambda one: -one.ratio):
        if one.ratio > 1.05:
            print(f"{one.ratio:.3f} {one.cell}")
    return int(missed or overall > MEDIAN_BAR)


if __name__ == "__main__":
    sys.exit(main())
