"""A million items streamed: neither memory nor the time for an item may grow with their number."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import Measurement, medians

from twostage import iter_two_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY = 1_000_000
FEW = 100_000
ROUNDS = 7

STATM = Path("/proc/self/statm")


def nothing(token: int) -> int:
    return token


def nothing_of_many(items: list[int]) -> list[int]:
    return items


def stream(items: int) -> Iterator[int]:
    """Yields how many outcomes were there so far, at each of them."""
    with iter_two_stage(range(items), nothing_of_many, nothing, batch_size=100) as outcomes:
        for number, _ in enumerate(outcomes, 1):
            yield number


def last(items: int) -> bool:
    return max(stream(items)) == items


def resident() -> float:
    """Returns how many MB of memory this process holds now."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth() -> tuple[float, float]:
    """Returns the memory held at a few outcomes and at many, of one run."""
    held = [resident() for number in stream(MANY) if number in (FEW, MANY)]
    return held[0], held[1]


def measure() -> Iterator[Measurement]:
    if STATM.exists():
        # In a process of its own: what others have freed would hide what this one takes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            before, after = process.submit(growth).result()
        yield Measurement(
            "MB more at the last item", after - before, "<=", 20, f"{before:.1f} to {after:.1f}"
        )
    short, long = medians(ROUNDS, partial(last, FEW), partial(last, MANY))
    yield Measurement(
        "items a second, many / few",
        (MANY / long) / (FEW / short),
        ">=",
        0.85,
        f"{MANY / long:,.0f} / {FEW / short:,.0f}",
    )
