"""`AsyncExecutor`: runs coroutine functions on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import threading
import weakref
from collections import deque
from concurrent.futures import Executor, Future
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

from twostage.base.threads import background_thread
from twostage.base.words import without_our_frames
from twostage.running.processes import name_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from contextvars import Context

__all__ = ["LOT", "AsyncExecutor", "Ended", "ended"]

P = ParamSpec("P")
T = TypeVar("T")

LOT = 64
"""How many coroutines are begun before the loop looks at its other work again."""


Ended: TypeAlias = "tuple[Any, BaseException | None]"
"""How a call of a coroutine function ended: its answer, or the error."""


async def ended(function: Callable[..., Any], /, *args: object, **kwargs: object) -> Ended:
    """Calls a coroutine function and returns how that ended.

    Nothing is raised: a `SystemExit` that leaves its task ends the loop, and all other tasks with it.
    """
    try:
        awaitable = function(*args, **kwargs)
        if not inspect.isawaitable(awaitable):
            raise TypeError(  # noqa: TRY301 - the call's failure, like any other
                f"{getattr(function, '__qualname__', type(function).__name__)} returned "
                f"{type(awaitable).__name__}, which can't be awaited; expected a coroutine function"
            )
        return await awaitable, None
    except BaseException as error:  # noqa: BLE001 - as said
        del function, args, kwargs  # the error's frames lead to this one, from Python 3.12 on
        return None, without_our_frames(error)


class AsyncExecutor(Executor):
    """Runs coroutine functions, all at once, on an event loop in one background thread.

    It is a `concurrent.futures.Executor`, for use from threads: `submit` takes a coroutine function
    instead of a plain one. What is submitted begins as soon as the loop gets to it, in a copy of the
    caller's context variables; how many run at once is the caller's business. A future's `cancel` cancels
    the task of a call that runs: it is done, and `cancelled`, when the task has ended so; a task that does
    not let itself be cancelled gives its result.

    Objects that belong to an event loop, such as an `httpx.AsyncClient`, have to be made and used in this
    one. Give both stages of a job the same executor.

    Args:
        loop_factory: Makes the event loop, as for `asyncio.Runner`, such as `uvloop.new_event_loop`.
            Default: asyncio's own.

    Raises:
        TypeError: `loop_factory` can't be called.

    >>> async def double(number):
    ...     await asyncio.sleep(0.01)
    ...     return 2 * number
    >>> with AsyncExecutor() as executor:
    ...     future = executor.submit(double, 21)
    ...     print(future.result(), list(executor.map(double, [1, 2])))
    42 [2, 4]
    """

    def __init__(self, *, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        if loop_factory is not None and not callable(loop_factory):
            raise TypeError(f"loop_factory is {loop_factory!r}; expected a function that makes an event loop")
        self._loop = _LoopThread(loop_factory)
        weakref.finalize(self, self._loop.finish).atexit = False  # then `_finish_all` waits for it

    def submit(  # type: ignore[override] # a coroutine function, where others take a plain one
        self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Has `fn(*args, **kwargs)` awaited on the loop; returns its future.

        Raises:
            RuntimeError: The executor has been shut down.
            BaseException: The loop could not be made.
        """
        future = _TaskFuture(self._loop)
        self._loop.submit(_Submitted(future, fn, args, kwargs, copy_context()))
        return future

    if TYPE_CHECKING:

        def map(  # type: ignore[override] # as above
            self,
            fn: Callable[..., Awaitable[T]],
            *iterables: Iterable[Any],
            timeout: float | None = None,
            chunksize: int = 1,
        ) -> Iterator[T]:
            """Submits `fn` for each of the arguments; returns the answers in their order."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - `Executor`'s
        """Takes no more calls, and ends the loop when those that run have ended.

        Tasks that they have started and left are cancelled then, as at the end of `asyncio.run`.

        Args:
            wait: Whether to return when all is over, or at once.
            cancel_futures: Whether calls that have not begun are dropped.
        """
        self._loop.finish(cancel_futures=cancel_futures)
        if wait:
            self._loop.join()


class _Submitted(NamedTuple):
    """A call on its way to the loop."""

    future: _TaskFuture
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context


class _TaskFuture(Future[Any]):
    """A future that can be cancelled while its task runs, and is done when that has ended.

    To `concurrent.futures` it is pending until then, for what is running can't become cancelled there.
    """

    def __init__(self, loop: _LoopThread) -> None:
        super().__init__()
        self._loop = loop
        self._claim = threading.Lock()  # of the loop, which begins it, or of who cancels it before
        self._begun = False
        self._task: asyncio.Task[Ended] | None = None

    def begin(self) -> bool:
        """Whether it is to begin, as it has not been cancelled."""
        self._begun = self._claim.acquire(blocking=False)
        return self._begun

    def runs_as(self, task: asyncio.Task[Ended]) -> None:
        """Hears which task it is; in the loop's thread, as all that follows."""
        self._task = task
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Ended]) -> None:
        self._task = None
        self.end(*((None, asyncio.CancelledError()) if task.cancelled() else task.result()))

    def end(self, answer: object, error: BaseException | None) -> None:
        """Is done from now on."""
        if isinstance(error, asyncio.CancelledError):
            self._is_cancelled()
            return
        self.set_running_or_notify_cancel()
        if error is None:
            self.set_result(answer)
        else:
            self.set_exception(error)

    def _is_cancelled(self) -> None:
        try:
            super().cancel()
        finally:  # a callback may raise
            self.set_running_or_notify_cancel()  # who waits for it is told by this only

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self._begun and not self.done()

    def cancel(self) -> bool:
        """Cancels the call; one that runs is done when its task has ended.

        Returns:
            Whether it had not ended by itself.
        """
        if self._claim.acquire(blocking=False):
            self._is_cancelled()
            return True
        if self.done():
            return self.cancelled()
        self._loop.call(self._cancel_task)
        return True


