"""Where attempts run: what a runner is, and the one for an executor of the user's."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from twostage.base.records import told
from twostage.errors import AttemptTimeout
from twostage.running.processes import is_dask, received, sent, start_processes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future
    from contextvars import Context

    from twostage.base.as_completed import Completions, Handler
    from twostage.base.records import Call

__all__ = [
    "Clock",
    "ExecutorRunner",
    "Runner",
    "Work",
    "given_up",
    "left_badly",
    "made_context",
]

log = logging.getLogger("twostage")

Clock: TypeAlias = Callable[[], float]


class Work(NamedTuple):
    """What a runner is for.

    Attributes:
        stage: What its stage is called.
        fetch: The user's function.
        argument: Takes a call; returns what `fetch` is given, anew for each attempt.
        ended: Hears of the end of each attempt, in the coordinator's thread.
        workers: How many attempts may run at once.
        variables: The context of those that run, of which each gets a copy.
        executor: Where they run; `None` for a pool of our own.
        attempt_timeout: Seconds after which an attempt is given up; `None` for never.
        rated: Whether it matters when exactly an attempt begins.
        awaits: Whether `fetch` is a coroutine function.
        context: Makes the async context manager whose value `fetch` is given as well, if there is one.
        observed: Whether each call is to have the time at which its attempt ended.
    """

    stage: str
    fetch: Callable[[Any], Any]
    argument: Callable[[Any], Any]
    ended: Handler
    workers: int
    variables: Context
    executor: Executor | None = None
    attempt_timeout: float | None = None
    rated: bool = False
    awaits: bool = False
    context: Callable[[], AbstractAsyncContextManager[Any]] | None = None
    observed: bool = False


class Runner:
    """Runs attempts and reports the end of each as one event. Used by the coordinator's thread alone.

    Attributes:
        out: How many attempts were handed over and have neither ended nor been taken back.
        given_up: How many attempts were given up and run on.
    """

    out: int = 0
    given_up: int = 0

    def prepare(self) -> None:
        """Hears, in the caller's thread, that the job is about to begin."""

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        """Hands `calls` over, to begin in their order; `first`: before those that wait already.

        Raises:
            BaseException: A `submit` did. Each call was then handed over or not, as `out` says.
        """
        raise NotImplementedError

    def expect(self, calls: int) -> None:
        """Hears, before its first call, how many are on their way."""

    def take_back(self) -> list[Call]:
        """Takes back what has not begun and returns it, in its order."""
        raise NotImplementedError

    def give_up(self, now: float) -> None:
        """Gives up attempts that have taken too long; each ends with an `AttemptTimeout`."""

    def next_overdue(self, now: float) -> float:
        """Returns when, at the earliest, there may be one."""
        del now
        return math.inf

    def stop(self) -> None:
        """Lets nothing more begin. What runs still reports its end."""
        raise NotImplementedError

    def join(self) -> None:
        """Waits, once `out` is 0, until the threads of our own are gone, but for those given up."""


def given_up(work: Work, call: Call) -> AttemptTimeout:
    """Returns the failure of an attempt that has taken too long, and says so."""
    log.warning(
        "%s, %s: the attempt takes longer than %g s and is given up",
        *(work.stage, told(call), work.attempt_timeout),
    )
    return AttemptTimeout(f"the attempt took longer than attempt_timeout={work.attempt_timeout:g} s")


def cancelled(error: BaseException | None) -> CancelledError:
    """Returns the failure of an attempt that was cancelled by something else than its job."""
    failure = CancelledError("the call's task was cancelled, and not by its job")
    failure.__cause__ = error
    return failure


def made_context(work: Work) -> AbstractAsyncContextManager[Any]:
    """Returns what a stage's `context` makes, for which the stage must have one.

    Raises:
        TypeError: It is no async context manager.
    """
    assert work.context is not None  # noqa: S101 - for the type checker
    made: object = work.context()
    if isinstance(made, AbstractAsyncContextManager):
        return made
    if inspect.iscoroutine(made):
        made.close()
    raise TypeError(
        f"{work.stage}: context returned {type(made).__name__}; expected an async context manager"
    )


def left_badly(work: Work, error: BaseException) -> None:
    """Says that a context has failed as it was left, when all that it was for is done."""
    log.warning("%s: its context has failed as it was left: %r", work.stage, type(error))


class _Attempt:
    """A call's function, in the context of its job. For another process it is what makes the call there.

    Args:
        work: Whose function it is.
        call: Hears when it begins, if that matters.
        clock: Tells when it is.
    """

    def __init__(self, work: Work, call: Call, clock: Clock) -> None:
        self._argument = work.argument(call)
        self._work = work
        self._call = call
        self._clock = clock

    def __call__(self) -> object:
        if self._work.rated:
            self._call.began = self._clock()
        try:
            return self._work.variables.copy().run(self._work.fetch, self._argument)
        finally:
            if self._work.observed:
                self._call.ended = self._clock()

    def __reduce__(self) -> tuple[object, ...]:
        if self._work.rated:
            self._call.began = self._clock()  # it leaves now; nobody here will see it begin
        assert self._work.executor is not None  # noqa: S101 - for the type checker
        return sent(self._work.stage, self._work.fetch, self._argument, self._work.executor)


class ExecutorRunner(Runner):
    """One future an attempt, on an executor that others may use too and that is not ours to end."""

    def __init__(self, work: Work, executor: Executor, completions: Completions, clock: Clock) -> None:
        self.out = 0
        self._work = work
        self._executor = executor
        self._completions = completions
        self._clock = clock
        self._futures: dict[Call, tuple[int, Future[Any]]] = {}  # each with its number
        self._number = count()

    def prepare(self) -> None:
        start_processes(self._executor)

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        del first  # what is out is never more than may run at once, so nothing waits here
        for call in calls:
            call.began = -math.inf if self._work.rated else self._clock()
            attempt = _Attempt(self._work, call, self._clock)
            future = self._executor.submit(attempt)
            number = next(self._number)
            self._futures[call] = number, future
            self.out += 1
            # An event that held the future would be a cycle: Dask keeps an answer as long as there is one.
            self._completions.add(future, (self._done, call, number, None))

    def _done(self, call: Call, number: int, _error: BaseException | None) -> None:
        if call not in self._futures or self._futures[call][0] != number:
            return  # taken back; the call may have been started anew
        future = self._futures.pop(call)[1]
        self.out -= 1
        if call.began == -math.inf:  # it has failed before it began
            call.began = self._clock()
        if future.cancelled():
            self._work.ended(call, None, CancelledError("the executor cancelled the call before it ran"))
        elif (error := future.exception()) is None:
            self._work.ended(call, *received(self._work.stage, self._work.fetch, future.result()))
        elif isinstance(error, BrokenExecutor):
            # All calls fail from here on. Cancelling one that waits can stop 3.11's pool in its own end.
            self._futures.clear()
            self.out = 0
            raise error
        else:
            self._work.ended(call, None, error)

    def take_back(self) -> list[Call]:
        return [] if is_dask(self._executor) else self._cancel()  # where running ones do not refuse

    def _cancel(self) -> list[Call]:
        # One by one, since `shutdown(cancel_futures=True)` is not ours to call; running ones refuse.
        back = [call for call, (_, future) in self._futures.items() if future.cancel()]
        for call in back:
            del self._futures[call]
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self._cancel()
