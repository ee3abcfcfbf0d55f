"""A runner of attempts that are coroutines: tasks on an event loop, which is in another thread."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import sys
from collections import deque
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from functools import partial
from types import coroutine
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from twostage.base.runner import Runner
from twostage.running.async_executor import LOT, ended
from twostage.running.attempts import cancelled, given_up, left_badly, made_context
from twostage.running.processes import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Sequence
    from contextvars import Context

    from twostage.base.as_completed import AsCompleted
    from twostage.base.records import Call
    from twostage.base.runner import Clock, Work

__all__ = ["Submit", "TaskRunner"]

T = TypeVar("T")

Submit: TypeAlias = "Callable[[Callable[[], Coroutine[Any, Any, None]]], Future[None]]"
"""Runs a coroutine function on a loop, until its future is cancelled, as `AsyncExecutor.submit` does."""

Task: TypeAlias = "asyncio.Task[None]"

CALLS_A_TASK = 4
"""How many calls a task goes on for, before the loop looks at its other work even if none of them waits."""

LONGEST_CANCEL = 1.0
"""How long the end of a job waits for tasks that were given up and do not end."""


class TaskRunner(Runner):
    """Runs attempts in tasks, at most so many at once.

    It is a call on the executor itself, which lasts as long as the job: that is where the stage's context
    is entered and left. A task goes on after a success with the next call that was handed over, as one that
    is begun anew has to wait for its turn on the loop, twice; it ends after a failure, and the coordinator
    then decides. A task whose attempt was given up is cancelled, and keeps its place among those that run
    until it has ended.
    """

    def __init__(self, work: Work, submit: Submit, completions: AsCompleted, clock: Clock) -> None:
        self.out = 0
        self._work = work
        self._submit = submit
        self._completions = completions
        self._clock = clock
        self._queue: deque[Call] = deque()
        self._first: deque[Call] = deque()
        self._served: Future[None] | None = None  # the call on the executor
        self._stopped = False
        # The rest is the loop's, but that who takes an attempt out of `_running` first, its end or the
        # coordinator that gives it up, has it. `_busy` goes down before the loop looks for a next call,
        # and calls are handed over before the coordinator looks at `_busy`: one of the two sees them.
        self._loop: asyncio.AbstractEventLoop | None = None  # once calls may begin
        self._task_options: dict[str, Any] = {"name": task_name(work.stage, work.fetch)}
        self._closing = asyncio.Event()
        self._woken = False  # a look at what was handed over is on its way
        self._tasks: set[Task] = set()  # or nobody but a cycle may hold them
        self._busy = 0  # of them, those that have not ended, nor failed
        self._beginning = 0  # of them, those that have not looked for a call yet
        self._running: dict[object, tuple[Task, Call]] = {}  # attempts, in the order in which they began
        self._hung: set[Task] = set()  # given up, and not ended
        self._values: tuple[object, ...] = ()  # the context's, if there is one

    # --- in the coordinator's thread

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        if self._served is None:
            self._served = self._work.variables.copy().run(self._submit, self._serve)
            self._completions.add(self._served, (self._serve_ended, None, None, None))
            atexit.register(self._leave)  # a job that is left would keep Python from ending
        self.out += len(calls)
        (self._first if first else self._queue).extend(calls)
        self._wake()

    def _wake(self) -> None:
        if self._loop is not None and not self._woken and self._busy < self._work.workers:
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
        while (oldest := self._oldest()) is not None and oldest[2].began + timeout <= now:
            attempt, task, call = oldest
            self._hung.add(task)
            if self._running.pop(attempt, None) is None:
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
        began = now if oldest is None else min(now, oldest[2].began)
        return began + (self._work.attempt_timeout or math.inf)

    def _oldest(self) -> tuple[object, Task, Call] | None:
        while self._running:
            with contextlib.suppress(StopIteration, RuntimeError):  # it has changed between the two steps
                attempt, (task, call) = next(iter(self._running.items()))
                return attempt, task, call
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
        self._stopped = True
        self.take_back()

    def _leave(self) -> None:
        if self._served is not None and not (self._loop is not None and self._loop.is_closed()):
            self._served.cancel()

    def join(self) -> None:
        served = self._served
        if served is None:
            return
        if self._loop is None:
            served.cancel()  # whatever the context waits for as it is entered
        else:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._closing.set)
        with contextlib.suppress(CancelledError):
            error = self._error_of(served)
            if error is not None and self._loop is not None:
                left_badly(self._work, error)
        atexit.unregister(self._leave)
        self._served = None  # it holds its event, which leads back here
        self.given_up = len(self._hung)

    def _error_of(self, served: Future[None]) -> BaseException | None:
        """Waits for the call on the executor, unless its loop is closed: nothing ends there any more."""
        while self._loop is None or not self._loop.is_closed():
            with contextlib.suppress(TimeoutError):
                return served.exception(LONGEST_CANCEL)
        return None

    # --- in the loop's thread

    async def _serve(self) -> None:
        cast("Task", asyncio.current_task()).set_name(f"twostage: {self._work.stage}")
        has_one = self._work.context is not None
        async with made_context(self._work) if has_one else nullcontext() as value:
            self._values = (value,) if has_one else ()
            self._loop = asyncio.get_running_loop()
            if can_be_eager(self._loop):  # a turn of the loop less for each
                self._task_options["eager_start"] = True
            self._fill()
            try:
                await self._closing.wait()
            finally:  # as Python ends, it is cancelled while attempts run
                self._closing.set()
                for task, _ in list(self._running.values()):
                    task.cancel()
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=LONGEST_CANCEL)
                self._values = ()

    def _fill(self) -> None:
        """Begins what was handed over, so much of it that the loop's other work is not held up."""
        self._woken = False
        for _ in range(LOT):
            if not self._begin():
                return
        self._wake()

    def _begin(self) -> bool:
        """Begins a task, if there is a call for it and there may be one more."""
        calls = len(self._first) + len(self._queue)
        if self._busy >= self._work.workers or self._beginning >= calls or self._closing.is_set():
            return False
        self._busy += 1
        self._beginning += 1
        place = _Place()
        task = asyncio.get_running_loop().create_task(self._go_on(place), **self._task_options)
        self._tasks.add(task)
        task.add_done_callback(partial(self._task_ended, place))
        return not place.has_failed  # as an eager one may already

    def _task_ended(self, place: _Place, task: Task) -> None:
        self._tasks.discard(task)
        if not place.has_begun:  # cancelled before
            self._busy -= 1
            self._beginning -= 1
        has_raised = not task.cancelled() and task.exception() is not None  # to be asked, or it is told of
        if place.has_failed or has_raised:
            return
        if not self._woken:  # else its place is given away with others, not so many at a time
            self._begin()

    async def _go_on(self, place: _Place) -> None:
        """Makes attempts, one after the other."""
        place.has_begun = True
        self._beginning -= 1
        task = cast("Task", asyncio.current_task())
        put, running = self._completions.put, self._running
        for _ in range(CALLS_A_TASK):
            if self._closing.is_set():
                break
            try:
                call = (self._first or self._queue).popleft()
            except IndexError:
                break
            call.began = self._clock()
            # Once it can be given up, the call is another attempt's as well.
            asked, attempt = self._work.argument(call), object()
            running[attempt] = task, call
            answer, error = await _within(
                self._work.variables.copy(), ended(self._work.fetch, asked, *self._values)
            )
            if running.pop(attempt, None) is None:
                self._hung.discard(task)
                put((self._given_up_ended, None, None, None))
                del error  # its frames lead to this one, from Python 3.12 on
                break
            if self._work.observed:
                call.ended = self._clock()
            if error is not None:
                if isinstance(error, asyncio.CancelledError):
                    error = cancelled(error)
                self._busy -= 1
                place.has_failed = True
                put((self._attempt_ended, call, None, error))
                if self._stopped and isinstance(error, KeyboardInterrupt):
                    raise error  # a second Ctrl-C, which came just while the call ran, gives up the waiting
                del error  # as above
                return
            put((self._attempt_ended, call, answer, None))
            del call, asked, answer  # nothing of an attempt is kept while the next runs
            if task.cancelling():  # it is not the next one that was meant
                break
        self._busy -= 1


