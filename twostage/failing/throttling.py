"""How long an API asks to wait: told by its answer's headers, or by the user's function."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from tenacity.wait import wait_base, wait_random_exponential

from twostage.base.checks import is_number
from twostage.base.words import brief
from twostage.failing.clients import causes, classified, headers_of, status_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity import RetryCallState

__all__ = ["FIRST_WAIT", "LONGEST_PAUSE", "LONGEST_WAIT", "Throttled", "retry_after", "wait_retry_after"]

# Full jitter, as https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter finds best.
# Ten attempts of it wait 22 s on average: enough for a restart or a deployment of the API.
FIRST_WAIT = 0.1
LONGEST_WAIT = 20.0

LONGEST_PAUSE = 300.0
"""How many seconds an answer can make us wait: one that asks for a day may come from a wrong clock."""

MILLISECONDS = re.compile(r"[0-9]+(\.[0-9]*)?")


class Throttled(Exception):  # noqa: N818 - the name says it
    """Raise it where a limit says to wait and there is no HTTP answer that does: a Retry-After by hand.

    Such a limit may be one that many machines share, as a counter in a database. The failure is transient,
    and `wait_retry_after`, which the default policy has, waits for so long.

    Attributes:
        seconds: How long to wait before the next attempt.

    Args:
        seconds: The same.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.

    >>> raise Throttled(2.5)
    Traceback (most recent call last):
        ...
    twostage.failing.throttling.Throttled: to be tried again in 2.5 s
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = _seconds(seconds, "seconds", "a number")
        super().__init__(seconds)

    def __str__(self) -> str:
        return f"to be tried again in {self.seconds:g} s"


class wait_retry_after(wait_base):  # noqa: N801 - as tenacity's own
    """A tenacity wait: as long as the failed call's answer asks for, by `Retry-After` or `retry-after-ms`.

    A `Throttled` asks by its `seconds`. Where nothing is asked for, or 0 seconds, `fallback` decides: an
    API that is down and says 0 would else have used up all attempts within an instant.

    >>> from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed
    >>> from twostage import is_transient
    >>> policy = Retrying(
    ...     retry=retry_if_exception(is_transient),
    ...     stop=stop_after_attempt(5),
    ...     wait=wait_retry_after(wait_fixed(1), max_wait=60),
    ... )

    Args:
        fallback: Another tenacity wait. Default: random waits, exponentially growing from 0.1 s up to 20 s.
        max_wait: How many seconds (or which `timedelta`) an answer can make it wait at most. `fallback` has
            a limit of its own.

    Raises:
        TypeError: `fallback` can't be called, or `max_wait` is neither a number nor a `timedelta`.
        ValueError: `max_wait` is negative or not finite.
    """

    def __init__(
        self,
        fallback: Callable[[RetryCallState], float] | None = None,
        max_wait: float | timedelta = LONGEST_PAUSE,
    ) -> None:
        if fallback is None:
            fallback = wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        if not callable(fallback):
            raise TypeError(f"fallback is {brief(fallback)}; expected a tenacity wait, e.g. wait_fixed(1)")
        self.fallback = fallback
        self.max_wait = _seconds(max_wait, "max_wait", "a number or a timedelta")

    def __call__(self, retry_state: RetryCallState) -> float:
        """Returns the seconds to wait."""
        error = None if retry_state.outcome is None else retry_state.outcome.exception()
        asked = None if error is None else retry_after(error)
        return min(asked, self.max_wait) if asked else self.fallback(retry_state)


def retry_after(error: BaseException) -> float | None:
    """Returns how many seconds the API's answer asks to wait, or `None` if it does not ask.

    The answer is that of the exception, or if that has none, of the one behind it, where `is_transient`
    looks too. `retry-after-ms` (OpenAI's and Azure's) goes before `Retry-After`; what is malformed counts
    as not there. There is no upper limit: that is the caller's business.

    >>> retry_after(Throttled(2.5))
    2.5
    """
    for asked in causes(error):
        if isinstance(asked, Throttled):
            return asked.seconds
        known = classified(asked)
        if known is not None:
            return known.retry_after
        headers = headers_of(asked)
        if headers is not None:
            milliseconds = headers.get("retry-after-ms", "").strip()
            if MILLISECONDS.fullmatch(milliseconds):
                return _finite(milliseconds) / 1000
            return _seconds_of(headers.get("retry-after", "").strip(), headers.get("date", ""))
        if status_of(asked) is not None:
            return None
    return None


def _seconds_of(value: str, date: str) -> float | None:
    """Reads a `Retry-After` (RFC 9110, 10.2.3): a number of seconds, or a date, at least 0 s from `date`."""
    if value.isascii() and value.isdecimal():
        return _finite(value)
    until = _timestamp(value)
    if until is None:
        return None
    now = _timestamp(date)  # the server's, which its dates are right by, however wrong either clock is
    return max(0.0, until - (time.time() if now is None else now))


def _timestamp(date: str) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).timestamp()


def _finite(digits: str) -> float:
    """Reads a number of however many digits: `int` refuses thousands, and `float` makes them infinity."""
    return min(float(digits), sys.float_info.max)


def _seconds(value: object, name: str, expected: str) -> float:
    """Returns a number of seconds, a `timedelta`'s too if `expected` says so."""
    if isinstance(value, timedelta) and "timedelta" in expected:
        value = value.total_seconds()
    if not is_number(value):
        raise TypeError(f"{name} is {brief(value)}; expected {expected}, of at least 0 s")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {brief(value)}; expected {expected}, finite and of at least 0 s")
    return float(value)
