"""What was said of a job: one record, from the function that the user calls to the part that reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, final

from twostage.base.checks import (
    Check,
    check_function,
    checked_bool,
    failure_test,
    positive_int,
    positive_seconds,
    unless_none,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from twostage.base.checks import Failures

__all__ = [
    "COROUTINES",
    "DEFAULT_RETRY",
    "ONE_ITEM_A_CALL",
    "ONE_TOKEN_AN_ITEM",
    "RESULT_WORKERS",
    "TOKEN_WORKERS",
    "Default",
    "JobOptions",
    "check_names",
]

TOKEN_WORKERS: Final = 4
RESULT_WORKERS: Final = 32
COROUTINES: Final = 100
"""How many attempts of a coroutine function run at once."""


@final
class Default:
    """Stands for an argument that was not given, and says in signatures what that means."""

    __slots__ = ("meaning",)

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning

    def __repr__(self) -> str:
        return f"<default: {self.meaning}>"


ONE_ITEM_A_CALL = Default("one item a call")
ONE_TOKEN_AN_ITEM = Default("False")
SOME_TOKEN_WORKERS = Default(f"{TOKEN_WORKERS}; coroutine functions: {COROUTINES}")
SOME_RESULT_WORKERS = Default(f"{RESULT_WORKERS}; coroutine functions: {COROUTINES}")
DEFAULT_RETRY = Default("10 attempts if the failure is transient")


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What `run_two_stage` and `iter_two_stage` document, as it was given, and checked.

    These are the defaults. A part reads what it needs, and makes itself of it; what only a part can check,
    as it knows the type, is checked there, before any call is made.
    """

    batch_size: int | Default | None = ONE_ITEM_A_CALL
    token_workers: int | Default = SOME_TOKEN_WORKERS
    result_workers: int | Default = SOME_RESULT_WORKERS
    retry: Any = DEFAULT_RETRY
    many: bool | Default = ONE_TOKEN_AN_ITEM
    key: Callable[[Any], Hashable] | None = None
    refresh_token_on: Failures | None = None
    max_refreshes: int = 1
    return_exceptions: bool = False
    window: int | None = None
    timeout: float | None = None
    max_failures: float | None = None
    journal: Any = None
    shards: Any = None
    progress: Any = False
    total: int | None = None
    trace: Any = None
    observer: Any = None
    ordered: bool = False
    linger: float | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> JobOptions:
        """Checks what was said.

        Raises:
            TypeError: There is no such option, or what was given is of the wrong kind.
            ValueError: A number is out of range.
        """
        check_names(said)
        return cls(
            **{
                name: CHECKS[name](value, name)
                if name in CHECKS and not isinstance(value, Default)
                else value
                for name, value in said.items()
            }
        )


def check_names(said: Iterable[str]) -> None:
    """Checks that there are such options.

    Raises:
        TypeError: There is one that there isn't; it names the one that may be meant.
    """
    names = [one.name for one in fields(JobOptions)]
    for name in said:
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise TypeError(f"there is no option {name}" + "".join(f"; did you mean {one}?" for one in near))


def _function(value: object, name: str) -> object:
    check_function(value, name)
    return value


def _failures(value: object, name: str) -> object:
    failure_test(value, name)
    return value


CHECKS: Final[dict[str, Check]] = {
    "batch_size": unless_none(positive_int),
    "token_workers": positive_int,
    "result_workers": positive_int,
    "many": checked_bool,
    "key": unless_none(_function),
    "refresh_token_on": unless_none(_failures),
    "max_refreshes": positive_int,
    "return_exceptions": checked_bool,
    "window": unless_none(positive_int),
    "timeout": unless_none(positive_seconds),
    "ordered": checked_bool,
    "linger": unless_none(positive_seconds),
}
"""What makes an option what it is kept as."""
