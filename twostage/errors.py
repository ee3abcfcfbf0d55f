"""The library's own exceptions and warnings; all other exceptions are the caller's functions'."""

from __future__ import annotations

import contextlib
import reprlib
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from types import FrameType

    from twostage.base.records import Outcome
    from twostage.failing.transient import Kind

__all__ = [
    "FUNCTIONS",
    "STAGES",
    "AttemptTimeout",
    "BaseRemoteError",
    "BatchLengthError",
    "Classified",
    "JournalError",
    "MissingToken",
    "RecordedFailure",
    "RemoteError",
    "RemoteTraceback",
    "RunTimeout",
    "TooManyFailures",
    "add_note",
    "brief",
    "warn",
    "without_our_frames",
]

ErrorT = TypeVar("ErrorT", bound=BaseException)

FUNCTIONS = {"fetch_token": ("item", "token"), "fetch_result": ("token", "result")}
"""What each function takes, and what it returns for one of them; for messages."""

STAGES = {1: "stage one", 2: "stage two"}


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

    outcomes: Sequence[Outcome[Any, Any, Any]] = ()


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


class Classified(NamedTuple):
    """What was found out about an exception in the process that raised it, where its causes were there too.

    Attributes:
        kind: Of failure.
        late: Whether it says that the answer is late.
        retry_after: How many seconds the API's answer asks to wait.
    """

    kind: Kind
    late: bool
    retry_after: float | None


class BaseRemoteError(BaseException):
    """A `RemoteError` for one that is no `Exception`, and so ends the job."""

    def __init__(self, type_name: str, text: str, status: int | None, known: Classified) -> None:
        super().__init__(type_name, text, status, known)
        self.type_name = type_name
        self.text = text
        self.status = status
        self.retry_after = known.retry_after
        self.known = known

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}"

    def __repr__(self) -> str:
        status = "" if self.status is None else f", status {self.status}"
        return f"<{type(self).__name__} for {self.type_name}{status}>"  # the text often holds a URL


class RemoteError(BaseRemoteError, Exception):
    """Stands for an exception of another process that can't be pickled, or not unpickled.

    It counts as what it stands for: whether it is transient, throttled or an outage, and how long it asks
    to wait. Those are many clients' errors, as `httpx.HTTPStatusError` or `openai.RateLimitError`, whose
    classes want arguments that pickle does not keep.

    Attributes:
        type_name: The exception's class, as "openai.RateLimitError".
        text: What `str` makes of it.
        status: The HTTP status that it carries, or `None`.
        retry_after: How many seconds the API's answer asks to wait, or `None`.
    """


class RemoteTraceback(BaseException):
    """The traceback of an exception of another process, as that one's `__cause__`.

    (It is no `Exception`, so that nobody takes it for the failure behind the failure.)

    Attributes:
        text: As Python prints it, with the causes.
        known: What else did not travel with the exception.
    """

    def __init__(self, text: str, known: Classified) -> None:
        super().__init__(text, known)
        self.text = text
        self.known = known

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def brief(item: object) -> str:
    """Returns a short text for an item, whatever it is: its own `repr` may fail, or refuse a huge number."""
    try:
        return reprlib.repr(item)
    except Exception:  # noqa: BLE001 - the failure that is being told of must not be lost over this one
        return f"<{type(item).__name__}>"


def add_note(error: Exception, note: str) -> None:
    """Adds our note, once: one exception may stand for many items, and may have been raised before."""
    notes = getattr(error, "__notes__", ())
    if not any(isinstance(one, str) and one.startswith("twostage: ") for one in notes):
        with contextlib.suppress(Exception):  # frozen ones refuse, and are raised as they are
            error.add_note(f"twostage: {note}")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns as from the line that called into the library, however deep in it the cause was seen."""
    level, frame = 1, sys._getframe()  # noqa: SLF001 - `skip_file_prefixes` came with 3.12 only
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def without_our_frames(error: ErrorT) -> ErrorT:
    """Returns `error` with a traceback that begins where our code called the user's or a library's."""
    traceback = error.__traceback__
    while traceback is not None and _is_ours(traceback.tb_frame):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "twostage"
