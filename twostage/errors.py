"""The library's own exceptions and warnings; all other exceptions are the caller's functions'."""

import reprlib
import sys
import warnings
from types import FrameType
from typing import TypeVar

__all__ = ["BatchLengthError", "MissingToken", "brief", "warn", "without_our_frames"]

ErrorT = TypeVar("ErrorT", bound=BaseException)


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
        takes, gives = ("items", "token") if function == "fetch_token" else ("tokens", "result")
        return (
            f"{function} got {self.expected} {takes} and returned {self.returned} {gives}s; "
            f"it must return one {gives} for each {takes[:-1]}, in the {takes}' order"
        )


class MissingToken(LookupError):  # noqa: N818 - the name says it
    """A batch call answered with a mapping in which an item (at stage two: a token) is no key.

    The item fails alone, and is not asked for again unless `retry_missing` is on: many APIs leave out
    what does not exist.
    """


def brief(item: object) -> str:
    """Returns a short text for an item, whatever it is: its own `repr` may fail, or refuse a huge number."""
    try:
        return reprlib.repr(item)
    except Exception:  # noqa: BLE001 - the failure that is being told of must not be lost over this one
        return f"<{type(item).__name__}>"


def warn(message: str) -> None:
    """Warns as from the line that called into the library, however deep in it the cause was seen."""
    level, frame = 1, sys._getframe()  # noqa: SLF001 - `skip_file_prefixes` came with 3.12 only
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def without_our_frames(error: ErrorT) -> ErrorT:
    """Returns `error` with a traceback that begins where our code called the user's or a library's."""
    traceback = error.__traceback__
    while traceback is not None and _is_ours(traceback.tb_frame):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "twostage"
