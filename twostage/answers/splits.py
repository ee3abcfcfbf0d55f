"""Refused batches are split in two, until a bad item stands alone: how far that may go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from twostage.base.checks import failure_test
from twostage.base.records import Batch, Halves
from twostage.failing.clients import status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.base.checks import Failures
    from twostage.base.records import Call
    from twostage.core.coordinator import Coordinator
    from twostage.core.lines import Line

__all__ = ["Splits", "halves", "refuses_batch"]

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
        self._refuses = refuses
        self.accepted = False
        self.hopeless = False
        self.tainted = False
        self.pieces: set[Batch] = set()
        self.waiting: list[tuple[Batch, Exception]] = []

    @classmethod
    def of(cls, bisect: bool | Failures) -> Splits | None:  # noqa: FBT001 - a stage's setting, as it was given
        """Returns what `bisect` asks for."""
        if bisect is False:
            return None
        return cls(refuses_batch if bisect is True else failure_test(bisect, "bisect"))

    def attach(self, job: Coordinator, line: Line) -> None:
        """Is of that line, in that job."""
        self._job = job
        self._line = line

    def takes(self, batch: Call, members: Sequence[Any], error: Exception) -> bool:
        """Splits a batch that was refused, or keeps it until it is seen whether that is worth it.

        Returns:
            Whether it does; if not, its failure is final.
        """
        if not self._refuses(error):
            self.tainted = True
            return False
        assert isinstance(batch, Batch)  # noqa: S101 - for the type checker
        if len(members) <= 1:
            return False
        if not self.accepted and batch.half_of is None:
            if self.hopeless:
                return False
            if self.pieces:
                self.waiting.append((batch, error))
                return True
            self.tainted = False
        self._line.due.extendleft(reversed(self._split(batch, error)))  # before what a pause has taken back
        return True

    def _split(self, batch: Batch, error: Exception) -> list[Batch]:
        first, second = halves(batch.members)
        too_large = status_of(error) == CONTENT_TOO_LARGE
        of = Halves(len(first), unanswered=2 if too_large else math.inf)
        pieces = [Batch(first, of), Batch(second, of)]
        self.pieces.update(pieces)
        return pieces

    def ended(self, batch: Batch, *, accepted: bool) -> None:
        """Learns from what became of a batch."""
        if batch.is_delayed:
            batch.is_delayed = False
        else:
            self.pieces.discard(batch)
        self._learn(batch, accepted=accepted)
        self._look()

    def _learn(self, batch: Batch, *, accepted: bool) -> None:
        of = batch.half_of
        if not accepted:
            if of is not None and not (self.accepted or self.pieces):
                self.hopeless = not self.tainted  # an outage, or tokens that have expired, say nothing
            return
        if not self.accepted:
            self.accepted = True
            self.pieces.clear()
        if of is not None:
            batch.half_of = None
            of.unanswered -= 1
            if not of.unanswered:
                self._shrink(of.size)

    def refused_by_gate(self, batch: Batch) -> None:
        """Hears that a batch will never begin, from which nothing is learnt."""
        self.pieces.discard(batch)
        self.tainted = True
        self._look()

    def _look(self) -> None:
        """Has those that wait go on, if nothing is being split."""
        for batch, error in [] if self.pieces else self.take_waiting():
            if not self.takes(batch, batch.members, error):
                self._job.fail(self._line, batch, batch.members, error)

    def take_waiting(self) -> list[tuple[Batch, Exception]]:
        """Returns the batches that wait, which do so no longer."""
        waiting, self.waiting = self.waiting, []
        return waiting

    def _shrink(self, size: int) -> None:
        """Has no call begin that is larger than `size`, not even one that was handed over."""
        line = self._line
        assert line.batch_size is not None  # noqa: S101 - for the type checker
        if size >= line.batch_size:
            return
        line.batch_size = size
        handed = [*line.take_back(), *line.due]  # those that are due too, if a gate took them back
        line.due.clear()
        for call in reversed(handed):
            if call.attempts or cast("Batch", call).half_of is not None:
                line.due.appendleft(call)
                continue
            for member in reversed(cast("Batch", call).members):
                if line is self._job.lines[0] and member.outcome.token_attempts:  # it had a token already
                    line.back.appendleft(member)
                    continue
                line.waiting.appendleft(member)
                if line is self._job.lines[0]:
                    self._job.enter(-1)  # there it is in progress once it has left
