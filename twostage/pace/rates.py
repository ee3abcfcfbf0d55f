"""Rates, and attempts that hang: what may hold a stage's starts back whatever its API says."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from twostage.base.checks import check_function, is_number, positive_seconds
from twostage.base.gate import Gate, Refused
from twostage.base.words import brief, without_our_frames
from twostage.errors import AttemptTimeout

if TYPE_CHECKING:
    from twostage.base.records import Call
    from twostage.base.runner import Runner

__all__ = ["HungGate", "Rate", "RateGate", "Rates", "rates_of"]


@dataclass(frozen=True)
class Rate:
    """At most `limit` starts in any `per` seconds, or starts that weigh so much together.

    A start counts from when the attempt begins in its thread; on an executor of processes from when it is
    passed on to them.

    Args:
        limit: How many, or how much.
        per: Seconds.
        cost: Takes what the stage's function is about to be called with; returns what that weighs, such as
            its number of model tokens. Default: each start weighs 1.
        settle: Takes the same, and what the function returned; returns what the call has really weighed.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A number is out of range.

    >>> Rate(300_000, per=60, cost=lambda prompt: len(prompt) // 4 + 500)
    Rate(limit=300000, per=60)
    """

    limit: float
    per: float = 60.0
    cost: Callable[[Any], float] | None = field(default=None, repr=False)  # a partial shows its arguments
    settle: Callable[[Any, Any], float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        limit: object = self.limit
        if not is_number(limit):
            raise TypeError(f"limit is {limit!r}; expected a number")
        positive_seconds(self.per, "per")
        for name in ("cost", "settle"):
            function = getattr(self, name)
            if function is not None:
                check_function(function, name)
        least = 1 if self.cost is None else 0
        if not (least <= limit <= sys.float_info.max and limit > 0):
            raise ValueError(
                f"limit is {brief(limit)}; expected "
                + ("a number above 0" if least == 0 else "at least 1: for slower rates raise per")
            )


Rates: TypeAlias = float | Rate | Sequence[float | Rate] | None
"""A number of starts a second, a `Rate`, or several of them."""


def rates_of(rate: object, name: str) -> tuple[Rate, ...]:
    """Returns the rates that `rate` stands for.

    Raises:
        TypeError: It is none.
        ValueError: It is a number that is not above 0.
    """
    if rate is None:
        return ()
    if isinstance(rate, Rate):
        return (rate,)
    if isinstance(rate, Sequence) and not isinstance(rate, str | bytes):
        return tuple(one for part in rate for one in rates_of(part, name))
    if not is_number(rate):
        raise TypeError(f"{name} is {rate!r}; expected a number of starts a second, a Rate, or several")
    if not 0 < rate <= sys.float_info.max:
        raise ValueError(f"{name} is {brief(rate)}; expected a number of starts a second above 0")
    number = float(rate)
    return (Rate(number, per=1) if number.is_integer() else Rate(1, per=1 / number),)


@dataclass(slots=True)
class _Start:
    """What one start weighs, and when it was: once the attempt has ended, or else its call knows."""

    call: Call | None
    cost: float
    began: float  # or handed over


class RateGate(Gate):
    """Keeps a rate: no window of its length ever sees more begin than its limit.

    It remembers each start of the last window (a sliding log, exact, of at most `limit` entries), and counts
    from when the attempt really began, in its worker, not from when it was handed over.

    Args:
        rate: The rate.
        argument: Takes a call; returns what the stage's function will be given.
    """

    def __init__(self, rate: Rate, argument: Callable[[Any], Any]) -> None:
        self._rate = rate
        self._argument = argument
        self._starts: deque[_Start] = deque()
        self._running: dict[Call, _Start] = {}
        self._used = 0.0
        self._asked: tuple[Call, float] | None = None  # the call that waits here, and what it weighs

    def when_may_start(self, now: float, runner: Runner, call: Call | None = None) -> float:  # noqa: ARG002 - a gate's
        self._forget(now)
        cost = (0.0 if self._rate.cost else 1.0) if call is None else self._cost(call)
        excess = self._used + cost - self._rate.limit
        if excess <= 0:
            return now
        free = now
        for start in self._starts:
            free = max(free, _began(start, now) + self._rate.per)
            excess -= start.cost
            if excess <= 0:
                break
        return free  # when all have left the window, rounding or not, none is left to wait for

    def _cost(self, call: Call) -> float:
        if self._rate.cost is None:
            return 1.0
        if self._asked is None or self._asked[0] is not call:
            try:
                cost = _weight(self._rate.cost(self._argument(call)), "cost")
                if cost > self._rate.limit:
                    raise ValueError(f"the call weighs {cost:g}, and its rate allows {self._rate.limit:g}")  # noqa: TRY301
            except Exception as error:  # noqa: BLE001 - it is the call's failure
                raise Refused from without_our_frames(error)
            self._asked = (call, cost)
        return self._asked[1]

    def started(self, call: Call, now: float) -> None:
        start = self._running[call] = _Start(call, self._cost(call), now)
        self._asked = None
        self._used += start.cost
        self._starts.append(start)

    def taken_back(self, call: Call) -> None:
        start = self._running.pop(call)
        start.call = None
        self._weigh(start, 0.0)

    def ended(self, call: Call, answer: object, error: BaseException | None, now: float) -> None:
        start = self._running.pop(call)
        start.call, start.began = None, call.began  # nothing of a call is kept until its window has passed
        if error is None and self._rate.settle is not None:
            cost = _weight(self._rate.settle(self._argument(call), answer), "settle")
            if start.began + self._rate.per > now:  # else it weighs nothing any more
                self._weigh(start, cost)

    def _weigh(self, start: _Start, cost: float) -> None:
        self._used += cost - start.cost
        start.cost = cost

    def _forget(self, now: float) -> None:
        while self._starts and _began(self._starts[0], now) + self._rate.per <= now:
            self._weigh(self._starts.popleft(), 0.0)
        if not self._starts:
            self._used = 0.0  # no rounding is carried on


def _began(start: _Start, now: float) -> float:
    if start.call is None:
        return start.began
    return start.call.began if start.call.began >= start.began else now  # not begun: then not before now


def _weight(cost: object, name: str) -> float:
    if not is_number(cost) or not 0 <= cost <= sys.float_info.max:
        raise ValueError(f"{name} returned {brief(cost)}; expected a number of at least 0")
    return float(cost)


class HungGate(Gate):
    """Starts nothing while as many attempts as there are workers were given up and run on.

    Args:
        name: What messages call the stage.
        workers: How many.
        patience: For how many seconds that may be so before the job ends; `None`: for ever.
        keep_places: Whether each of them keeps its place, so that fewer others may run.
    """

    def __init__(self, name: str, workers: int, patience: float | None, *, keep_places: bool = False) -> None:
        self._name = name
        self._workers = workers
        self._patience = math.inf if patience is None else patience
        self._keep_places = keep_places
        self._since: float | None = None

    def when_may_start(self, now: float, runner: Runner, call: Call | None = None) -> float:  # noqa: ARG002 - a gate's
        if runner.given_up < self._workers:
            self._since = None
            full = self._keep_places and runner.out + runner.given_up >= self._workers
            return math.inf if full else now
        if self._since is None:
            self._since = now
        until = self._since + self._patience
        return until if now < until else math.inf

    def check_patience(self, now: float, runner: Runner) -> None:
        if runner.given_up < self._workers:
            self._since = None
        elif self._since is not None and self._since + self._patience <= now:
            raise AttemptTimeout(
                f"{self._name}: {runner.given_up} attempts were given up and have not ended for "
                f"{self._patience:g} s, so no worker is left; give the client a timeout of its own"
            )
