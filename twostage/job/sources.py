"""Where items come from, and what reads them beside the consumer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from twostage.base.records import Call
from twostage.base.runner import Runner
from twostage.base.threads import background_thread
from twostage.base.words import brief, without_our_frames
from twostage.running.callers_loop import Turn

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable, Iterable, Sequence

    from twostage.base.as_completed import AsCompleted, Handler
    from twostage.running.callers_loop import CallersLoop

__all__ = ["AsyncSource", "DirectReader", "Key", "Source", "TaskReader", "ThreadReader"]

log = logging.getLogger("twostage")

Key: TypeAlias = "Callable[[Any], Hashable] | None"
"""Gives an item's identity; `None` if each is itself."""

LONGEST_READ = 0.1
"""How long the end of a job waits for what reads its source: that may block for ever."""


class Source:
    """Where items come from.

    Attributes:
        in_memory: Whether nothing has to be waited for.
    """

    def __init__(self, items: Iterable[Any], key: Key) -> None:
        self._items = items
        self._iterator: Iterator[Any] | None = None  # before it is opened
        # An iterator was given to be used up here; a list, or what else makes iterators, was not.
        self._close = getattr(items, "close", None) if isinstance(items, Iterator) else None
        self._key = key
        self.in_memory = type(items) in (list, tuple, range)

    def open(self) -> None:
        """Begins to iterate; else that is done where it is read.

        Raises:
            TypeError: The items are nothing to iterate over.
            Exception: What their `__iter__` raises.
        """
        try:
            self._iterator = iter(self._items)
        except StopIteration as error:
            raise _no_end(error) from error
        except TypeError as error:
            hint = (
                "; with an async iterable, await arun_two_stage" if hasattr(self._items, "__aiter__") else ""
            )
            raise TypeError(
                f"items is {brief(self._items)}; expected something to iterate over{hint}"
            ) from error

    def _opened(self) -> Iterator[Any]:
        if self._iterator is None:
            self.open()
        return cast("Iterator[Any]", self._iterator)

    def read(self, size: int) -> tuple[list[Any], list[Hashable] | None]:
        """Returns the next items, as many as there are up to `size`, and their keys."""
        items = list(islice(self._opened(), size))
        return items, None if self._key is None else [_key_of(item, self._key) for item in items]

    def read_one(self, _: object = None) -> tuple[Any, Hashable]:
        """Returns the next item, and its key.

        Raises:
            StopIteration: There is none.
        """
        item = next(self._opened())
        return item, _key_of(item, self._key)

    def close(self) -> None:
        """Closes the items, once, if they were given to be used up and can be closed."""
        if self._close is not None:
            self._close()
            self._close = None


class AsyncSource:
    """Where items come from, if that has to be awaited."""

    def __init__(self, items: AsyncIterable[Any], key: Key) -> None:
        self._items: AsyncIterator[Any] = aiter(items)
        self._close = getattr(items, "aclose", None) if self._items is items else None
        self._key = key

    async def read_one(self) -> tuple[Any, Hashable]:
        """Returns the next item, and its key.

        Raises:
            StopAsyncIteration: There is none.
        """
        item = await anext(self._items)
        return item, _key_of(item, self._key)

    async def close(self) -> None:
        """Closes the items, once, if they were given to be used up and can be closed."""
        if self._close is not None:
            close, self._close = self._close, None
            await close()


def _key_of(item: object, key: Key) -> Hashable:
    if key is None:
        return None
    try:
        identity = key(item)
    except (StopIteration, StopAsyncIteration) as error:
        raise _no_end(error) from error
    try:
        hash(identity)
    except TypeError:
        raise TypeError(
            f"key returned {type(identity).__name__} for item {brief(item)}; expected something hashable"
        ) from None
    return identity


def _no_end(error: Exception) -> RuntimeError:
    """Returns what is raised instead of an exception that would be taken for the source's end."""
    return RuntimeError(f"a function of the job raised {type(error).__name__}")


