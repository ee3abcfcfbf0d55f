"""What calls may return: an answer is checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Coroutine, Hashable, Iterable, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from twostage.base.words import FUNCTIONS
from twostage.errors import BatchLengthError, MissingToken

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.base.records import Batch

__all__ = ["Check", "batch_check", "checked_result", "checked_token", "token_list"]

Check: TypeAlias = "Callable[[Any, Any], Sequence[Any]]"
"""Takes an answer and its call; returns a value for each of the call's members, or raises."""


def checked_token(answer: object, _call: object) -> Sequence[Any]:
    """Returns what a call of stage one for one item returned.

    Raises:
        TypeError: The answer has to be awaited.
    """
    _refuse_awaitable(answer, "fetch_token")
    return (answer,)


def checked_result(answer: object, _call: object) -> Sequence[Any]:
    """Returns what a call of stage two for one token returned.

    Raises:
        TypeError: The answer has to be awaited.
    """
    _refuse_awaitable(answer, "fetch_result")
    return (answer,)


def batch_check(function: str, arguments: Callable[[Batch], list[Any]]) -> Check:
    """Returns the check of what `function` returns for a batch: a value for each member, in a list.

    An exception among the values is the failure of its slot. What is wrong with the answer as a whole is
    raised, a `TypeError` or a `BatchLengthError`.

    Args:
        function: How the user's function is called in messages.
        arguments: Takes a batch; returns what its members stand for, items or tokens.
    """
    takes, gives = FUNCTIONS[function]

    def check(answer: object, batch: Batch) -> list[Any]:
        if isinstance(answer, Mapping):
            return _by_key(answer, arguments(batch), function)
        if type(answer) is not list:
            _refuse_awaitable(answer, function)
            wrong = isinstance(answer, str | bytes | bytearray | AbstractSet)
            if wrong or not isinstance(answer, Collection | Sequence):
                raise TypeError(
                    f"{function} returned {type(answer).__name__} for a batch; expected a list (or another "
                    f"sequence) with one {gives} for each {takes}, in the {takes}s' order, or a mapping"
                )
            answer = list(answer)  # what it has, not what its `__len__` says
        values: list[Any] = answer
        if len(values) != len(batch.members):
            raise BatchLengthError(len(batch.members), len(values), function)
        return values

    return check


def _by_key(answer: Mapping[Any, Any], arguments: list[Any], function: str) -> list[Any]:
    absent = object()
    takes, _ = FUNCTIONS[function]
    for argument in arguments:
        try:
            hash(argument)
        except TypeError:
            raise TypeError(
                f"{function} returned {type(answer).__name__} for a batch, but a {type(argument).__name__} "
                f"can't be a key in it; expected a list, in the order of the {takes}s"
            ) from None
    values = [answer.get(argument, absent) for argument in arguments]
    text = f"{function} returned a {type(answer).__name__} that does not have it"
    if answer and all(value is absent for value in values):
        text = (
            f"{function} returned a {type(answer).__name__} that has none of the {takes}s: "
            f"they are of type {_kinds(arguments)}, and its keys of type {_kinds(answer)}"
        )
    return [MissingToken(text) if value is absent else value for value in values]


def _kinds(values: Collection[object]) -> str:
    return " and ".join(sorted({type(value).__name__ for value in values}))


def token_list(value: object) -> list[Any]:
    """Returns the many tokens of an item.

    Raises:
        TypeError: `value` is no collection of them.
        Exception: It breaks when it is looked at.
    """
    wrong = isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Sized)
    if wrong or not isinstance(value, Iterable):
        raise TypeError(
            f"fetch_token returned {type(value).__name__} for an item; with many=True a list is expected "
            "(or another collection), with the item's tokens"
        )
    return list(value)


def _refuse_awaitable(answer: object, function: str) -> None:
    if not _can_be_awaited(cast("Hashable", type(answer))):
        return
    if isinstance(answer, Coroutine):
        answer.close()  # or Python warns that it was never awaited
    raise TypeError(
        f"{function} returned a {type(answer).__name__}, which has to be awaited; expected a plain "
        "function, or one that is known by its `async def`, or a Stage with an AsyncExecutor"
    )


@lru_cache(maxsize=256)
def _can_be_awaited(kind: type) -> bool:
    return issubclass(kind, Awaitable)
