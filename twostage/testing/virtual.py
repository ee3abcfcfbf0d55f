"""Virtual time: jobs of hours run in moments, and the same way each time.

>>> from twostage import run_two_stage
>>> from twostage.testing import SimulatedApi
>>> with VirtualTime(seed=1) as virtual:
...     fetch_tokens = SimulatedApi(lambda ids: [f"token {id}" for id in ids], latency=2, fail=0.1)
...     fetch_result = SimulatedApi(len, latency=(0.5, 1.5))
...     results = run_two_stage(range(1000), fetch_tokens, fetch_result, batch_size=100)
>>> results[5], virtual.now > 30
(7, True)

Inside the `with` block the same coordinator as ever runs the job, in the caller's thread. An attempt's
function is called when the attempt begins and is given its time by `sleep`, so that a simulated API, or
a stand-in of your own, takes as long as it says and no test waits for it; a coroutine function calls `sleep`
as well, and does not await it. What the source and the
consumer `sleep` passes too, with the calls going on meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Generator
from contextlib import AsyncExitStack
from contextvars import copy_context
from itertools import count
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from twostage.base.records import Batch, ListedToken
from twostage.base.runner import Runner, Work
from twostage.base.words import without_our_frames
from twostage.job.driver import world
from twostage.running.async_executor import ended
from twostage.running.attempts import cancelled, given_up, left_badly, made_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextvars import Token
    from types import TracebackType

    from twostage.base.as_completed import Event, Handler
    from twostage.base.records import Call, Outcome
    from twostage.core.coordinator import Coordinator
    from twostage.core.moments import Message
    from twostage.job.driver import Driver
    from twostage.job.sources import AsyncSource, Source

__all__ = ["VirtualTime", "clock", "sleep"]

T = TypeVar("T")

SOURCE = "source"

_current: VirtualTime | None = None


def clock() -> float:
    """Returns the time that `sleep` lets pass."""
    return time.monotonic() if _current is None else _current.now


def sleep(seconds: float) -> None:
    """Lets time pass: virtual time inside `VirtualTime`, real time elsewhere.

    Args:
        seconds: How long. In an attempt's function it is how much longer the attempt takes.

    Raises:
        ValueError: It is negative.
    """
    if _current is None:
        time.sleep(seconds)
    else:
        _current.sleep(seconds)


class VirtualTime:
    """A context in which jobs run in virtual time, deterministically.

    Jobs are built and run by the caller's thread alone; none of their functions may start a job. If
    nothing can ever happen any more, the waiting call raises a `RuntimeError` instead of hanging. A stage's
    `executor` is not used: at most its `workers` attempts run at once.

    Args:
        seed: Where the draws of retry policies begin; `random` itself is put back at the end.
        log: Is called with a line for each attempt that begins or ends and each outcome handed over,
            such as `list.append` or a file's `write`. The same seed gives the same lines.

    Attributes:
        now: Seconds since the start.
    """

    def __init__(self, seed: int = 0, log: Callable[[str], object] | None = None) -> None:
        self._seed = seed
        self._log = log
        self._now = 0.0
        self._elapsed: float | None = None  # how long the attempt that is being made has taken so far
        self._ends: list[tuple[float, int, _VirtualRunner, Call, object, BaseException | None]] = []
        self._tie = count()  # of ends at the same time the one that began first is first
        self._drivers: list[_VirtualDriver] = []

    @property
    def now(self) -> float:
        """Seconds since the start; in an attempt's function with what it has slept."""
        return self._now + (self._elapsed or 0.0)

    def __enter__(self) -> Self:
        global _current  # noqa: PLW0603 - what `sleep` looks at, in whatever context a function runs
        if _current is not None:
            raise RuntimeError("virtual time is running already")
        _current = self
        self._world: Token[Callable[[], Driver]] = world.set(self._driver)
        self._random_state = random.getstate()
        random.seed(self._seed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _current  # noqa: PLW0603 - as above
        _current = None
        world.reset(self._world)
        random.setstate(self._random_state)

    def sleep(self, seconds: float) -> None:
        """Lets `seconds` pass: for the attempt whose function calls it, else for everybody."""
        if seconds < 0:
            raise ValueError(f"seconds is {seconds}; expected no negative number")
        if self._elapsed is not None:
            self._elapsed += seconds
            return
        until = self._now + seconds
        self._settle()
        while self._step(until):
            pass
        self._now = until

    def _driver(self) -> Driver:
        driver = _VirtualDriver(self)
        self._drivers.append(driver)
        return driver

    def _settle(self) -> None:
        """Has all coordinators hear what they were told at this instant."""
        for driver in self._drivers:
            if driver.inbox:
                driver.handle(self._now)

    def _step(self, until: float = math.inf) -> bool:
        """Goes on to the next instant at which something happens, unless that is after `until`."""
        instants = [driver.due() for driver in self._drivers]
        if self._ends:
            instants.append(self._ends[0][0])
        instant = min(instants, default=math.inf)
        if instant > until or instant == math.inf:
            return False
        self._now = max(self._now, instant)
        while self._ends and self._ends[0][0] <= self._now:
            _, attempt, runner, call, answer, error = heapq.heappop(self._ends)
            runner.end(attempt, call, answer, error)
        for driver in self._drivers:
            if driver.inbox or driver.due() <= self._now:
                driver.handle(self._now)
        self._drivers = [driver for driver in self._drivers if not driver.ended]
        return True

    def _attempt(self, runner: _VirtualRunner, call: Call, work: Work) -> None:
        """Makes an attempt, whose end will be heard of when it has taken its time."""
        call.began = self._now
        self._elapsed = 0.0
        answer = failure = None
        try:
            answer = work.variables.copy().run(runner.fetch, work.argument(call))
        except BaseException as error:  # noqa: BLE001 - all that ends an attempt is for the coordinator
            failure = without_our_frames(error)
        end, self._elapsed = self._now + self._elapsed, None
        attempt = next(self._tie)
        runner.running[attempt] = call
        heapq.heappush(self._ends, (end, attempt, runner, call, answer, failure))

    def _record(self, happening: str, what: str) -> None:
        if self._log is not None:
            self._log(f"{self._now:.9f} {happening} {what}\n")


def _name(stage: str, call: Call) -> str:
    if stage == SOURCE:
        return stage
    if isinstance(call, Batch):
        first, tokens = call.members[0], "tokens" if stage == "stage two" else "items"
        index = first.outcome.index if isinstance(first, ListedToken) else first.index
        return f"{stage}, {len(call.members)} {tokens} from {index}"
    if isinstance(call, ListedToken):
        return f"{stage}, item {call.outcome.index}, token {call.place}"
    outcome: Outcome[Any, Any, Any] = call  # type: ignore[assignment] # no fourth kind
    return f"{stage}, item {outcome.index}"


class _VirtualDriver:
    """Runs one coordinator in virtual time."""

    def __init__(self, virtual: VirtualTime) -> None:
        self.inbox: list[Event] = []
        self.ended = False
        self.send = self.inbox.append
        self._virtual = virtual
        self._coordinator: Coordinator | None = None
        self._runners: list[_VirtualRunner] = []
        self._messages: deque[Message] = deque()

    def clock(self) -> float:
        return self._virtual.now

    def runner(self, work: Work) -> _VirtualRunner:
        runner = _VirtualRunner(self, self._virtual, work)
        self._runners.append(runner)
        return runner

    def reader(self, source: Source | AsyncSource, ended: Handler) -> _VirtualRunner:
        runner = _VirtualReader(self, self._virtual, source, ended)
        self._runners.append(runner)
        return runner

    def start(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.handle(self._virtual.now)

    def due(self) -> float:
        due = None if self._coordinator is None else self._coordinator.due()
        return math.inf if due is None else due

    def handle(self, now: float) -> None:
        if self._coordinator is None:
            return
        events = self.inbox.copy()
        self.inbox.clear()
        message = self._coordinator.handle(events, now)
        for runner in self._runners:
            runner.fill()
        if message is not None:
            self.ended = message.ended
            self._messages.append(message)
            for outcome in message.outcomes:
                self._virtual._record("hand over", f"item {outcome.index}")  # noqa: SLF001

    def receive(self, *, block: bool) -> Message | None:
        self._virtual._settle()  # noqa: SLF001 - one simulation in two classes
        while block and not self._messages:
            if not self._virtual._step():  # noqa: SLF001
                raise RuntimeError("the job waits, and nothing is left that could happen")
        return self._messages.popleft() if self._messages else None

    async def next_message(self) -> Message | None:
        return self.receive(block=True)

    def join(self) -> None:
        for runner in self._runners:
            runner.join()


class _VirtualRunner(Runner):
    """A pool of virtual workers: after a success one goes on at once, after a failure when it is told."""

    def __init__(self, driver: _VirtualDriver, virtual: VirtualTime, work: Work) -> None:
        self.out = 0
        self.idle = work.workers
        self._driver = driver
        self._virtual = virtual
        self._work = work
        self._entered: AsyncExitStack | None = None  # the context, once an attempt needed it
        self._values: tuple[object, ...] = ()
        self._queue: deque[Call] = deque()
        self._first: deque[Call] = deque()
        self.running: dict[int, Call] = {}  # attempts that were not given up

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        self.out += len(calls)
        (self._first if first else self._queue).extend(calls)

    def fetch(self, asked: object) -> object:
        """Calls the stage's function; a coroutine runs to its end at once."""
        if not self._work.awaits:
            return self._work.fetch(asked)
        if self._work.context is not None and self._entered is None:
            self._entered = AsyncExitStack()
            try:
                self._values = (_run(self._entered.enter_async_context(made_context(self._work))),)
            except BaseException:
                self.idle = 0  # nothing more begins
                raise
        answer, error = _run(ended(self._work.fetch, asked, *self._values))
        if isinstance(error, asyncio.CancelledError):
            error = cancelled(error)
        if error is not None:
            raise error
        return answer

    def join(self) -> None:
        if self._entered is not None:
            try:
                _run(self._entered.aclose())
            except Exception as error:  # noqa: BLE001 - whatever the user's context raises
                left_badly(self._work, error)

    def fill(self) -> None:
        """Has idle workers begin what was handed over."""
        while self.idle and (self._first or self._queue):
            call = (self._first or self._queue).popleft()
            self.idle -= 1
            self._virtual._record("begin", _name(self._work.stage, call))  # noqa: SLF001 - one simulation in two classes
            self._virtual._attempt(self, call, self._work)  # noqa: SLF001

    def end(self, attempt: int, call: Call, answer: object, error: BaseException | None) -> None:
        if self.running.pop(attempt, None) is None:
            if not self._work.awaits:
                self._driver.send((self._given_up_ended, None, None, None))
            return
        failure = "" if error is None else f", {type(error).__name__}"
        self._virtual._record("end", _name(self._work.stage, call) + failure)  # noqa: SLF001
        self.idle += 1
        self._driver.send((self._attempt_ended, call, answer, error))
        if error is None:
            self.fill()

    def _attempt_ended(self, call: Call, answer: object, error: BaseException | None) -> None:
        self.out -= 1
        if error is not None and self._work.context is not None and not self._values:
            raise error  # the context could not be entered: the job's end
        self._work.ended(call, answer, error)

    def _given_up_ended(self, _subject: object, _answer: object, _error: BaseException | None) -> None:
        self.given_up -= 1

    def give_up(self, now: float) -> None:
        for attempt, call in list(self.running.items()):
            if call.began + (self._work.attempt_timeout or math.inf) <= now:
                del self.running[attempt]
                self._virtual._record("give up", _name(self._work.stage, call))  # noqa: SLF001 - as above
                self.idle += 1
                if not self._work.awaits:  # a task is cancelled, and has ended by that
                    self.given_up += 1
                self.out -= 1
                self._work.ended(call, None, given_up(self._work, call))

    def next_overdue(self, now: float) -> float:
        del now
        began = min((call.began for call in self.running.values()), default=math.inf)
        return began + (self._work.attempt_timeout or math.inf)

    def take_back(self) -> list[Call]:
        back = [*self._first, *self._queue]
        self._first.clear()
        self._queue.clear()
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self.take_back()


def _run(awaitable: Awaitable[T]) -> T:
    """Runs a coroutine to its end, in no time but what it lets pass by `sleep`."""
    steps = awaitable.__await__()
    try:
        next(steps)
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        if isinstance(steps, Generator):
            steps.close()
    raise RuntimeError(
        "a coroutine awaits what takes real time; in virtual time let it pass by twostage.testing.sleep"
    )


class _VirtualReader(_VirtualRunner):
    """Reads a source while the job goes on: what it sleeps is the time that an item takes to come."""

    def __init__(
        self, driver: _VirtualDriver, virtual: VirtualTime, source: Source | AsyncSource, ended: Handler
    ) -> None:
        super().__init__(driver, virtual, Work(SOURCE, self._read, lambda _: None, ended, 1, copy_context()))
        self._source = source

    def _read(self, _: object) -> object:
        read = self._source.read_one()
        try:
            return _run(read) if isinstance(read, Awaitable) else read
        except StopAsyncIteration:
            raise StopIteration from None

    def join(self) -> None:
        closing = self._source.close()
        if closing is not None:
            _run(closing)
