"""What the tests of jobs from async code share: one job in each of its forms, sources of each kind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from common import PATIENCE

from twostage import Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


T = TypeVar("T")

AnyOutcome: TypeAlias = Outcome[Any, Any, Any]


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