class _LoopThread:
    """An event loop, and the thread that runs it.

    It does not know its executor, which may be dropped while calls run on.
    """

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> None:
        self._loop_factory = loop_factory
        # Of the next three. A signal's handler, or the collector that finds the executor in a cycle, may
        # finish it in the middle of what the same thread does here.
        self._lock = threading.RLock()
        self._waiting: deque[_Submitted] = deque()
        self._woken = False  # a look at those that wait is on its way
        self._finishing = False
        self._cleaning: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Ended]] = set()  # or nobody but a cycle may hold them
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, call: _Submitted) -> None:
        with self._lock:
            if self._finishing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._loop is None:
                self._loop = self._start()
            self._waiting.append(call)
            if not self._woken:
                self._loop.call_soon_threadsafe(self._begin)
                self._woken = True

    def call(self, function: Callable[[], object]) -> None:
        """Calls `function` in the loop's thread, unless that has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(function)

    def finish(self, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._finishing = True
            calls = self._waiting.copy() if cancel_futures else ()  # in one step, as the loop takes of them
        for call in calls:
            call.future.cancel()
        self.call(self._begin)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> asyncio.AbstractEventLoop:
        made: Future[asyncio.AbstractEventLoop] = Future()
        thread = background_thread("twostage-loop", self._run, made)
        thread.start()
        loop = made.result()
        self._thread = thread
        _running.add(self)
        return loop

    def _run(self, made: Future[asyncio.AbstractEventLoop]) -> None:
        try:
            loop = (self._loop_factory or asyncio.new_event_loop)()
        except BaseException as error:  # noqa: BLE001 - for who submits
            made.set_exception(error)
            return
        made.set_result(loop)
        while self._cleaning is None or not self._cleaning.done():
            # A task that a call has started may raise them: they are for those who await it.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()
        loop.close()

    def _begin(self) -> None:
        """Begins what waits, so much of it that the loop's other work is not held up."""
        loop = asyncio.get_running_loop()
        for _ in range(min(LOT, len(self._waiting))):
            future, function, args, kwargs, context = self._waiting.popleft()
            if future.begin():
                coroutine = ended(function, *args, **kwargs)
                try:
                    task = loop.create_task(coroutine, name=name_of(function), context=context)
                except BaseException as error:  # noqa: BLE001 - a task factory's, for who submits
                    coroutine.close()
                    future.end(None, error)
                    continue
                self._tasks.add(task)
                future.runs_as(task)
                task.add_done_callback(self._task_ended)
        with self._lock:
            self._woken = bool(self._waiting)
        if self._woken:
            loop.call_soon(self._begin)
        self._look()

    def _task_ended(self, task: asyncio.Task[Ended]) -> None:
        self._tasks.discard(task)
        self._look()

    def _look(self) -> None:
        if self._finishing and not self._tasks and not self._waiting and self._cleaning is None:
            loop = asyncio.get_running_loop()
            # No task factory of the user's has a say in this one.
            self._cleaning = asyncio.Task(_clean_up(loop), loop=loop)
            self._cleaning.add_done_callback(lambda _: loop.stop())


async def _clean_up(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what the calls have left, as at the end of `asyncio.run`.

    Here it goes on whatever is raised in the loop, and whoever stops it.
    """
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)
    await loop.shutdown_asyncgens()
    # As Python ends, its pools' threads are gone already, and 3.12 starts none to wait for them.
    with contextlib.suppress(RuntimeError):
        await loop.shutdown_default_executor()


_running: weakref.WeakSet[_LoopThread] = weakref.WeakSet()


def _finish_all() -> None:
    """Ends the loops that nobody has shut down, as Python ends: calls that run come to their end."""
    for loop in list(_running):
        loop.finish()
        loop.join()


atexit.register(_finish_all)
