"""Items of equal key: the first one is asked for, and the others get what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from twostage.base.options import JobOptions
    from twostage.base.records import Outcome
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome

__all__ = ["Twins"]


class Twins:
    """Knows which items are equal.

    Attributes:
        keys: Of the first ones, by their index.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Hashable] = {}
        self._firsts: dict[Hashable, Outcome[Any, Any, Any]] = {}
        self._waiting: dict[int, list[Outcome[Any, Any, Any]]] = {}  # for each first one that is not done

    @classmethod
    def of(cls, options: JobOptions) -> Twins | None:
        """Returns what is needed if items have keys."""
        return None if options.key is None and options.journal is None else cls()

    def sorts_out(self, job: Coordinator) -> None:
        """Has items that are read be asked for once for each key."""

        def read(outcomes: list[AnyOutcome], keys: Sequence[Hashable] | None) -> list[AnyOutcome]:
            if keys is None:
                return outcomes
            new, known = self.sort(outcomes, keys)
            for twin in known:
                job.hand_over(twin)
            return new

        job.hears.read.append(read)

    def hands_over(self, job: Coordinator) -> None:
        """Has those that wait for an equal item be done when that one is."""

        def done(first: AnyOutcome) -> None:
            for twin in self.done(first):
                job.hand_over(twin)

        job.hears.done.append(done)

    def sort(
        self, outcomes: Iterable[Outcome[Any, Any, Any]], keys: Sequence[Hashable]
    ) -> tuple[list[Outcome[Any, Any, Any]], list[Outcome[Any, Any, Any]]]:
        """Returns the items to be asked for, and those whose answer is there; the others wait for theirs."""
        new, done = [], []
        for outcome, key in zip(outcomes, keys, strict=True):
            first = self._firsts.setdefault(key, outcome)
            if first is outcome:
                self.keys[first.index] = key
                self._waiting[first.index] = []
                new.append(first)
            elif (waiting := self._waiting.get(first.index)) is not None:
                waiting.append(outcome)
            else:
                outcome.copy(first)
                done.append(outcome)
        return new, done

    def done(self, first: Outcome[Any, Any, Any]) -> list[Outcome[Any, Any, Any]]:
        """Returns the items that have waited for this one, and now have what it has."""
        twins = self._waiting.pop(first.index, [])
        for twin in twins:
            twin.copy(first)
        return twins

    def forget(self, index: int) -> None:
        """Has the next item that is equal to this one be asked for anew."""
        if index in self.keys:
            del self._firsts[self.keys.pop(index)]
