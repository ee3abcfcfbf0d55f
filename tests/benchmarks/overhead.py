"""What the library itself costs: calls that do nothing, against as many tasks on two bare pools."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from measuring import Measurement, medians

from twostage import run_two_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

ITEMS = range(50_000)
BATCH_SIZE = 100
TOKEN_WORKERS = 10
RESULT_WORKERS = 5
ROUNDS = 9


def nothing(item: int) -> int:
    return item


def nothing_of_many(items: list[int]) -> list[int]:
    return items


def bare_pools() -> list[int]:
    with ThreadPoolExecutor(TOKEN_WORKERS) as token_pool, ThreadPoolExecutor(RESULT_WORKERS) as result_pool:
        tokens = [token_pool.submit(nothing, item) for item in ITEMS]
        results = [result_pool.submit(nothing, token.result()) for token in tokens]
        return [result.result() for result in results]


def unbatched() -> list[int]:
    return run_two_stage(ITEMS, nothing, nothing, token_workers=TOKEN_WORKERS, result_workers=RESULT_WORKERS)


def batched() -> list[int]:
    return run_two_stage(
        ITEMS,
        nothing_of_many,
        nothing,
        batch_size=BATCH_SIZE,
        token_workers=TOKEN_WORKERS,
        result_workers=RESULT_WORKERS,
    )


def measure() -> Iterator[Measurement]:
    pools, one_by_one, in_batches = medians(ROUNDS, bare_pools, unbatched, batched)

    def remark(seconds: float, aim: int) -> str:
        mine, theirs = (1e6 * taken / len(ITEMS) for taken in (seconds, pools))
        return f"{mine:.2f} us an item (aim: {aim}) / {theirs:.1f} us"

    yield Measurement("no-op calls / bare pools", one_by_one / pools, "<=", 0.50, remark(one_by_one, 5))
    yield Measurement("the same in batches", in_batches / pools, "<=", 0.25, remark(in_batches, 2))
