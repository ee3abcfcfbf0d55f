"""Thousands of short jobs on threads and loops that switch all the time, and fail everywhere; then SIGINT.

`python tests/stress.py --jobs 3000`. Afterwards threads, file descriptors and live futures are as many as
before. A job that hangs is dumped by `faulthandler`, and the run fails.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, stop_after_attempt, wait_random

from twostage import AsyncExecutor, AttemptTimeout, Stage, iter_two_stage, run_two_stage
from twostage.testing import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from concurrent.futures import Executor

HANG = 60.0
"""Seconds without a job's end after which all stacks are dumped."""

LOOP_TICK = 0.001
"""A loop sleeps no shorter than that."""


class SourceError(Exception):
    """The source's."""


class ConsumerError(Exception):
    """The consumer's."""


class Job:
    """A small job of which much goes wrong."""

    def __init__(self, rng: random.Random) -> None:
        self.items = rng.choice((0, 1, 3, 20, 60))
        some = rng.randrange(self.items + 1)
        self.batch_size = rng.choice((None, 1, 7))
        self.workers = rng.choice((1, 2, 5)), rng.choice((1, 3, 8))
        self.fail = rng.choice((0.0, 0.0, 0.2))
        self.nap = rng.choice((0.0, 0.0, 0.0001))
        self.lasting = rng.choice((None, None, None, some))
        self.source_fails = rng.choice((None, None, None, some))
        self.consumer_leaves = rng.choice((None, None, some))
        self.form = rng.choice(("list", "stream", "ordered"))
        self.shared_pool = rng.random() < 0.2
        self.chance = random.Random(rng.random())
        self.attempt_timeout = None if self.shared_pool else rng.choice((None, None, 0.0003, 0.002))
        self.awaited = rng.random() < 0.3, rng.random() < 0.3  # which stages have coroutine functions
        self.clients = rng.random() < 0.5
        self.in_use = 0  # clients

    def source(self) -> Iterator[int]:
        for item in range(self.items):
            if item == self.source_fails:
                raise SourceError
            yield item

    def naps(self, attempt_timeout: float | None) -> Iterator[float]:
        """Yields how long an attempt takes, and then fails at times."""
        if self.nap:
            yield self.nap * self.chance.random()
        if attempt_timeout is not None:  # some take a little longer, and some about as long
            yield attempt_timeout * self.chance.choice((0.1, 0.5, 0.9, 1.1))
        if self.chance.random() < self.fail:
            raise ApiError(503)

    def plain(self, answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def fetch(argument: Any) -> Any:  # noqa: ANN401 - an item, a batch of them, or a token
            for seconds in self.naps(self.attempt_timeout):
                time.sleep(seconds)
            return answer(argument)

        return fetch

    def coroutine(self, answer: Callable[[Any], Any]) -> Callable[..., Any]:
        async def fetch(argument: Any, client: Job | None = None) -> Any:  # noqa: ANN401 - as above
            assert (client is self) == self.clients
            for seconds in self.naps(self.attempt_timeout and LOOP_TICK * 3):
                await asyncio.sleep(seconds)
            return answer(argument)

        return fetch

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Job]:
        self.in_use += 1
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:  # the job has ended before it needed one
            self.in_use -= 1
            raise
        yield self
        await asyncio.sleep(0)
        self.in_use -= 1

    def token(self, item: int) -> int:
        return item + 1

    def tokens(self, batch: list[int]) -> list[int]:
        return [item + 1 for item in batch]

    def result(self, token: int) -> int:
        if token - 1 == self.lasting:
            raise LookupError
        return -token

    def run(self, first: Stage[Any, int], second: Stage[int, int]) -> list[int]:
        """Returns the results in the items' order."""
        if self.form == "list":
            return run_two_stage(self.source(), first, second)
        results: dict[int, int] = {}
        with iter_two_stage(self.source(), first, second, ordered=self.form == "ordered") as outcomes:
            for outcome in outcomes:
                assert outcome.index not in results, "an item gave two outcomes"
                results[outcome.index] = outcome.result
                if len(results) == self.consumer_leaves:
                    raise ConsumerError
        return [result for _, result in sorted(results.items())]

    def stage(self, place: int, answer: Callable[[Any], Any], pools: Sequence[Executor]) -> Stage[Any, Any]:
        """Returns stage one or two, which gives `answer`."""
        awaited = self.awaited[place]
        settings: dict[str, Any] = {"attempt_timeout": self.attempt_timeout}
        if awaited and self.attempt_timeout is not None:
            settings = {"attempt_timeout": LOOP_TICK * 3, "patience": 1.0}  # or it waits long for probes
        if awaited and self.clients:
            settings["context"] = self.client
        if place == 0 and self.batch_size is not None:
            settings["batch_size"] = self.batch_size
        return Stage(
            self.coroutine(answer) if awaited else self.plain(answer),
            workers=self.workers[place],
            executor=pools[awaited] if pools else None,
            retry=Retrying(
                retry=lambda state: isinstance(
                    state.outcome and state.outcome.exception(), ApiError | AttemptTimeout
                ),
                stop=stop_after_attempt(50),
                wait=wait_random(0, 0.0003),
            ),
            **settings,
        )

    def check(self) -> None:
        """Runs the job and checks what it gives."""
        pools = (ThreadPoolExecutor(3), AsyncExecutor()) if self.shared_pool else ()
        first = self.stage(0, self.token if self.batch_size is None else self.tokens, pools)
        second = self.stage(1, self.result, pools)
        try:
            assert self.run(first, second) == [-item - 1 for item in range(self.items)]
        except SourceError:
            assert self.source_fails is not None
        except LookupError:
            assert self.lasting is not None
        except AttemptTimeout:  # fifty times
            assert self.attempt_timeout is not None
        except ConsumerError:
            assert self.consumer_leaves is not None
        finally:
            for pool in pools:
                pool.shutdown()
        assert not self.in_use


