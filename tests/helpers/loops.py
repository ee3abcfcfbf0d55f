"""Event loops for the tests of what runs on one, and coroutines that a test holds up."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeAlias

from common import PATIENCE, LeaveError, ours, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twostage import AsyncExecutor

LoopFactory: TypeAlias = "Callable[[], asyncio.AbstractEventLoop]"

LOOPS: Final[dict[str, LoopFactory | None]] = {"asyncio": None}
if sys.platform != "win32":
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop
if sys.version_info >= (3, 12):

    def eager() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    LOOPS["eager"] = eager

ENDS: Final = [SystemExit(3), KeyboardInterrupt(), LeaveError()]  # what ends a thread, or at least a job


class Gate:
    """Where the coroutines of one loop wait until the test opens it."""

    def __init__(self) -> None:
        self.came = 0
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False

    async def __call__(self, answer: Any = None) -> Any:  # noqa: ANN401 - hands on what it got
        self._loop = asyncio.get_running_loop()
        self.came += 1
        if not self._is_open:  # one of the two sees what the other has set: this, or `open` the loop
            await self._event.wait()
        return answer

    def hold(self, number: int = 1) -> None:
        until(lambda: self.came == number, f"{number} at the gate")

    def open(self) -> None:
        self._is_open = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


@contextmanager
def busy(executor: AsyncExecutor) -> Iterator[None]:
    """Keeps the loop's thread busy: what is submitted meanwhile does not begin."""
    begun, over = threading.Event(), threading.Event()

    async def block() -> None:
        begun.set()
        assert over.wait(PATIENCE)

    future = executor.submit(block)
    del executor  # a test may drop it
    assert begun.wait(PATIENCE)
    try:
        yield
    finally:
        over.set()
    future.result(PATIENCE)


async def same(answer: Any) -> Any:  # noqa: ANN401 - hands on what it got
    return answer


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def fail(error: BaseException) -> NoReturn:
    await asyncio.sleep(0)
    raise error


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def loop_of(executor: AsyncExecutor) -> asyncio.AbstractEventLoop:
    return executor.submit(running_loop).result(PATIENCE)


def assert_lives(executor: AsyncExecutor, thread: threading.Thread | None = None) -> None:
    assert executor.submit(double, 21).result(PATIENCE) == 42
    [loop_thread] = ours()
    assert thread in (None, loop_thread)
