"""A job in batches, against the time below which no scheduling can come; and one whose consumer pauses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from measuring import Measurement, medians

from twostage import iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

ITEMS = range(10_000)
BATCH_SIZE = 100
TOKEN_WORKERS = 4
RESULT_WORKERS = 64
TOKENS_LATENCY = 0.050
RESULT_LATENCY = 0.010
PAUSE = 0.150
OUTCOMES_A_PAUSE = 900
ROUNDS = 5

IDEAL = max(
    len(ITEMS) / BATCH_SIZE / TOKEN_WORKERS * TOKENS_LATENCY,
    len(ITEMS) / RESULT_WORKERS * RESULT_LATENCY,
)


def fetch_tokens(items: list[int]) -> list[int]:
    time.sleep(TOKENS_LATENCY)
    return items


def fetch_result(token: int) -> int:
    time.sleep(RESULT_LATENCY)
    return token


def without_pauses() -> int:
    results = run_two_stage(
        ITEMS,
        fetch_tokens,
        fetch_result,
        batch_size=BATCH_SIZE,
        token_workers=TOKEN_WORKERS,
        result_workers=RESULT_WORKERS,
    )
    return sum(results)


def with_pauses() -> int:
    total = 0
    with iter_two_stage(
        ITEMS,
        fetch_tokens,
        fetch_result,
        batch_size=BATCH_SIZE,
        token_workers=TOKEN_WORKERS,
        result_workers=RESULT_WORKERS,
    ) as outcomes:
        for number, outcome in enumerate(outcomes, 1):
            total += outcome.result
            if number % OUTCOMES_A_PAUSE == 0:
                time.sleep(PAUSE)
    return total


def measure() -> Iterator[Measurement]:
    steady, pausing = medians(ROUNDS, without_pauses, with_pauses)
    yield Measurement(
        "ideal / time, in batches", IDEAL / steady, ">=", 0.93, f"{IDEAL:.4f} s / {steady:.3f} s"
    )
    yield Measurement(
        "time with pauses / without", pausing / steady, "<=", 1.45, f"{pausing:.3f} s / {steady:.3f} s"
    )
