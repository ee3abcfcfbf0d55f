"""Words for messages: what things are called, and a short text for anything; and whose frames are whose."""

from __future__ import annotations

import contextlib
import reprlib
import sys
import warnings
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["FUNCTIONS", "STAGES", "add_note", "brief", "warn", "without_our_frames"]

ErrorT = TypeVar("ErrorT", bound=BaseException)

FUNCTIONS = {"fetch_token": ("item", "token"), "fetch_result": ("token", "result")}
"""What each function takes, and what it returns for one of them; for messages."""

STAGES = {1: "stage one", 2: "stage two"}


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
