"""Whether arguments are what they should be: if not, their names, values and what is expected are told."""

from __future__ import annotations

import inspect
import operator
import sys
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

from twostage.base.words import brief

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Check",
    "Failures",
    "check_fetch",
    "check_function",
    "checked_bool",
    "failure_test",
    "is_coroutine_function",
    "is_number",
    "positive_int",
    "positive_seconds",
    "unless_none",
]

Check: TypeAlias = "Callable[[Any, str], Any]"
"""Takes what was given for an argument, and its name; returns what is kept of it, or raises."""

Failures: TypeAlias = "type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]"
"""Which exceptions are meant: their type, several types, or a function that says so of one."""


def positive_int(number: object, name: str) -> int:
    """Returns `number` as an `int` from 1; numpy's integers are welcome, `True` is none.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below 1.
    """
    try:
        value = operator.index(cast("int", None if isinstance(number, bool) else number))
    except TypeError:
        raise TypeError(f"{name} is {number!r}; expected an integer of at least 1") from None
    if value < 1:
        raise ValueError(f"{name} is {value}; expected an integer of at least 1")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number; numpy's are, `True` is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def positive_seconds(seconds: object, name: str) -> float:
    """Returns `seconds` as a `float` above 0 and below infinity.

    Raises:
        TypeError: It is no number.
        ValueError: It is not in this range.
    """
    if not is_number(seconds):
        raise TypeError(f"{name} is {seconds!r}; expected a number of seconds")
    if not 0 < seconds <= sys.float_info.max:
        raise ValueError(f"{name} is {brief(seconds)}; expected a number of seconds above 0")
    return float(seconds)


def checked_bool(value: object, name: str) -> bool:
    """Returns `value`, if it is true or false, and not only true- or false-like.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")
    return value


def unless_none(check: Check) -> Check:
    """Returns a check that takes `None` as well."""
    return lambda value, name: None if value is None else check(value, name)


def failure_test(kinds: object, name: str) -> Callable[[Exception], bool]:
    """Returns a function that says whether an exception is of `kinds`.

    Raises:
        TypeError: They are neither exception types nor a function.
    """
    types = kinds if isinstance(kinds, tuple) else (kinds,)
    if types and all(isinstance(kind, type) and issubclass(kind, Exception) for kind in types):
        return lambda error: isinstance(error, types)
    if isinstance(kinds, type) or not callable(kinds):
        raise TypeError(
            f"{name} is {kinds!r}; expected an exception type, a tuple of them, "
            "or a function that takes an exception"
        )
    check_function(kinds, name)
    return cast("Callable[[Exception], bool]", kinds)


def check_function(function: object, name: str) -> None:
    """Checks that `function` is a plain callable.

    Raises:
        TypeError: It can't be called, or is a coroutine function.
    """
    check_fetch(function, name)
    if is_coroutine_function(function, wrapped=False):
        raise TypeError(f"{name} is a coroutine function ({_named(function)}); expected a plain function")


def check_fetch(function: object, name: str) -> None:
    """Checks that `function` is a callable or a coroutine function.

    Raises:
        TypeError: It can't be called, or is an async generator function.
    """
    if not callable(function):
        raise TypeError(f"{name} is {function!r}; expected a function")
    if any(map(inspect.isasyncgenfunction, _behind(function, wrapped=False))):
        raise TypeError(
            f"{name} is an async generator function ({_named(function)}); "
            "expected a function, or a coroutine function"
        )


def is_coroutine_function(function: object, *, wrapped: bool = True) -> bool:
    """Whether what a function returns is to be awaited, as far as that can be seen.

    Args:
        function: It may be a partial, a bound method, or an object with an async `__call__`.
        wrapped: Whether one that `functools.wraps` a coroutine function counts as well.
    """
    return any(
        inspect.iscoroutinefunction(one)
        # An `AsyncMock` has this alone.
        or getattr(getattr(one, "__code__", None), "co_flags", 0) & inspect.CO_COROUTINE
        for one in _behind(function, wrapped=wrapped)
    )


def _named(function: object) -> str:
    """Returns a function's repr, without the arguments of a partial: those may be secrets."""
    return repr(next(one for one in _behind(function, wrapped=False) if not isinstance(one, partial)))


def _behind(function: object, *, wrapped: bool) -> Iterator[object]:
    """Gives a function and what stands behind it."""
    for _ in range(100):  # whatever its attributes are, it comes to an end
        yield function
        if isinstance(function, partial):
            function = function.func
        elif wrapped and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            break
    yield getattr(type(function), "__call__", None)  # noqa: B004 - not "is it callable?"