def census() -> tuple[int, int, int]:
    """Counts threads, file descriptors and futures, when attempts that were given up have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("twostage"):
            thread.join(HANG)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
    return threading.active_count(), descriptors, sum(isinstance(one, Future) for one in gc.get_objects())


def run_jobs(number: int, seed: int) -> None:
    """Runs jobs with the threads switching as often as they can."""
    Job(random.Random(seed)).check()
    before = census()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for this in range(seed, seed + number):
            faulthandler.dump_traceback_later(HANG, exit=True)
            try:
                Job(random.Random(this)).check()
            except BaseException:
                print(f"seed {this}", file=sys.stderr)
                raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.setswitchinterval(interval)
    after = census()
    assert after == before, f"threads, descriptors and futures were {before} and are {after}"


ENDLESS = """
import asyncio, itertools, sys, threading, time
from twostage import run_two_stage, iter_two_stage

def call(argument):
    time.sleep(0.001)
    return argument

async def awaited(argument):
    await asyncio.sleep(0.001)
    return argument

if sys.argv[2] == "coroutines":
    call = awaited

def source():
    for item in itertools.count():
        if item == 50:
            print("ready", flush=True)
        yield item

if sys.argv[1] == "list":
    run_two_stage(source(), call, call)
else:
    with iter_two_stage(source(), list, call, batch_size=10) as outcomes:
        for outcome in outcomes:
            pass
"""


def interrupt(rng: random.Random) -> None:
    """Sends SIGINT to a job at a random moment, and looks at how its process ends."""
    form, kind = rng.choice(("list", "stream")), rng.choice(("threads", "coroutines"))
    script = [sys.executable, "-c", ENDLESS, form, kind]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGABRT)
            raise
    assert process.returncode == -signal.SIGINT, errors
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=3000, help="how many (default: %(default)s)")
    parser.add_argument("--interrupts", type=int, default=30, help="how many SIGINTs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: %(default)s)")
    arguments = parser.parse_args()
    faulthandler.enable()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    run_jobs(arguments.jobs, arguments.seed)
    print(f"{arguments.jobs:,} jobs, {time.monotonic() - began:.0f} s; nothing left behind", flush=True)
    for this in range(arguments.interrupts):
        interrupt(random.Random(arguments.seed + this))
    print(f"{arguments.interrupts} SIGINTs, each with one KeyboardInterrupt")


if __name__ == "__main__":
    main()
