"""Refused batches are split in two, until a bad item stands alone: how far that may go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from twostage.base.records import Batch
from twostage.failing.clients import status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Halves", "Splits", "halves", "refuses_batch"]

BAD_REQUEST = 400
CONTENT_TOO_LARGE = 413
UNPROCESSABLE_CONTENT = 422


def refuses_batch(error: Exception) -> bool:
    """Whether `error` says that the call's content is at fault, so that a part of it may do better."""
    # No subclass of ValueError: certificates, JSON and Unicode have some, and so have we.
    return type(error) is ValueError or status_of(error) in {
        BAD_REQUEST,
        CONTENT_TOO_LARGE,
        UNPROCESSABLE_CONTENT,
    }


def halves(members: Sequence[Any]) -> list[Sequence[Any]]:
    """Returns the two halves of a batch's members, the larger one first; of a single one just that."""
    half = -(-len(members) // 2)
    return [piece for piece in (members[:half], members[half:]) if piece]


class Halves:
    """The two halves of a batch.

    Attributes:
        size: How many members the larger one has.
        unanswered: How many of the two must still be answered to show that `size` is not too large, as
            the whole was; infinite if it was refused for another reason.
    """

    __slots__ = ("size", "unanswered")

    def __init__(self, size: int, unanswered: float) -> None:
        self.size = size
        self.unanswered = unanswered


class Splits:
    """Which of a stage's refused batches are split.

    A bad item is found by two calls for each halving. But a bug, or a wrong parameter, would cost 199
    calls for each batch of 100: so until the stage has had an item accepted, one batch is split at a time
    and others that are refused wait for what becomes of it.

    Args:
        refuses: Whether a failure asks for a split.

    Attributes:
        accepted: Whether the stage has had an item accepted.
        hopeless: Whether a batch was split to its end, and not one of its items was accepted.
        tainted: Whether an item of that batch ended otherwise than by being refused.
        pieces: What is left of the one batch that is being split before any item was accepted.
        waiting: Batches that wait for what becomes of it, each with the failure it had.
    """

    def __init__(self, refuses: Callable[[Exception], bool]) -> None:
        self.refuses = refuses
        self.accepted = False
        self.hopeless = False
        self.tainted = False
        self.pieces: set[Batch] = set()
        self.waiting: list[tuple[Batch, Exception]] = []

    def allows(self, batch: Batch) -> bool | None:
        """Returns whether a refused batch may be split; `None`: that will be seen, it is to wait."""
        if self.accepted or batch.half_of is not None:
            return True
        if self.hopeless:
            return False
        if self.pieces:
            return None
        self.tainted = False
        return True

    def split(self, batch: Batch, error: Exception) -> list[Batch]:
        """Returns the two calls that a batch becomes, for the failure it had."""
        first, second = halves(batch.members)
        too_large = status_of(error) == CONTENT_TOO_LARGE
        of = Halves(len(first), unanswered=2 if too_large else math.inf)
        pieces = [Batch(first, of), Batch(second, of)]
        self.pieces.update(pieces)
        return pieces

    def ended(self, batch: Batch, *, accepted: bool) -> int | None:
        """Learns from what became of a batch, if it is not to be tried again or split.

        Returns:
            The size that batches are to have from now on, if they were too large for the API.
        """
        of = batch.half_of
        if not accepted:
            if of is not None and not (self.accepted or self.pieces):
                self.hopeless = not self.tainted  # an outage, or tokens that have expired, say nothing
            return None
        if not self.accepted:
            self.accepted = True
            self.pieces.clear()
        if of is None:
            return None
        batch.half_of = None
        of.unanswered -= 1
        return None if of.unanswered else of.size

    def take_waiting(self) -> list[tuple[Batch, Exception]]:
        """Returns the batches that wait, which do so no longer."""
        waiting, self.waiting = self.waiting, []
        return waiting
