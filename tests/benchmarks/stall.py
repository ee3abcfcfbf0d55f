"""How long a job holds the caller's event loop up at most, by its functions, its source and its form.

A task of the loop looks at the clock whenever it gets its turn: the longest time between two of its looks is
the stall. The garbage collector and other programs are in it as well, and so is, with plain functions, the
time for which their threads hold the interpreter: `python tests/benchmarks/stall.py`.
"""

from __future__ import annotations

import asyncio
import gc
import platform
import time
from itertools import product
from typing import TYPE_CHECKING, Any

from twostage import aiter_two_stage, arun_two_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

ITEMS = 100_000
ROUNDS = 3


def plain(call: object) -> object:
    return call


async def awaited(call: object) -> object:
    return call


async def sleeping(call: object) -> object:
    await asyncio.sleep(0.001)
    return call


def threaded() -> Iterator[int]:
    yield from range(ITEMS)


async def on_the_loop() -> AsyncIterator[int]:
    for item in range(ITEMS):
        yield item


async def as_list(items: Any, fetch: Callable[[Any], Any]) -> None:  # noqa: ANN401 - of any kind
    await arun_two_stage(items, fetch, fetch)


async def as_list_of_outcomes(items: Any, fetch: Callable[[Any], Any]) -> None:  # noqa: ANN401 - as above
    await arun_two_stage(items, fetch, fetch, return_exceptions=True, max_failures=1)


async def as_stream(items: Any, fetch: Callable[[Any], Any]) -> None:  # noqa: ANN401 - as above
    async with aiter_two_stage(items, fetch, fetch) as outcomes:
        async for _ in outcomes:
            pass


SOURCES: dict[str, Callable[[], Any]] = {
    "range": lambda: range(ITEMS),
    "generator": threaded,
    "async generator": on_the_loop,
}
FORMS: dict[str, Callable[[Any, Any], Awaitable[None]]] = {
    "list": as_list,
    "list, max_failures": as_list_of_outcomes,
    "stream": as_stream,
}


class Longest:
    """The longest time between two turns of a task, in seconds."""

    def __init__(self) -> None:
        self.stall = 0.0
        self.turns = 0

    async def watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            self.stall = max(self.stall, now - last)
            self.turns += 1
            last = now


async def measure(form: Callable[[Any, Any], Awaitable[None]], items: object, fetch: object) -> Longest:
    longest = Longest()
    watching = asyncio.create_task(longest.watch())
    await asyncio.sleep(0)
    await form(items, fetch)
    watching.cancel()
    return longest


async def nothing(_items: object, _fetch: object) -> None:
    await asyncio.sleep(1)


def main() -> None:
    print(f"Python {platform.python_version()}, {ITEMS:,} items; the longest stall, best of {ROUNDS}\n")
    print("| functions | source | form | ms | turns |\n| --- | --- | --- | ---: | ---: |")
    alone = asyncio.run(measure(nothing, None, None))
    print(f"| | | a loop alone, for 1 s | {1e3 * alone.stall:.1f} | {alone.turns:,} |")
    for fetch, (source, items), (form, run) in product(
        (plain, awaited, sleeping), SOURCES.items(), FORMS.items()
    ):
        best = Longest()
        best.stall = float("inf")
        for _ in range(ROUNDS):
            gc.collect()
            best = min(best, asyncio.run(measure(run, items(), fetch)), key=lambda longest: longest.stall)
        print(
            f"| {fetch.__name__} | {source} | {form} | {1e3 * best.stall:.1f} | {best.turns:,} |", flush=True
        )


if __name__ == "__main__":
    main()
