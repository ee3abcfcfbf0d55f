"""Runs the same jobs in twostage and in its peers and prints a table of medians, and of ratios.

Needs what requirements.txt beside it names. Each run has a process of its own, and runs take turns, so
that noise hits all alike. What took over 10 s and five times as long as the first is not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import tenacity
from jobs import PATIENT, PAUSE, RESULTS_A_PAUSE, SCENARIOS
from ways import PEERS, with_asyncio, within_bound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from jobs import Function, Job

LIMIT = 120
"""Seconds after which a run is given up."""


class Run(NamedTuple):
    """What one run took; `held` is how many items were in progress at the end of a pause, at most."""

    seconds: float
    megabytes: float = math.nan
    held: float = 0
    checksum: int = 0


# --- one run, in a process of its own


def measure(scenario: str, name: str) -> Run:
    peer = PEERS[name]
    library = import_module(peer.needs)  # before the clock runs
    job = SCENARIOS[scenario].ready(coroutines=not peer.on_threads)
    if job.fail and not of_twostage(name):
        # Called: as a decorator it has one set of statistics for all threads, and fails at times.
        patient = (
            partial(partial, PATIENT)
            if peer.on_threads
            else tenacity.retry(retry=PATIENT.retry, wait=PATIENT.wait, stop=PATIENT.stop)
        )
        job = job._replace(fetch_tokens=patient(job.fetch_tokens), fetch_result=patient(job.fetch_result))
    started: list[int] = []
    if job.pauses:
        job = job._replace(fetch_tokens=counting(started, job.fetch_tokens, coroutines=not peer.on_threads))
    begin = time.perf_counter()
    if peer.way is with_asyncio:
        checksum, held = library.run(consume_on_loop(with_asyncio(job), job, started))
    elif job.bound and peer.bound == "a semaphore":
        checksum, held = consume(within_bound(job, peer.way), job, started)
    else:
        checksum, held = consume(peer.way(job), job, started)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Run(seconds, peak / (1e6 if sys.platform == "darwin" else 1e3), held, checksum)


def of_twostage(name: str) -> bool:
    return name == "twostage" or name.startswith("coroutines")


def counting(started: list[int], fetch_tokens: Function, *, coroutines: bool) -> Function:
    def counted(call: list[int]) -> object:
        started.append(len(call))
        return fetch_tokens(call)

    async def counted_coroutine(call: list[int]) -> object:
        started.append(len(call))
        return await fetch_tokens(call)

    return counted_coroutine if coroutines else counted


def consume(results: Iterator[int], job: Job, started: list[int]) -> tuple[int, int]:
    if not job.pauses:
        return sum(results), 0
    total = held = 0
    for number, result in enumerate(results, 1):
        total += result
        if number % RESULTS_A_PAUSE == 0:
            time.sleep(PAUSE)
            held = max(held, sum(started) - number)
    return total, held


async def consume_on_loop(results: AsyncIterator[int], job: Job, started: list[int]) -> tuple[int, int]:
    """The same; but its pauses let the loop go on, as an `await` does."""
    total = held = number = 0
    async for result in results:
        number += 1
        total += result
        if job.pauses and number % RESULTS_A_PAUSE == 0:
            await asyncio.sleep(PAUSE)
            held = max(held, sum(started) - number)
    return total, held


# --- all runs


def compare(scenarios: list[str], names: list[str], rounds: int) -> dict[str, dict[str, Run]]:
    """Returns the medians, by scenario and peer."""
    runs: dict[str, dict[str, list[Run]]] = {
        scenario: {name: [] for name in names if takes_part(name, SCENARIOS[scenario])}
        for scenario in scenarios
    }
    for number in range(rounds):
        for scenario, done in runs.items():
            turn = number % len(done)
            for name in [*done][turn:] + [*done][:turn]:
                if number and done[name][0].seconds > max(10, 5 * quickest(done)):
                    continue
                done[name].append(run(scenario, name))
                print(f"{number + 1} {scenario} {name} {done[name][-1].seconds:.3f} s", file=sys.stderr)
    return {
        scenario: {name: Run(*map(median, zip(*all_of_it, strict=True))) for name, all_of_it in done.items()}
        for scenario, done in runs.items()
    }


def takes_part(name: str, job: Job) -> bool:
    """Leaves out what would hold a million items."""
    return not (job.streams and name == "executors")


def quickest(done: dict[str, list[Run]]) -> float:
    return min(all_of_it[0].seconds for all_of_it in done.values() if all_of_it)


def run(scenario: str, name: str) -> Run:
    command = [sys.executable, __file__, "--measure", scenario, name]
    try:
        process = subprocess.run(command, capture_output=True, check=True, timeout=LIMIT)  # noqa: S603 - of this file
    except subprocess.TimeoutExpired:
        return Run(math.inf)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{scenario}, {name}:\n{error.stderr.decode()}")
    done = Run(*json.loads(process.stdout))
    assert done.checksum == -sum(range(SCENARIOS[scenario].size)), f"{scenario}, {name}: wrong results"
    return done


# --- what is shown


def print_table(medians: dict[str, dict[str, Run]], names: list[str]) -> None:
    jobs = [SCENARIOS[scenario] for scenario in medians]
    print("| peer |", " | ".join(f"{job.what}{'' if timed(job) else ', µs an item'}" for job in jobs), "|")
    print("| --- |", " | ".join("---:" for _ in jobs), "|")
    ideals = [job.ideal() for job in jobs]
    print(
        "| no schedule is below |",
        " | ".join("" if ideal is None else f"{ideal:.3f}" for ideal in ideals),
        "|",
    )
    for name in names:
        cells = [cell(SCENARIOS[scenario], done, name) for scenario, done in medians.items()]
        print(f"| {PEERS[name].what} |", " | ".join(cells), "|")
    print()
    for scenario, done in medians.items():
        best = first(SCENARIOS[scenario], done)
        if best != "twostage":
            times = done["twostage"].seconds / done[best].seconds
            print(f"- {SCENARIOS[scenario].what}: twostage is not first: {times:.3f} x {PEERS[best].what}")
    for name in names:
        if PEERS[name].beside in names:
            print_beside(medians, name, PEERS[name].beside)


def print_beside(medians: dict[str, dict[str, Run]], name: str, other: str) -> None:
    times = [
        f"{done[name].seconds / done[other].seconds:.3f} ({SCENARIOS[scenario].what})"
        for scenario, done in medians.items()
    ]
    print(f"- {PEERS[name].what}, times {PEERS[other].what}: {', '.join(times)}")


def timed(job: Job) -> bool:
    """Whether its seconds tell something, or those of one item."""
    return bool(job.token_latency or job.streams)


def cell(job: Job, done: dict[str, Run], name: str) -> str:
    if name not in done:
        return "-"
    seconds, megabytes, held, _ = done[name]
    if seconds == math.inf:
        return f"> {LIMIT}"
    shown = f"{seconds:.3f}" if timed(job) else f"{1e6 * seconds / job.size:.2f}"
    more = f", {megabytes:.0f} MB" if job.streams else f", {held:.0f} held" if job.pauses else ""
    return f"{shown} ({ratio(job, done, name):.2f}{more})"


def ratio(job: Job, done: dict[str, Run], name: str) -> float:
    return done[name].seconds / done[first(job, done)].seconds


def first(job: Job, done: dict[str, Run]) -> str:
    """Returns the fastest of those on threads that keep to the job's bound."""
    equal = [
        name for name in done if PEERS[name].on_threads and not (job.bound and PEERS[name].bound == "none")
    ]
    return min(equal, key=lambda name: done[name].seconds)


