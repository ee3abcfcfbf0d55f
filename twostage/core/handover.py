"""Outcomes on their way to the consumer: into a list, as they complete, or in the items' order."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from twostage.base.records import Outcome
from twostage.errors import TooManyFailures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from twostage.base.options import JobOptions


__all__ = ["AnyOutcome", "HandOver"]

AnyOutcome: TypeAlias = Outcome[Any, Any, Any]


class HandOver:
    """Takes each outcome that is done, and knows which of them the consumer has not taken yet.

    Args:
        results: The list to put results in, if nobody takes outcomes one by one.
        whole: Whether the list takes the outcomes themselves, until the end.
        ordered: Whether outcomes are handed over in the items' order.
        forget: Is told the index of each outcome that was taken, if it matters which they are.
        many: Whether an item can have many tokens, of which a surplus is kept.

    Attributes:
        add: Takes an outcome.
        ready: Outcomes to be handed over with the next message.
        not_taken: How many were handed over, or will be next, and are not known to be taken.
        taken: How many are.
        surplus_tokens: How many tokens the items whose outcomes were not taken have beyond one each.
    """

    def __init__(
        self,
        *,
        results: list[Any] | None = None,
        whole: bool = False,
        ordered: bool,
        forget: Callable[[int], None] | None,
        many: bool,
    ) -> None:
        self.results = results
        self.ready: list[AnyOutcome] = []
        self.not_taken = 0
        self.taken = 0
        self.surplus_tokens = 0
        self._whole = whole
        self.add: Callable[[AnyOutcome], None] = (
            self._place if results is not None else self._hold if ordered else self._release
        )
        self._forget = forget
        self._surplus: dict[int, int] = {}  # by the item's index
        self._held: dict[int, AnyOutcome] = {}  # done, and waiting for those before them
        self._next_index = 0  # of the outcome that is handed over next, if ordered
        # Indices of those that are not taken, if it matters which they are.
        self._untaken: deque[int] | None = (
            deque() if results is None and (many or forget is not None) else None
        )

    def _place(self, outcome: AnyOutcome) -> None:
        assert self.results is not None  # noqa: S101 - for the type checker
        self.results[outcome.index] = outcome if self._whole else _value_of(outcome)
        self.taken += 1
        if self._surplus:
            self.forget_surplus(outcome.index)

    def _release(self, outcome: AnyOutcome) -> None:
        self.ready.append(outcome)
        self.not_taken += 1
        if self._untaken is not None:
            self._untaken.append(outcome.index)

    def _hold(self, outcome: AnyOutcome) -> None:
        self._held[outcome.index] = outcome
        while (following := self._held.pop(self._next_index, None)) is not None:
            self._release(following)
            self._next_index += 1

    @classmethod
    def of(
        cls,
        options: JobOptions,
        results: list[Any] | None,
        *,
        forget: Callable[[int], None] | None,
        many: bool,
    ) -> HandOver:
        """Returns what hands over as it was asked for."""
        whole = options.max_failures is not None
        return cls(results=results, whole=whole, ordered=options.ordered, forget=forget, many=many)

    def expect(self, items: int) -> None:
        """Hears of items that were read: the list has a place for each."""
        if self.results is not None:
            self.results.extend([None] * items)

    def release_held(self, before: float) -> None:
        """Lets go what waits for outcomes that will never come, up to an index."""
        for index in sorted(self._held):
            if index < before:
                self._release(self._held[index])
        self._held.clear()

    def recorded(self, indices: Iterable[int]) -> None:
        """Hears of outcomes that a journal has, so that equal items find them there."""
        if self.results is not None and self._forget is not None:  # in a stream they do when they are taken
            for index in indices:
                self._forget(index)

    def discard(self, indices: Iterable[int]) -> None:
        """Drops what would be handed over next, or is held: as it could not be recorded."""
        self.ready.clear()
        self._held.clear()
        if self.results is not None:
            for index in indices:
                self.results[index] = None

    def finish(self, error: BaseException | None) -> None:
        """Gives the list its last form; if there were too many failures their error gets what is done."""
        results, self.results = self.results, None
        if not self._whole or results is None:
            return
        if isinstance(error, TooManyFailures):
            error.outcomes = [outcome for outcome in results if outcome is not None]
            return
        for index, outcome in enumerate(results):  # one by one, or all threads wait while they are freed
            if outcome is not None:  # as when nobody wants the list any more
                results[index] = _value_of(outcome)

    def take_ready(self) -> list[AnyOutcome]:
        """Returns what is to be handed over now."""
        ready, self.ready = self.ready, []  # a new list: the other thread has the old one
        return ready

    def took(self, number: int) -> None:
        """Hears that the consumer has so many more."""
        self.taken += number
        self.not_taken -= number
        if self._untaken is not None:
            for _ in range(number):
                index = self._untaken.popleft()
                self.forget_surplus(index)
                if self._forget is not None:
                    self._forget(index)

    def add_surplus(self, index: int, tokens: int) -> None:
        """Hears that an item has so many tokens beyond one."""
        self._surplus[index] = tokens
        self.surplus_tokens += tokens

    def forget_surplus(self, index: int) -> None:
        """Hears that an item's tokens count no more."""
        self.surplus_tokens -= self._surplus.pop(index, 0)


def _value_of(outcome: AnyOutcome) -> Any:  # noqa: ANN401 - whatever the user's results are
    return outcome.result if outcome.exception is None else outcome.exception
