"""Threads that do not keep Python from ending."""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["background_thread"]


def background_thread(name: str, target: Callable[..., Any], *args: Any) -> Thread:  # noqa: ANN401 - the target's
    """Returns a daemon thread, not started; a plain one where there can be none, as in other interpreters."""
    try:
        return Thread(target=target, args=args, name=name, daemon=True)
    except RuntimeError:
        return Thread(target=target, args=args, name=name)
