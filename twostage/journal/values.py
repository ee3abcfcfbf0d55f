"""What a journal's file holds of items and values: JSON that gives back what it was made of."""

from __future__ import annotations

import contextlib
import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from twostage.base.words import brief
from twostage.errors import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

__all__ = ["Codec", "check_keys", "journal_key", "read_json"]

_JSON = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_READABLE_JSON = json.JSONEncoder(ensure_ascii=False).encode
_SORTED_JSON = json.JSONEncoder(allow_nan=False, separators=(",", ":"), sort_keys=True).encode

PLAIN = frozenset({str, int, float, bool, type(None)})
SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def read_json(text: str) -> Any:  # noqa: ANN401 - what JSON can say
    """Returns what a text in a journal stands for.

    Raises:
        JournalError: It is no JSON. (The error that says where would hold the text.)
    """
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    raise JournalError("the journal is damaged: what should be JSON is none")


def journal_key(key: Callable[[Any], Hashable] | None) -> Callable[[object], str]:
    """Returns what gives an item's key, as canonical JSON: 1, "1", True and 2**70 are four keys."""
    return partial(_key_text, key)


def check_keys(items: Iterable[object]) -> None:
    """Checks that each item has a key by itself.

    Raises:
        TypeError: One has none.
    """
    for item in items:
        if type(item) is not str and type(item) is not int:
            _key_text(None, item)


def _key_text(key: Callable[[Any], Hashable] | None, item: object) -> str:
    identity = item if key is None else key(item)
    try:
        return _canonical(identity)
    except (TypeError, ValueError, RecursionError):
        kind = type(identity).__name__
        raise TypeError(
            f"item {brief(item)} of type {kind} has no key for the journal; expected str, "
            "int, or what JSON can say. Give key=, a function that returns an item's key"
            if key is None
            else f"key returned {kind} for item {brief(item)}; the journal expects str, int, "
            "or what JSON can say"
        ) from None


def _canonical(key: object) -> str:
    if type(key) is not str and type(key) is not int:
        _check_names(key)
    text = _SORTED_JSON(key)
    # The halves of a pair are the same JSON as the character that they make.
    if "\\ud" in text and SURROGATE_PAIR.search(_READABLE_JSON(key)):
        raise ValueError
    return text


def _check_names(value: object) -> None:
    """Checks that no two keys become one: JSON makes 1 and "1" the same name in an object."""
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            _check_names(one)


class Codec:
    """Writes tokens and results so that they come back as they were.

    Args:
        encode: The user's way to write them; JSON if not given.
        decode: The way back.
    """

    def __init__(self, encode: Callable[[Any], bytes] | None, decode: Callable[[bytes], Any] | None) -> None:
        self._encode = encode
        self.read: Callable[[Any], Any] = read_json if decode is None else decode

    def write(self, value: object, what: str, item: object) -> str | bytes:
        """Returns what is to be recorded of a value.

        Args:
            value: A token or a result.
            what: Which of the two it is; for messages, that do not show it.
            item: Whose it is; likewise.

        Raises:
            TypeError: It would not come back as it is.
        """
        if self._encode is not None:
            return _bytes(self._encode(value), what, item)
        try:
            text = _JSON(value)
            if type(value) not in PLAIN:
                _check_types(value)
            # Two halves of a surrogate pair come back as one character.
            if "\\ud" not in text or json.loads(text) == value:
                return text
            problem = "lone surrogates"
        except (TypeError, ValueError, RecursionError) as error:
            problem = str(error) if isinstance(error, _ChangedError) else "what JSON can't say"
        raise TypeError(
            f"the {what} of item {brief(item)} is or has {problem}, and would not come back from the journal "
            f"as it is; give Journal(..., encode=, decode=)" + (" or tokens=False" if what == "token" else "")
        )


class _ChangedError(TypeError):
    """JSON would give back another value."""


def _check_types(value: object) -> None:
    kind = type(value)
    parts: Iterable[object]
    if kind is list:
        parts = value  # type: ignore[assignment] # a list
    elif kind is dict:
        parts = value.values()  # type: ignore[attr-defined] # a dict
        for name in value:  # type: ignore[attr-defined] # as above
            if type(name) is not str:
                raise _ChangedError(f"a key of type {type(name).__name__}")
    else:
        raise _ChangedError(f"a {kind.__name__}")
    for part in parts:
        if type(part) not in PLAIN:
            _check_types(part)


def _bytes(encoded: object, what: str, item: object) -> bytes:
    if not isinstance(encoded, bytes):
        raise TypeError(
            f"encode returned {type(encoded).__name__} for the {what} of item {brief(item)}; expected bytes"
        )
    return encoded
