"""APIs that ask for a pause, are down for a while, or take only so many calls at once; in virtual time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from twostage.testing import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fakes import Fake, Made

    from twostage.testing import VirtualTime


class AnsweredError(ApiError):
    """An answer with a status and headers."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.headers = {} if headers is None else headers


def asking(seconds: float, status: int = 429) -> AnsweredError:
    """Returns an answer that asks to wait."""
    return AnsweredError(status, {"Retry-After": str(seconds)})


def first_of(argument: Any) -> Any:  # noqa: ANN401 - an item, a token, or a batch of them
    return argument[0] if isinstance(argument, list) else argument


def failing(
    failures: dict[Any, Iterable[Exception]], fetch: Callable[[Any], Any] = lambda argument: argument
) -> Callable[[Any], Any]:
    """Makes a function that gives back what it takes, once the failures of (the first of) that are over."""
    left = {argument: iter(errors) for argument, errors in failures.items()}

    def answer(argument: Any) -> Any:  # noqa: ANN401 - items and tokens of any kind
        error = next(left.get(first_of(argument), iter(())), None)
        if error is not None:
            raise error
        return fetch(argument)

    return answer


class Outages:
    """Gives back what it takes, but not at some times.

    Args:
        virtual: The time.
        times: When it is down: from when until when.
        error: What it raises then.
    """

    def __init__(
        self,
        virtual: VirtualTime,
        *times: tuple[float, float],
        error: Callable[[], Exception] = ConnectionRefusedError,
    ) -> None:
        self.virtual = virtual
        self.times = times
        self.error = error

    def is_down(self) -> bool:
        return any(since <= self.virtual.now < until for since, until in self.times)

    def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - as above
        if self.is_down():
            raise self.error()
        return argument


def starts(fake: Fake, since: float = -math.inf, until: float = math.inf) -> list[float]:
    """Returns when calls began, of those from `since` on and before `until`."""
    return sorted(made.began for made in fake.calls if since <= made.began < until)


def most_at_once(calls: Iterable[Made]) -> int:
    """Returns how many of the calls ran at the same time; one that ends makes room at once."""
    changes = sorted(change for made in calls for change in ((made.began, 1), (made.ended, -1)))
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def answered_between(fake: Fake, since: float, until: float) -> int:
    return sum(since <= made.ended < until for made in fake.calls if not made.failed)
