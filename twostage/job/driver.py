"""What drives a coordinator: a thread of its own and the machine's clock, unless a world says otherwise."""

from __future__ import annotations

import asyncio
import math
import time
from contextvars import ContextVar, copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, cast

from twostage.base.as_completed import AsCompleted
from twostage.base.threads import background_thread
from twostage.core.moments import Message
from twostage.job.sources import DirectReader, Source, TaskReader, ThreadReader
from twostage.running.async_executor import AsyncExecutor
from twostage.running.callers_loop import CallersLoop
from twostage.running.on_executor import ExecutorRunner
from twostage.running.pool import PoolRunner
from twostage.running.tasks import TaskRunner

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from twostage.base.as_completed import Event, Handler
    from twostage.base.runner import Runner, Work
    from twostage.core.coordinator import Coordinator
    from twostage.job.sources import AsyncSource
    from twostage.running.tasks import Submit

__all__ = ["AsyncDriver", "Driver", "LoopDriver", "ThreadDriver", "world"]

LONGEST_GET = 1.0
"""Ctrl-C wakes no thread that waits for a lock on Windows before Python 3.14: look up now and then."""


class Driver(Protocol):
    """Runs one coordinator; used by the thread that reads the source and hands over."""

    def clock(self) -> float:
        """Returns the time, as the coordinator is told it; in seconds."""

    def start(self, coordinator: Coordinator) -> None:
        """Begins to run `coordinator`; its runners were made by this driver."""

    def runner(self, work: Work) -> Runner:
        """Returns a runner whose events reach the coordinator."""

    def reader(self, source: Source, ended: Handler) -> Runner:
        """Returns a runner whose calls each read an item, and which closes the source when joined."""

    def send(self, event: Event) -> None:
        """Tells the coordinator. Never waits, and may be called from a finaliser."""

    def receive(self, *, block: bool) -> Message | None:
        """Returns the coordinator's next message; `None` if there is none yet and `block` is off."""

    def join(self) -> None:
        """Waits, after the last message, until no thread of ours is left."""


class AsyncDriver(Driver, Protocol):
    """Runs one coordinator for a consumer on an event loop."""

    def reader(self, source: Source | AsyncSource, ended: Handler) -> Runner:
        """The same for both kinds of sources."""

    async def next_message(self) -> Message | None:
        """Returns the coordinator's next message, when it is there; `None` if another task has taken it."""


class ThreadDriver:
    """Runs the coordinator in a daemon thread, in real time."""

    def __init__(self) -> None:
        self._completions = AsCompleted()
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._runners: list[Runner] = []
        self._loop: AsyncExecutor | None = None  # of our own, if a stage needs one
        self._callers: CallersLoop | None = None
        self.send = self._completions.put

    def clock(self) -> float:
        return time.monotonic()

    def runner(self, work: Work) -> Runner:
        self._runners.append(self._runner(work))
        return self._runners[-1]

    def _runner(self, work: Work) -> Runner:
        if work.awaits:
            submit = self._submit() if work.executor is None else cast("Submit", work.executor.submit)
            return TaskRunner(work, submit, self._completions, time.monotonic)
        if work.executor is None:
            return PoolRunner(work, self._completions, time.monotonic)
        return ExecutorRunner(work, work.executor, self._completions, time.monotonic)

    def _submit(self) -> Submit:
        self._loop = self._loop or AsyncExecutor()  # one for both stages, as clients belong to one
        return self._loop.submit

    def reader(self, source: Source, ended: Handler) -> Runner:
        return ThreadReader(source, ended, self._completions)

    def start(self, coordinator: Coordinator) -> None:
        # A daemon, or a script that has left its iterator somewhere would never end.
        self._thread = background_thread(
            "twostage-coordinator",
            copy_context().run,  # predicates and callbacks of the user's run there
            _drive,
            coordinator,
            self._completions,
            partial(_join, self._runners, self._loop),
            self._tell,
            self._callers,
        )
        self._thread.start()

    def _tell(self, message: Message) -> None:
        self._messages.put(message)

    def receive(self, *, block: bool) -> Message | None:
        if not block:  # nobody else takes, so what is there stays there
            return None if self._messages.empty() else self._messages.get()
        while True:
            alive = self._is_alive()
            try:  # not `suppress`: Ctrl-C at its end would have two tracebacks
                return self._messages.get(timeout=LONGEST_GET if alive else 0)
            except Empty:
                pass
            if not alive:
                return _over("the coordinator's thread is gone")

    def _is_alive(self) -> bool:
        """Whether the thread runs: not if it could not be started, or Ctrl-C came just before."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LONGEST_GET)


def _over(why: str) -> Message:
    return Message([], 0, leave=False, ended=True, error=RuntimeError(why))


class LoopDriver(ThreadDriver):
    """The same for a consumer on an event loop: that is never blocked, and coroutines run on it as well."""

    _callers: CallersLoop

    def __init__(self) -> None:
        super().__init__()
        self._arrived = asyncio.Event()
        self._callers = CallersLoop()

    def start(self, coordinator: Coordinator) -> None:
        self._callers.enter()
        super().start(coordinator)

    def reader(self, source: Source | AsyncSource, ended: Handler) -> Runner:
        reader: Runner
        if not isinstance(source, Source):
            reader = TaskReader(source, ended, self._completions, self._callers)
        elif source.in_memory:
            reader = DirectReader(source, ended, self._completions)
        else:
            reader = ThreadReader(source, ended, self._completions)
        self._runners.append(reader)
        return reader

    def _submit(self) -> Submit:
        return self._callers.submit

    def _tell(self, message: Message) -> None:
        super()._tell(message)
        self._callers.call_soon(self._arrived.set)

    async def next_message(self) -> Message | None:
        """Returns the coordinator's next message, when it is there; `None` if another task has taken it."""
        alive = self._is_alive()
        if self._messages.empty():
            if not alive:
                return _over("the coordinator's thread is gone")
            self._arrived.clear()
            await self._arrived.wait()
        return self.receive(block=False)


def _drive(
    coordinator: Coordinator,
    completions: AsCompleted,
    join: Callable[[], None],
    tell: Callable[[Message], None],
    callers: CallersLoop | None,
) -> None:
    """Runs a coordinator to its end. A function: the thread holds nothing that a user may drop."""
    clock = time.monotonic
    message = coordinator.handle((), clock())
    longest = math.inf if callers is None else LONGEST_GET  # nobody tells when a loop is closed
    while message is None or not message.ended:
        if message is not None:
            tell(message)
        if callers is not None and callers.is_closed:  # what ran on it never ends
            coordinator.close(None, None, None)
            join()
            coordinator.handle(completions.take(0), clock())  # what has ended in threads is recorded
            for close in coordinator.hears.closes:
                close()
            message = _over("the event loop that the job belonged to has been closed")
            break
        due = coordinator.due()
        events = completions.take(min(longest, math.inf if due is None else due - clock()))
        message = coordinator.handle(events, clock())
        del events  # nor an exception, while it waits
    join()
    tell(message)


def _join(runners: Sequence[Runner], loop: AsyncExecutor | None) -> None:
    """Waits until no thread of ours is left, but for those of attempts that were given up."""
    for runner in runners:
        runner.join()
    if loop is not None:
        loop.shutdown(wait=not any(runner.given_up for runner in runners))


world: ContextVar[Callable[[], Driver]] = ContextVar("world", default=ThreadDriver)
"""Makes the driver of each new job: time, threads and the executors are its own."""
