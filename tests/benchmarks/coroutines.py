"""Coroutines against threads, and against plain asyncio with queues, on asyncio's event loop and on uvloop.

Not among the others of run.py, since it takes two minutes and more. Needs uvloop for its part of the tables.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice, product
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import batched
import origin
from measuring import Measurement, medians

from twostage import AsyncExecutor, Stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOPS = [name for name in ("asyncio", "uvloop") if find_spec(name)]
THREADS = "threads"

AT_ONCE = (10, 100, 1000, 10_000)
LATENCY = 1.0
WAVES = 2
"""How often each worker is needed."""
RUNS_AT_ONCE = 3
LONG = 10.0
"""Seconds: what took as long is not run again."""

BAR = 1.05
NOTHINGS = 50_000


class Job(NamedTuple):
    what: str
    size: int
    batch_size: int | None
    token_workers: int
    result_workers: int
    fetch_token: Callable[[Any], Any]
    fetch_result: Callable[[int], Any]
    rounds: int


async def fetch_token(item: int) -> int:
    await asyncio.sleep(origin.TOKEN_LATENCIES[item])
    return item


async def fetch_result(token: int) -> int:
    await asyncio.sleep(origin.RESULT_LATENCIES[token])
    return token


async def fetch_batch(items: list[int]) -> list[int]:
    await asyncio.sleep(batched.TOKENS_LATENCY)
    return items


async def fetch_result_of_batch(token: int) -> int:
    await asyncio.sleep(batched.RESULT_LATENCY)
    return token


async def nothing(call: object) -> Any:  # noqa: ANN401 - whatever it was
    return call


WITH_LATENCY = [
    Job(
        "one by one",
        len(origin.ITEMS),
        None,
        origin.TOKEN_WORKERS,
        origin.RESULT_WORKERS,
        fetch_token,
        fetch_result,
        rounds=11,
    ),
    Job(
        "in batches",
        len(batched.ITEMS),
        batched.BATCH_SIZE,
        batched.TOKEN_WORKERS,
        batched.RESULT_WORKERS,
        fetch_batch,
        fetch_result_of_batch,
        rounds=5,
    ),
]
OF_NOTHING = [
    Job("one by one", NOTHINGS, None, 10, 5, nothing, nothing, rounds=5),
    Job("in batches", NOTHINGS, 100, 10, 5, nothing, nothing, rounds=5),
]


# --- two ways to do a job


def with_twostage(job: Job, loop: str) -> int:
    with AsyncExecutor(loop_factory=import_module(loop).new_event_loop) as executor:
        results: list[int] = run_two_stage(
            range(job.size),
            Stage(job.fetch_token, executor=executor),
            Stage(job.fetch_result, executor=executor),
            batch_size=job.batch_size,
            token_workers=job.token_workers,
            result_workers=job.result_workers,
        )
    return sum(results)


def by_hand(job: Job, loop: str) -> int:
    with asyncio.Runner(loop_factory=import_module(loop).new_event_loop) as runner:
        return sum(runner.run(on_queues(job)))


async def on_queues(job: Job) -> list[int]:
    items = iter(range(job.size))
    calls: Iterator[Any] = items
    if job.batch_size:
        calls = iter(lambda: list(islice(items, job.batch_size)), [])
    waiting = job.token_workers * (job.batch_size or 1) + job.result_workers
    tokens: asyncio.Queue[int | None] = asyncio.Queue(max(256, 2 * waiting))
    results = [-1] * job.size

    async def fetch_tokens() -> None:
        for call in calls:
            answer = await job.fetch_token(call)
            for token in answer if job.batch_size else [answer]:
                await tokens.put(token)

    async def fetch_results() -> None:
        while (token := await tokens.get()) is not None:
            results[token] = await job.fetch_result(token)

    async with asyncio.TaskGroup() as result_workers:
        for _ in range(job.result_workers):
            result_workers.create_task(fetch_results())
        async with asyncio.TaskGroup() as token_workers:
            for _ in range(job.token_workers):
                token_workers.create_task(fetch_tokens())
        for _ in range(job.result_workers):
            await tokens.put(None)
    return results


# --- many calls at once, each run in a process of its own


class Run(NamedTuple):
    seconds: float
    megabytes: float


def sleep(token: int) -> int:
    time.sleep(LATENCY)
    return token


async def sleep_on_loop(token: int) -> int:
    await asyncio.sleep(LATENCY)
    return token


def same(items: list[int]) -> list[int]:
    return items


def measure_at_once(way: str, calls: int) -> Run:
    """Makes so many calls at once; the seconds, and the most memory that this process ever held."""
    begin = time.perf_counter()
    if way == THREADS:
        number = len(run_two_stage(range(WAVES * calls), same, sleep, batch_size=100, result_workers=calls))
    else:
        with AsyncExecutor(loop_factory=import_module(way).new_event_loop) as executor:
            fetch_result = Stage(sleep_on_loop, executor=executor, workers=calls)
            number = len(run_two_stage(range(WAVES * calls), same, fetch_result, batch_size=100))
    seconds = time.perf_counter() - begin
    assert number == WAVES * calls
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Run(seconds, peak / (1e6 if sys.platform == "darwin" else 1e3))


def at_once() -> dict[tuple[str, int], Run]:
    """Returns medians, by way and calls at once."""
    runs: dict[tuple[str, int], list[Run]] = {of: [] for of in product((THREADS, *LOOPS), AT_ONCE)}
    for _ in range(RUNS_AT_ONCE):
        for of, done in runs.items():
            if done and done[0].seconds > LONG:
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                done.append(process.submit(measure_at_once, *of).result())
    return {of: Run(*map(median, zip(*done, strict=True))) for of, done in runs.items()}


# --- what is shown


def both_ways(job: Job) -> list[tuple[float, float]]:
    """Returns the median seconds with twostage and by hand, by loop."""
    ways = chain.from_iterable(
        (partial(with_twostage, job, loop), partial(by_hand, job, loop)) for loop in LOOPS
    )
    seconds = iter(medians(job.rounds, *ways))
    return list(zip(seconds, seconds, strict=True))


def print_at_once() -> None:
    print(f"Calls of {LATENCY:g} s, {WAVES} for each worker: s, ideal time / time, most MB held\n")
    print("| |", " | ".join(f"{calls:,} at once" for calls in AT_ONCE), "|")
    print("| --- |", " | ".join("---:" for _ in AT_ONCE), "|")
    medians_by = at_once()
    for way in (THREADS, *LOOPS):
        runs = [medians_by[way, calls] for calls in AT_ONCE]
        cells = [
            f"{run.seconds:.2f}, {WAVES * LATENCY / run.seconds:.3f}, {run.megabytes:.0f} MB" for run in runs
        ]
        print(f"| {way if way == THREADS else f'coroutines, {way}'} |", " | ".join(cells), "|")


def measure() -> Iterator[Measurement]:
    for job in WITH_LATENCY:
        for loop, (ours, theirs) in zip(LOOPS, both_ways(job), strict=True):
            yield Measurement(
                f"{job.what}, {loop}", ours / theirs, "<=", BAR, f"{ours:.3f} s / {theirs:.3f} s"
            )


def print_nothing() -> None:
    print(f"\n| {NOTHINGS:,} calls that do nothing, µs an item |", " | ".join(LOOPS), "|")
    print("| --- |", " | ".join("---:" for _ in LOOPS), "|")
    for job in OF_NOTHING:
        found = both_ways(job)
        for way, taken in zip(("twostage", "asyncio with queues"), zip(*found, strict=True), strict=True):
            cells = [f"{1e6 * seconds / job.size:.2f}" for seconds in taken]
            print(f"| {way}, {job.what} |", " | ".join(cells), "|")


def main() -> int:
    """Returns 1 if the bar is missed, else 0."""
    print(f"Python {platform.python_version()}; medians\n")
    print_at_once()
    print("\n| a job with latency | time / asyncio with queues | bar |\n| --- | ---: | ---: |")
    missed = False
    for found in measure():
        missed |= not found.met
        print(f"| {found.what} | {found.measured:.3f} ({found.remark}) | {found.must_be} {found.bar} |")
    print_nothing()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
