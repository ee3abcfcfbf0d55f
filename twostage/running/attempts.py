"""What runners have in common: attempts that are given up or cancelled, and a stage's context."""

from __future__ import annotations

import inspect
import logging
from concurrent.futures import CancelledError
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from twostage.base.records import told
from twostage.errors import AttemptTimeout

if TYPE_CHECKING:
    from twostage.base.records import Call
    from twostage.base.runner import Work

__all__ = ["cancelled", "given_up", "left_badly", "made_context"]

log = logging.getLogger("twostage")


def given_up(work: Work, call: Call) -> AttemptTimeout:
    """Returns the failure of an attempt that has taken too long, and says so."""
    log.warning(
        "%s, %s: the attempt takes longer than %g s and is given up",
        *(work.stage, told(call), work.attempt_timeout),
    )
    return AttemptTimeout(f"the attempt took longer than attempt_timeout={work.attempt_timeout:g} s")


def cancelled(error: BaseException | None) -> CancelledError:
    """Returns the failure of an attempt that was cancelled by something else than its job."""
    failure = CancelledError("the call's task was cancelled, and not by its job")
    failure.__cause__ = error
    return failure


def made_context(work: Work) -> AbstractAsyncContextManager[Any]:
    """Returns what a stage's `context` makes, for which the stage must have one.

    Raises:
        TypeError: It is no async context manager.
    """
    assert work.context is not None  # noqa: S101 - for the type checker
    made: object = work.context()
    if isinstance(made, AbstractAsyncContextManager):
        return made
    if inspect.iscoroutine(made):
        made.close()
    raise TypeError(
        f"{work.stage}: context returned {type(made).__name__}; expected an async context manager"
    )


def left_badly(work: Work, error: BaseException) -> None:
    """Says that a context has failed as it was left, when all that it was for is done."""
    log.warning("%s: its context has failed as it was left: %r", work.stage, type(error))