def task_name(stage: str, fetch: object) -> str:
    """Returns what a stage's tasks are called where a debugger or `python -m asyncio ps` lists them."""
    return f"twostage: {stage}, {name_of(fetch)}"


def can_be_eager(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a task can begin as it is made: from Python 3.14 on, if nobody else makes the loop's tasks."""
    is_asyncios = isinstance(loop, asyncio.BaseEventLoop)
    return sys.version_info >= (3, 14) and is_asyncios and loop.get_task_factory() is None


class _Place:
    """What has become of a task, which may count as cancelled whatever it did, if that came in its last step.

    Attributes:
        has_begun: Whether it did anything.
        has_failed: Whether its last attempt has, so that nothing goes on in its place.
    """

    has_begun = False
    has_failed = False


@coroutine
def _within(context: Context, steps: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Runs a coroutine in a context, as a task of its own would."""
    step: Callable[[Any], Any] = steps.send
    sent: Any = None
    while True:
        try:
            awaited = context.run(step, sent)
        except StopIteration as end:
            return cast("T", end.value)
        finally:
            sent = None  # an error would be held by its own traceback
        try:
            sent = yield awaited
            step = steps.send
        except GeneratorExit:
            context.run(steps.close)
            raise
        except BaseException as error:  # noqa: BLE001 - such as a cancellation, it is for the coroutine
            step, sent = steps.throw, error