class ThreadReader(Runner):
    """Reads a source item by item, in a daemon thread of its own, which closes it as well."""

    def __init__(self, source: Source, ended: Handler, completions: AsCompleted) -> None:
        self.out = 0
        self._source = source
        self._ended = ended
        self._completions = completions
        self._variables = copy_context()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._queue: SimpleQueue[Call | None] = SimpleQueue()

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        del first  # one is like the other
        self.out += len(calls)
        for call in calls:
            self._queue.put(call)
        if self._thread is None and calls and not self._stopped:
            thread = background_thread("twostage-source", self._variables.run, self._read_on)
            thread.start()
            self._thread = thread  # one that could not be started reads nothing, and closes nothing

    def _read_on(self) -> None:
        put = self._completions.put
        try:
            while (call := self._queue.get()) is not None and not self._stopped:
                put((self._read, call, self._source.read_one(), None))
        except BaseException as error:  # noqa: BLE001 - the source's end, or a failure that is the job's
            put((self._read, None, None, without_our_frames(error)))
        try:
            self._source.close()
        except BaseException as error:  # noqa: BLE001 - there is nobody to raise it for
            _tell_of(error)

    def _read(self, call: Call, read: object, error: BaseException | None) -> None:
        self.out -= 1
        self._ended(call, read, error)

    def stop(self) -> None:
        self._stopped = True
        self._queue.put(None)

    def join(self) -> None:
        if self._thread is None:
            self._source.close()
        else:
            self._thread.join(LONGEST_READ)


class DirectReader(Runner):
    """Reads what is in memory, whoever asks."""

    def __init__(self, source: Source, ended: Handler, completions: AsCompleted) -> None:
        self._source = source
        self._ended = ended
        self._put = completions.put

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        del first
        try:
            for call in calls:
                self._put((self._ended, call, self._source.read_one(), None))
        except BaseException as error:  # noqa: BLE001 - the source's end, or the failure of a key
            self._put((self._ended, None, None, without_our_frames(error)))

    def stop(self) -> None:
        pass


class TaskReader(Runner):
    """Reads an async source item by item, in a task on the loop that it belongs to, which closes it as well.

    Args:
        source: The source.
        ended: Hears of each item, and of the end.
        completions: Where that is put.
        loop: That loop.
    """

    def __init__(
        self,
        source: AsyncSource,
        ended: Handler,
        completions: AsCompleted,
        loop: CallersLoop,
    ) -> None:
        self._source = source
        self._ended = ended
        self._put = completions.put
        self._loop = loop
        self._variables = copy_context()
        self._stopped = False
        self._over: Future[None] = Future()
        # The rest is the loop's.
        self._wanted = 0
        self._more = asyncio.Event()
        self._reading = False
        self._task: asyncio.Task[None] | None = None

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        del first
        if calls:
            self._loop.call_soon(partial(self._want, len(calls)))

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._loop.call_soon(self._leave)

    def join(self) -> None:
        while not (self._over.done() or self._loop.is_closed):
            wait([self._over], LONGEST_READ)

    def _want(self, items: int) -> None:
        self._wanted += items
        self._more.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(
                self._read(), name="twostage: source", context=self._variables
            )
            self._task.add_done_callback(self._end)

    def _leave(self) -> None:
        if self._task is None:
            self._want(0)  # for the closing
        elif self._reading:
            self._task.cancel()

    def _end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _tell_of(error)
        self._over.set_result(None)

    async def _read(self) -> None:
        self._reading = True
        error = await self._read_on()
        self._reading = False
        if error is not None:
            self._put((self._ended, None, None, error))
        await self._source.close()

    async def _read_on(self) -> BaseException | None:
        """Returns why no more is read; `None` if that was asked for."""
        turn = Turn()
        try:
            while not self._stopped:
                await self._more.wait()
                while self._wanted and not self._stopped:
                    self._put((self._ended, Call(), await self._source.read_one(), None))
                    self._wanted -= 1
                    await turn.end_if_long()
                self._more.clear()
        except StopAsyncIteration:
            return StopIteration()
        except BaseException as error:  # noqa: BLE001 - it is the job's failure
            return None if self._stopped else without_our_frames(error)
        return None


def _tell_of(error: BaseException) -> None:
    log.warning("the source has failed as it was closed: %r", type(error))
