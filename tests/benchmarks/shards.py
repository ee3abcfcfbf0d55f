"""Shards on Dask: what more workers bring, and how many items a second the owner of the job can take.

`python tests/benchmarks/shards.py`. The calls sleep, so that two cores are enough for four workers.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import time
from concurrent.futures import Executor, Future
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import dask
from distributed import Client, LocalCluster

from twostage import Shards, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = {"distributed.worker.profile.enabled": False, "logging.distributed": "critical"}
SIZE = 500
RESULT = "x" * 200


def fetch_tokens(items: list[int]) -> list[int]:
    time.sleep(0.05)
    return items


def fetch_result(token: int) -> int:
    time.sleep(0.1)
    return token


def throughput(items: int) -> None:
    """Prints how many items a second one, two and four workers bring."""
    settings: dict[str, Any] = {"batch_size": 100, "result_workers": 32}
    first = 0.0
    for workers in (1, 2, 4):
        with (
            dask.config.set(CONFIG),
            LocalCluster(
                n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
            ) as cluster,
            Client(cluster) as client,
        ):
            job = partial(
                run_two_stage,
                fetch_token=fetch_tokens,
                fetch_result=fetch_result,
                shards=Shards(client.get_executor(pure=False), workers + 1, SIZE),
                **settings,
            )
            job(range(workers * 50))  # the workers import what they need
            took = []
            for _ in range(3):
                began = time.perf_counter()
                assert len(job(range(items))) == items
                took.append(time.perf_counter() - began)
        rate = items / median(took)
        first = first or rate
        print(f"{workers} workers: {rate:6.0f} items/s, {rate / first:.2f} of one's")


class Canned(Executor):
    """Gives answers that were computed before: what is left is the owner's own work."""

    def __init__(self) -> None:
        self._answers: dict[int, bytes] = {}

    def submit(self, call: Callable[..., Any], /, *_: object, **__: object) -> Future[Any]:
        sent = pickle.dumps(call)
        size = len(vars(call)["_argument"])
        if size not in self._answers:
            self._answers[size] = pickle.dumps(pickle.loads(sent)())  # noqa: S301 - our own
        future: Future[Any] = Future()
        future.set_result(pickle.loads(self._answers[size]))  # noqa: S301 - our own
        return future


def token_at_once(item: int) -> int:
    return item


def result_at_once(_: int) -> str:
    return RESULT


def owner(items: int) -> None:
    """Prints what an item costs the owner of the job, from the source to the consumer."""
    for size in (100, 1000):
        took = []
        for _ in range(3):
            executor = Canned()
            gc.collect()
            began = time.process_time()
            shards = Shards(executor, at_once=8, size=size)
            with iter_two_stage(range(items), token_at_once, result_at_once, shards=shards) as outcomes:
                assert sum(1 for _ in outcomes) == items
            took.append(time.process_time() - began)
        cost = median(took) / items
        print(f"the owner, shards of {size}: {1e6 * cost:.1f} µs an item, {1 / cost:,.0f} items/s")


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=12_000)
    arguments = parser.parse_args()
    throughput(arguments.items)
    owner(200_000)


if __name__ == "__main__":
    main()
