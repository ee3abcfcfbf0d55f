"""What calls may return: an answer is checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Coroutine, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any, cast

from twostage.errors import BatchLengthError

__all__ = ["checked_result", "checked_token", "checked_tokens"]


def checked_tokens(answer: object, items: int) -> Sequence[Any]:
    """Returns the tokens that a batch call returned for so many items.

    Raises:
        TypeError: The answer is no sequence, or one without an order that could be the items'.
        BatchLengthError: It has more or fewer tokens than there are items.
    """
    if type(answer) is not list:
        _refuse_awaitable(answer, "fetch_token")
        wrong = isinstance(answer, str | bytes | bytearray | Mapping | AbstractSet)
        if wrong or not isinstance(answer, Collection | Sequence):
            raise TypeError(
                f"fetch_token returned {type(answer).__name__} for a batch; "
                "expected a list (or another sequence) with one token for each item, in the items' order"
            )
        answer = list(answer)  # what it has, not what its `__len__` says
    tokens: list[Any] = answer
    if len(tokens) != items:
        raise BatchLengthError(items, len(tokens))
    return tokens


def checked_token(answer: object, _items: int) -> Sequence[Any]:
    """Returns what a call for one item returned, as the tokens of a batch of one.

    Raises:
        TypeError: The answer has to be awaited.
    """
    _refuse_awaitable(answer, "fetch_token")
    return (answer,)


def checked_result(answer: Any, _items: int) -> Any:  # noqa: ANN401 - a result is the user's
    """Returns the result that stage two returned.

    Raises:
        TypeError: The answer has to be awaited.
    """
    _refuse_awaitable(answer, "fetch_result")
    return answer


def _refuse_awaitable(answer: object, function: str) -> None:
    if not _can_be_awaited(cast("Hashable", type(answer))):
        return
    if isinstance(answer, Coroutine):
        answer.close()  # or Python warns that it was never awaited
    raise TypeError(
        f"{function} returned a {type(answer).__name__}, which has to be awaited; expected a plain function"
    )


@lru_cache(maxsize=256)
def _can_be_awaited(kind: type) -> bool:
    return issubclass(kind, Awaitable)