def draw(path: str, medians: dict[str, dict[str, Run]]) -> None:
    rows = -(-len(medians) // 3)
    figure, grid = import_module("matplotlib.pyplot").subplots(
        rows, 3, figsize=(13, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis in grid.flat[len(medians) :]:
        axis.remove()
    for (scenario, done), axis in zip(medians.items(), grid.flat, strict=False):
        job = SCENARIOS[scenario]
        names = [name for name in reversed(done) if done[name].seconds < math.inf]
        lengths = [ratio(job, done, name) for name in names]
        colours = ["C1" if of_twostage(name) else "C0" if PEERS[name].on_threads else "C7" for name in names]
        axis.bar_label(axis.barh(names, lengths, color=colours), fmt="%.2f", padding=3)
        axis.set(title=job.what, xlim=(0, 1.25 * max(lengths)))
        axis.axvline(1, color="black", linewidth=0.8)
    figure.suptitle("Time, in units of the first on threads")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scenario", action="append", choices=SCENARIOS, help="may be given again; default: all"
    )
    parser.add_argument("--peer", action="append", choices=PEERS, help="beside twostage; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--chart", metavar="FILE", help="draw the ratios, as .svg or .png")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    names = [name for name in PEERS if name == "twostage" or name in (arguments.peer or PEERS)]
    medians = compare(arguments.scenario or [*SCENARIOS], names, arguments.rounds)
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}.", end=" "
    )
    print(f"Seconds, medians of {arguments.rounds} runs; in brackets: times the first on threads")
    print("that keeps to the bound, if there is one; MB: most memory; held: items in progress in a pause.\n")
    print_table(medians, names)
    if arguments.chart:
        draw(arguments.chart, medians)


if __name__ == "__main__":
    main()
