"""What the rows of a journal's file say."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

from twostage.errors import RecordedFailure
from twostage.journal.values import read_json

__all__ = ["Identity", "Row", "moment"]


class Row(NamedTuple):
    """What is recorded of an item, or of one of its tokens: the columns of `answers`."""

    key: str
    place: int
    size: int | None
    token: str | bytes | None
    token_at: float | None
    result: str | bytes | None
    at: float | None
    stage: int | None
    failure: str | None
    status: int | None
    passing: int | None
    text: str | None

    @property
    def item(self) -> Any:  # noqa: ANN401 - what JSON can say
        """The item's key."""
        return read_json(self.key)

    @property
    def token_place(self) -> int | None:
        """The token's place, if items may have many."""
        return None if self.size is None else self.place

    @property
    def recorded_failure(self) -> RecordedFailure:
        """The failure, of a row that has one."""
        assert self.stage is not None and self.failure is not None and self.at is not None  # noqa: PT018, S101 - for the type checker
        return RecordedFailure(
            self.item, self.token_place, self.stage, self.failure, self.status, moment(self.at), self.text
        )


def moment(seconds: float) -> datetime:
    """Returns a time that was recorded, in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


class Identity(NamedTuple):
    """Whose answers a file holds: the columns of `job`. To check that, what is `None` may be anything.

    Attributes:
        job: The job's name.
        version: Of the answers; empty for none.
        many: 1 if items may have many tokens, else 0.
        encode: 1 if the user's function writes values, else 0.
    """

    job: str | None
    version: str | None
    many: int | None
    encode: int | None
