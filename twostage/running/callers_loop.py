"""The caller's event loop: how the job's threads reach it, and how its tasks let other work go on there."""

from __future__ import annotations

import asyncio
import contextlib
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future

__all__ = ["CallersLoop", "Turn"]

LONGEST_TURN = 0.001
"""For how many seconds a task goes on that has no need to wait."""


class CallersLoop:
    """The loop of a job's consumer, for other threads."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter(self) -> None:
        """Has it be the loop that runs; before all that follows."""
        self._loop = asyncio.get_running_loop()

    @property
    def is_closed(self) -> bool:
        """Whether nothing will ever run on it again."""
        return self._loop is None or self._loop.is_closed()

    def submit(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Future[None]:
        """Runs a coroutine function, until its future is cancelled."""
        assert self._loop is not None  # noqa: S101 - for the type checker
        coroutine = function()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Calls a function, unless nothing will ever run there again."""
        assert self._loop is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)


class Turn:
    """How long a task has gone on without letting others do so."""

    _ends = 0.0

    async def end_if_long(self) -> None:
        """Lets others go on, unless they did so a moment ago."""
        if perf_counter() >= self._ends:
            await asyncio.sleep(0)
            self._ends = perf_counter() + LONGEST_TURN
