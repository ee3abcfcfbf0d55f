"""What a journal is to have of a shard: kept there, and written where the file is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twostage.journal.recorder import Found, Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from twostage.core.handover import AnyOutcome
    from twostage.journal.journal import Journal
    from twostage.journal.recorder import Rows
    from twostage.journal.rows import Identity

__all__ = ["RowsKeeper"]


class RowsKeeper(Recorder):
    """Keeps what a journal is to have, for the one who has the file.

    Attributes:
        lots: It, in the order in which it is to be written.
    """

    def __init__(self, journal: Journal, identity: Identity, keys: dict[int, str]) -> None:
        super().__init__(journal, identity, keys)
        self.lots: list[Rows] = []

    def open(self) -> None:
        """Has no file."""

    def find(self, outcomes: Iterable[AnyOutcome]) -> Found:
        """Knows of nothing: what is recorded does not travel."""
        return Found(list(outcomes), [], [], [], [])

    def commit(self) -> None:
        """Keeps what was heard of since the last time."""
        if (rows := self.take_rows()) is not None:
            self.lots.append(rows)

    def is_whole(self, index: int) -> bool:
        """Leaves that to be asked where the file is."""
        del index
        return True

    @property
    def partial(self) -> set[int]:
        """The indices of items of which a part is not recorded as an answer."""
        return self._partial
