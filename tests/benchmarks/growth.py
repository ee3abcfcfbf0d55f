"""Time and memory for a thousand to a million items, each run in a process of its own: both straight lines.

Not among the others of run.py, since it takes a minute. `--chart FILE` draws it, with matplotlib.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from statistics import median
from typing import Any, NamedTuple

from twostage import iter_two_stage, run_two_stage

SIZES = (1000, 10_000, 100_000, 1_000_000)
WAYS = {
    f"`{function}`, {'one by one' if batch_size is None else 'in batches'}": (function, batch_size)
    for function, batch_size in product(("run_two_stage", "iter_two_stage"), (None, 100))
}
ROUNDS = 3

# How far off the line from nothing to the last size a time may be: a part of it, and the threads' start.
TIME_FACTOR = 1.5
START = 0.05
# What ten times as many items may take beside ten times as many MB, and all that the stream may grow by.
SLACK = 20.0


class Run(NamedTuple):
    seconds: float
    megabytes: float


def nothing(call: object) -> object:
    return call


def measure(function: str, batch_size: int | None, size: int) -> Run:
    """Makes one job of no-op calls; its seconds, and the most memory that this process ever held."""
    settings: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    begin = time.perf_counter()
    if function == "run_two_stage":
        number = len(run_two_stage(range(size), nothing, nothing, **settings))
    else:
        with iter_two_stage(range(size), nothing, nothing, **settings) as outcomes:
            number = sum(1 for _ in outcomes)
    seconds = time.perf_counter() - begin
    assert number == size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Run(seconds, peak / (1e6 if sys.platform == "darwin" else 1e3))


def measured() -> dict[str, list[Run]]:
    """Returns medians, by way: one for each size."""
    runs: dict[tuple[str, int], list[Run]] = {of: [] for of in product(WAYS, SIZES)}
    for _ in range(ROUNDS):
        for (way, size), done in runs.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                done.append(process.submit(measure, *WAYS[way], size).result())
    medians = {of: Run(*map(median, zip(*done, strict=True))) for of, done in runs.items()}
    return {way: [medians[way, size] for size in SIZES] for way in WAYS}


def bent(way: str, runs: list[Run]) -> list[str]:
    """Returns what is no straight line."""
    line = [runs[-1].seconds * size / SIZES[-1] for size in SIZES]
    least, *_, tenth, whole = (run.megabytes for run in runs)
    found = []
    if any(
        not at / TIME_FACTOR <= run.seconds <= at * TIME_FACTOR + START
        for run, at in zip(runs, line, strict=True)
    ):
        found.append(f"{way}: time is no straight line")
    if whole - least > (0 if "iter" in way else 10 * (tenth - least)) + SLACK:
        found.append(f"{way}: memory grows too much")
    return found


def draw(path: str, growth: dict[str, list[Run]]) -> None:
    figure, (left, right) = import_module("matplotlib.pyplot").subplots(
        1, 2, figsize=(11, 4), layout="constrained"
    )
    for way, runs in growth.items():
        left.loglog(SIZES, [run.seconds for run in runs], marker="o", label=way.replace("`", ""))
        right.plot(SIZES, [run.megabytes for run in runs], marker="o")
    left.set(title="Time", xlabel="items", ylabel="s")
    right.set(title="Most memory held", xlabel="items", ylabel="MB", ylim=(0, None))
    left.legend()
    figure.savefig(path)


def main() -> int:
    """Returns 1 if something is no straight line, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chart", metavar="FILE", help="draw both, as .svg or .png")
    path = parser.parse_args().chart
    growth = measured()
    print(f"Python {platform.python_version()}; medians of {ROUNDS}: µs an item, most MB held\n")
    print("| no-op calls |", " | ".join(f"{size:,} items" for size in SIZES), "|")
    print("| --- |", " | ".join("---:" for _ in SIZES), "|")
    for way, runs in growth.items():
        cells = [
            f"{1e6 * run.seconds / size:.1f}, {run.megabytes:.0f} MB"
            for run, size in zip(runs, SIZES, strict=True)
        ]
        print(f"| {way} |", " | ".join(cells), "|")
    print()
    found = [line for way, runs in growth.items() for line in bent(way, runs)]
    print(*(f"- {line}" for line in found or ["all straight lines"]), sep="\n")
    if path:
        draw(path, growth)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
