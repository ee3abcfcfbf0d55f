"""The library's own exceptions; all other exceptions are the caller's functions'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twostage.base.words import FUNCTIONS, STAGES, brief

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

__all__ = [
    "AttemptTimeout",
    "BatchLengthError",
    "JournalError",
    "MissingToken",
    "RecordedFailure",
    "RunTimeout",
    "TooManyFailures",
]


class BatchLengthError(ValueError):
    """A batch call returned another number of answers than it got items (at stage two: tokens).

    Which belongs to which is then anybody's guess, so all items of the batch fail.

    Attributes:
        expected: The number of items or tokens that the call got.
        returned: The number of answers that it returned.
    """

    def __init__(self, expected: int, returned: int, function: str = "fetch_token") -> None:
        super().__init__(expected, returned, function)
        self.expected = expected
        self.returned = returned

    def __str__(self) -> str:
        function = self.args[2]
        takes, gives = FUNCTIONS[function]
        return (
            f"{function} got {self.expected} {takes}s and returned {self.returned} {gives}s; "
            f"it must return one {gives} for each {takes}, in the {takes}s' order"
        )


class MissingToken(LookupError):  # noqa: N818 - the name says it
    """A batch call answered with a mapping in which an item (at stage two: a token) is no key.

    The item fails alone, and is not asked for again unless `retry_missing` is on: many APIs leave out
    what does not exist.
    """


class RunTimeout(TimeoutError):  # noqa: N818 - a timeout, as its base
    """The run's `timeout` had passed before an item was done, or before the source was at its end."""


class AttemptTimeout(TimeoutError):  # noqa: N818 - as above
    """An attempt took longer than its stage's `attempt_timeout`, and was given up."""


class TooManyFailures(RuntimeError):  # noqa: N818 - the name says it
    """More items failed than `max_failures` allows. Its `__cause__` is the last one's failure.

    Attributes:
        outcomes: From `run_two_stage`: those of the items that were done, in the items' order. (A stream
            has handed them over.)
    """

    outcomes: Sequence[Any] = ()


class JournalError(RuntimeError):
    """A journal can't be opened, read or written, or is another job's; the text says which and why.

    What was handed over before is recorded, and another run goes on from there.
    """


class RecordedFailure(Exception):  # noqa: N818 - the name says it
    """Stands for the failure that an item had in an earlier run, as its journal has it.

    Attributes:
        item: The item's key: itself, if `key` did not say otherwise.
        place: Of the token among those of its item, if items have many.
        stage: At which it failed, 1 or 2.
        type_name: The exception's class, as "HTTPStatusError".
        status: The HTTP status that it carried, or `None`.
        time: When it was recorded, in UTC.
        text: What `str` made of it, if `Journal(texts=True)` had asked for that.
    """

    def __init__(
        self,
        item: object,
        place: int | None,
        stage: int,
        type_name: str,
        status: int | None,
        time: datetime,
        text: str | None = None,
    ) -> None:
        super().__init__(item, place, stage, type_name, status, time, text)
        self.item = item
        self.place = place
        self.stage = stage
        self.type_name = type_name
        self.status = status
        self.time = time
        self.text = text

    def __str__(self) -> str:
        what = self.type_name if self.status is None else f"{self.type_name}, status {self.status}"
        return f"{STAGES[self.stage]} failed at {self.time:%Y-%m-%d %H:%M:%S} UTC: {what}"

    def __repr__(self) -> str:
        return f"<RecordedFailure of item {brief(self.item)}: {self}>"  # the text often holds a URL
