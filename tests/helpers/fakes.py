"""A function that stands for an API's and keeps what it was asked, and what jobs with it came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from twostage import Outcome, Stage, iter_two_stage
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

in_virtual_time = pytest.mark.usefixtures("virtual")  # for tests that do not look at the time

AnyOutcome: TypeAlias = Outcome[Any, Any, Any]


class ExpiredError(Exception):
    """A failure of a user's own, that no policy tries again by default."""


@dataclass
class Made:
    """A call that was made: what it was asked, and in virtual time when."""

    argument: Any
    began: float
    ended: float = 0.0
    failed: bool = True

    @property
    def size(self) -> int:
        return len(self.argument)


class Fake:
    """Takes `latency` seconds over each call and then answers as `answer` does."""

    def __init__(
        self,
        answer: Callable[[Any], Any],
        latency: float | Callable[[Any], float] = 0.0,
        *,
        virtual: VirtualTime | None = None,
    ) -> None:
        self.answer = answer
        self.latency = latency
        self.virtual = virtual
        self.calls: list[Made] = []

    def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - items and tokens of any kind
        made = Made(argument.copy() if isinstance(argument, list) else argument, self._now())
        self.calls.append(made)
        latency = self.latency(argument) if callable(self.latency) else self.latency
        if latency:
            sleep(latency)
        made.ended = self._now()
        answer = self.answer(argument)
        made.failed = False
        return answer

    def _now(self) -> float:
        return 0.0 if self.virtual is None else self.virtual.now

    @property
    def asked(self) -> list[Any]:
        """What the calls were made with, in the order in which they began."""
        return [made.argument for made in self.calls]

    @property
    def asked_items(self) -> list[Any]:
        """The same for a function that takes batches: the items or tokens in them."""
        return [one for made in self.calls for one in made.argument]

    @property
    def sizes(self) -> list[int]:
        return [made.size for made in self.calls]


class Array:
    """As numpy's arrays: sized and iterable, registered as nothing, and neither true nor false."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __bool__(self) -> bool:
        raise ValueError("The truth value of an array with more than one element is ambiguous")


def stage(fetch: Callable[..., Any], **settings: Any) -> Any:  # noqa: ANN401 - of any items, for any job
    return Stage(fetch, **settings)


def each(answer: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """Makes a function that takes a batch out of one that takes an item."""
    return lambda batch: [answer(one) for one in batch]


def refusing(bad: set[Any], error: Callable[[], Exception] = lambda: ApiError(400)) -> Any:  # noqa: ANN401
    """Makes a function that takes a batch of numbers or texts, but none with a bad one in it."""

    def answer(batch: list[Any]) -> list[str]:
        if not bad.isdisjoint(batch):
            raise error()
        return [f"<{one}>" for one in batch]

    return answer


def outcomes_of(*arguments: Any, **settings: Any) -> list[AnyOutcome]:  # noqa: ANN401 - any job
    """Returns a job's outcomes in order, the failed ones among them."""
    with iter_two_stage(*arguments, ordered=True, return_exceptions=True, **settings) as outcomes:
        return list(outcomes)


def notes(error: BaseException | None) -> list[str]:
    return list(getattr(error, "__notes__", []))
