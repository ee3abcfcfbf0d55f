"""A runner on an executor of the user's: one future an attempt."""

from __future__ import annotations

import math
from concurrent.futures import BrokenExecutor, CancelledError
from itertools import count
from typing import TYPE_CHECKING, Any

from twostage.base.runner import Runner
from twostage.running.processes import is_dask, received, sent, start_processes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from twostage.base.as_completed import AsCompleted
    from twostage.base.records import Call
    from twostage.base.runner import Clock, Work

__all__ = ["ExecutorRunner"]


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

    def __init__(self, work: Work, executor: Executor, completions: AsCompleted, clock: Clock) -> None:
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
