"""What the tests of jobs from async code share: one job in each of its forms, sources of each kind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import pytest
from common import PATIENCE

from twostage import Outcome, aiter_two_stage, arun_two_stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


T = TypeVar("T")

AnyOutcome: TypeAlias = Outcome[Any, Any, Any]


def arun(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    return asyncio.run(arun_two_stage(*args, **settings))


def aiterate(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    async def main() -> list[Any]:
        results = {}
        async with aiter_two_stage(*args, **settings) as outcomes:
            async for outcome in outcomes:
                assert outcome.index not in results
                results[outcome.index] = outcome.result if outcome.exception is None else outcome.exception
        return [results[index] for index in sorted(results)]

    return asyncio.run(main())


def aiterate_in_order(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    async def main() -> list[Any]:
        async with aiter_two_stage(*args, ordered=True, **settings) as outcomes:
            return [
                outcome.result if outcome.exception is None else outcome.exception
                async for outcome in outcomes
            ]

    return asyncio.run(main())


each_async_way = pytest.mark.parametrize("job", [arun, aiterate, aiterate_in_order])


async def until(condition: Callable[[], object]) -> None:
    """Gives the loop's other tasks, and the threads, their turns until it holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - it may be a thread that makes it hold
            await asyncio.sleep(0)


async def turns(number: int = 20) -> None:
    """Gives the loop's other tasks so many turns."""
    for _ in range(number):
        await asyncio.sleep(0)


async def patiently(coming: Awaitable[T]) -> T:
    """Awaits what must come to its end by itself."""
    async with asyncio.timeout(PATIENCE):
        return await coming
