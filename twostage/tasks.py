"""A runner of attempts that are coroutines: tasks on an event loop, which is in another thread."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
from collections import deque
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from twostage.async_executor import LOT, ended
from twostage.runners import Runner, cancelled, given_up, left_badly, made_context

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from twostage.async_executor import Ended
    from twostage.calls import Call
    from twostage.completions import Completions
    from twostage.runners import Clock, Work

__all__ = ["Submit", "TaskRunner"]

Submit: TypeAlias = "Callable[[Callable[[], Coroutine[Any, Any, None]]], Future[None]]"
"""Runs a coroutine function on a loop, until its future is cancelled, as `AsyncExecutor.submit` does."""

LONGEST_CANCEL = 1.0
"""How long the end of a job waits for tasks that were given up and do not end."""


class TaskRunner(Runner):
    """Runs each attempt in a task of its own, at most so many at once.

    It is a call on the executor itself, which lasts as long as the job: that is where the stage's context
    is entered and left. In the loop's thread a success is followed by the next call that was handed over,
    a failure by what the coordinator then decides. A task that was given up is cancelled, and keeps its
    place among those that run until it has ended.
    """

    def __init__(self, work: Work, submit: Submit, completions: Completions, clock: Clock) -> None:
        self.out = 0
        self._work = work
        self._submit = submit
        self._completions = completions
        self._clock = clock
        self._queue: deque[Call] = deque()
        self._first: deque[Call] = deque()
        self._served: Future[None] | None = None  # the call on the executor
        # The rest is the loop's, but that who takes an attempt out of `_running` first, its end or the
        # coordinator that gives it up, has it.
        self._loop: asyncio.AbstractEventLoop | None = None  # once calls may begin
        self._closing = asyncio.Event()
        self._woken = False  # a look at what was handed over is on its way
        self._busy = 0
        self._running: dict[asyncio.Task[Ended], Call] = {}  # in the order in which they began
        self._hung: set[asyncio.Task[Ended]] = set()  # given up, and not ended
        self._values: tuple[object, ...] = ()  # the context's, if there is one

    # --- in the coordinator's thread

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        if self._served is None:
            self._served = self._work.variables.copy().run(self._submit, self._serve)
            self._completions.add(self._served, (self._serve_ended, None, None, None))
            atexit.register(self._served.cancel)  # a job that is left would keep Python from ending
        self.out += len(calls)
        (self._first if first else self._queue).extend(calls)
        self._wake()

    def _wake(self) -> None:
        if self._loop is not None and not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._fill)

    def _serve_ended(self, _subject: object, _answer: object, _error: BaseException | None) -> None:
        served = cast("Future[None]", self._served)
        if served.cancelled():
            raise CancelledError(
                f"{self._work.stage}: its task on the event loop was cancelled, not by the job"
            )
        error = served.exception()
        if error is not None:
            raise error

    def _attempt_ended(self, call: Call, answer: object, error: BaseException | None) -> None:
        self.out -= 1
        self._work.ended(call, answer, error)
        if error is not None and (self._first or self._queue):
            self._wake()

    def _given_up_ended(self, _subject: object, _answer: object, _error: BaseException | None) -> None:
        self.given_up -= 1

    def give_up(self, now: float) -> None:
        timeout = self._work.attempt_timeout or math.inf
        calls: list[Call] = []
        while (oldest := self._oldest()) is not None and oldest[1].began + timeout <= now:
            task, call = oldest
            self._hung.add(task)
            if self._running.pop(task, None) is None:
                self._hung.discard(task)
                continue
            calls.append(call)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(task.cancel)
        self.given_up += len(calls)
        self.out -= len(calls)  # before the warnings: who hears them may raise
        for call in calls:
            self._work.ended(call, None, given_up(self._work, call))

    def next_overdue(self, now: float) -> float:
        if not self.out:
            return math.inf
        oldest = self._oldest()
        began = now if oldest is None else min(now, oldest[1].began)
        return began + (self._work.attempt_timeout or math.inf)

    def _oldest(self) -> tuple[asyncio.Task[Ended], Call] | None:
        while self._running:
            with contextlib.suppress(StopIteration, RuntimeError):  # it has changed between the two steps
                return next(iter(self._running.items()))
        return None

    def take_back(self) -> list[Call]:
        back: list[Call] = []
        for queue in (self._first, self._queue):
            with contextlib.suppress(IndexError):
                while True:
                    back.append(queue.popleft())
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self.take_back()

    def join(self) -> None:
        served = self._served
        if served is None:
            return
        if self._loop is None:
            served.cancel()  # whatever the context waits for as it is entered
        else:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._closing.set)
        with contextlib.suppress(CancelledError):
            error = served.exception()
            if error is not None and self._loop is not None:
                left_badly(self._work, error)
        atexit.unregister(served.cancel)
        self._served = None  # it holds its event, which leads back here
        self.given_up = len(self._hung)

    # --- in the loop's thread

    async def _serve(self) -> None:
        has_one = self._work.context is not None
        async with made_context(self._work) if has_one else nullcontext() as value:
            self._values = (value,) if has_one else ()
            self._loop = asyncio.get_running_loop()
            self._fill()
            try:
                await self._closing.wait()
            finally:  # as Python ends, it is cancelled while attempts run
                self._closing.set()
                for task in list(self._running):
                    task.cancel()
                if left := {*self._running, *self._hung}:
                    await asyncio.wait(left, timeout=LONGEST_CANCEL)
                self._values = ()

    def _fill(self) -> None:
        """Begins what was handed over, so much of it that the loop's other work is not held up."""
        self._woken = False
        for _ in range(LOT):
            if self._busy >= self._work.workers or not self._begin_next():
                return
        self._wake()

    def _begin_next(self) -> bool:
        if self._closing.is_set():
            return False
        try:
            call = (self._first or self._queue).popleft()
        except IndexError:
            return False
        self._busy += 1
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._attempt(call), context=self._work.variables.copy())
        task.add_done_callback(partial(self._end, call))
        return True

    async def _attempt(self, call: Call) -> Ended:
        call.began = self._clock()
        asked = self._work.argument(call)  # once it can be given up, the call is another attempt's as well
        self._running[cast("asyncio.Task[Ended]", asyncio.current_task())] = call
        return await ended(self._work.fetch, asked, *self._values)

    def _end(self, call: Call, task: asyncio.Task[Ended]) -> None:
        self._busy -= 1
        began = not task.cancelled()
        answer, error = task.result() if began else (None, None)
        if began and self._running.pop(task, None) is None:
            self._hung.discard(task)
            self._completions.put((self._given_up_ended, None, None, None))
            self._begin_next()
            return
        if not began or isinstance(error, asyncio.CancelledError):
            error = cancelled(error)
        self._completions.put((self._attempt_ended, call, answer, error))
        if error is None:
            self._begin_next()
