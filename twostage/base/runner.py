"""What a runner is: where a stage's attempts run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor
    from contextlib import AbstractAsyncContextManager
    from contextvars import Context

    from twostage.base.as_completed import Handler
    from twostage.base.records import Call

__all__ = ["Clock", "Runner", "Work"]

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
