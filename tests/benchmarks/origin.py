"""The job that the library was written for, against the same job on threads written by hand."""

from __future__ import annotations

import random
import time
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from measuring import Measurement, medians

from twostage import run_two_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

ITEMS = range(1000)
TOKEN_WORKERS = 10
RESULT_WORKERS = 5
ROUNDS = 15

chance = random.Random(9)
TOKEN_LATENCIES = [chance.uniform(0, 0.010) for _ in ITEMS]
RESULT_LATENCIES = [chance.uniform(0, 0.005) for _ in ITEMS]


def fetch_token(item: int) -> int:
    time.sleep(TOKEN_LATENCIES[item])
    return item


def fetch_result(token: int) -> int:
    time.sleep(RESULT_LATENCIES[token])
    return 2 * token


def with_twostage() -> list[int]:
    return run_two_stage(
        ITEMS, fetch_token, fetch_result, token_workers=TOKEN_WORKERS, result_workers=RESULT_WORKERS
    )


def by_hand() -> list[int]:
    items: SimpleQueue[int | None] = SimpleQueue()
    tokens: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    results = [-1] * len(ITEMS)

    def fetch_tokens() -> None:
        while (item := items.get()) is not None:
            tokens.put((item, fetch_token(item)))

    def fetch_results() -> None:
        while (ready := tokens.get()) is not None:
            index, token = ready
            results[index] = fetch_result(token)

    token_threads = [Thread(target=fetch_tokens) for _ in range(TOKEN_WORKERS)]
    result_threads = [Thread(target=fetch_results) for _ in range(RESULT_WORKERS)]
    for thread in token_threads + result_threads:
        thread.start()
    for item in ITEMS:
        items.put(item)
    end(token_threads, items)
    end(result_threads, tokens)
    return results


def end(threads: list[Thread], queue: SimpleQueue[Any]) -> None:
    for _ in threads:
        queue.put(None)
    for thread in threads:
        thread.join()


def measure() -> Iterator[Measurement]:
    ours, theirs = medians(ROUNDS, with_twostage, by_hand)
    yield Measurement("time / threads by hand", ours / theirs, "<=", 1.03, f"{ours:.3f} s / {theirs:.3f} s")
