"""What was read of the source, and how much more of it is wanted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from twostage.core.handover import HandOver

__all__ = ["Reading"]


class Reading:
    """Counts what was read.

    Args:
        size: How many items are read at once.
        window: How many may be read and not handed over; one of many tokens counts as many.
        handing: Knows how many were.

    Attributes:
        number: How many items were read.
        asked: How many more are wanted.
        ended: Whether no more will come.
        leaving: Whether the source is to be read no more.
        left: Whether it is not, though it may have had more.
    """

    def __init__(self, size: int, window: int, handing: HandOver, linger: float | None = None) -> None:
        self._linger = math.inf if linger is None else linger
        self.size = size
        self.window = window
        self.number = 0
        self.asked = 0
        self.ended = False
        self.leaving = False
        self.left = False
        self._handing = handing

    def took(self, items: int) -> int:
        """Hears of items that were wanted; returns the first one's index."""
        first = self.number
        self.number += items
        self.asked -= items
        return first

    def end(self) -> None:
        """Hears that no more items will come."""
        self.ended = True
        self.asked = 0

    def leave(self) -> None:
        """Hears that nobody reads on, though the source is not at its end."""
        if not self.ended:
            self.left = True
            self.end()

    def begin_to_wait(self, outcomes: Iterable[Any], now: float) -> None:
        """Hears of items that wait for others, to fill a batch."""
        if self._linger < math.inf:
            for outcome in outcomes:
                outcome.began = now  # until its stage two begins

    def leaves_at(self, waiting: Sequence[Any]) -> float:
        """Returns when the first of the items that wait has lingered for others for long enough."""
        return waiting[0].began + self._linger if waiting and self._linger < math.inf else math.inf

    def fills(self, room: int, waiting: Sequence[Any], now: float) -> bool:
        """Whether items that wait are to wait for more of them, until they fill a batch."""
        if self.ended or not (self.asked or room >= self.size):
            return False
        return self._linger == math.inf or self.leaves_at(waiting) > now

    @property
    def room(self) -> int:
        """How many items may be read beyond those asked for; below 0 if tokens fill the window."""
        return self.window - (self.number + self.asked - self._handing.taken + self._handing.surplus_tokens)

    def ask(self, stock: int) -> int:
        """Asks for as many more batches as there is room for, whole ones; returns how many.

        Args:
            stock: How many items may be read and not started.
        """
        if self.ended or self.leaving:
            return 0
        batches = max(0, min((stock - self.asked) // self.size, self.room // self.size))
        self.asked += batches * self.size
        return batches
