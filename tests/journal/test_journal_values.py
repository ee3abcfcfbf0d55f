"""Keys and values in a journal: what is told apart, and what comes back."""

from __future__ import annotations

import dataclasses
import enum
import gc
import http
import json
import math
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from forms import each_way, iterate, run
from journals import Api, results_of

from twostage import (
    Journal,
    JournalError,
    Outcome,
    iter_two_stage,
)
from twostage.testing import SimulatedApi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from forms import Run


# --- keys


def test_alike_items_of_other_types_are_four_keys(path: Path) -> None:
    items = [1, "1", True, 2**70]
    assert len(set(map(str, items))) == 3
    api = Api()
    for _ in range(2):
        assert api.run(items, journal=path) == results_of(items)
        assert api.tokens == {"token 1": 2, "token True": 1, f"token {2**70}": 1}
    assert [(type(record.item), record.item) for record in Journal(path)] == [
        (type(item), item) for item in items
    ]


@pytest.mark.parametrize("item", ["\ud83d\ude00", ["a", "\ud83d\ude00"], {"\ud83d\ude00": 1}], ids=ascii)
def test_halves_of_a_character_are_no_key(path: Path, item: object) -> None:
    """They are the same JSON as the character."""
    with pytest.raises(TypeError, match="has no key for the journal"):
        run([item], lambda _: 1 // 0, str, journal=path)


@pytest.mark.parametrize(
    "item",
    [1.5, None, ("a", 1), ["a", [1]], {"b": 1, "a": {"c": None}}, "\ud800", "é😀", -0.0, ""],
    ids=ascii,
)
def test_json_is_a_key(path: Path, item: object) -> None:
    calls = 0

    def fetch_token(_: object) -> str:
        nonlocal calls
        calls += 1
        return "t"

    for _ in range(2):
        assert run([item], fetch_token, str.upper, journal=path) == ["T"]
    assert calls == 1


def test_names_of_a_key_have_no_order(path: Path) -> None:
    run([{"a": 1, "b": 2}], str, str, journal=path)
    assert run([{"b": 2, "a": 1}], lambda _: 1 / 0, str, journal=Journal(path, job="str, str"))


class Color(enum.Enum):
    RED = 1


@pytest.mark.parametrize("item", [b"a", {1: 2}, math.nan, object(), Color.RED, [{1: 2}], {"a"}], ids=repr)
@pytest.mark.parametrize("kind", [list, iter])
def test_item_without_a_key_is_an_error_before_any_call(
    path: Path, item: object, kind: Callable[[list[Any]], Any]
) -> None:
    api = Api()
    with pytest.raises(TypeError, match=r"has no key for the journal; expected str, int, or .* Give key="):
        api.run(kind(["a", item]), journal=path, token_workers=1)
    if kind is list:
        assert not api.items
        with pytest.raises(TypeError, match="has no key"):
            iter_two_stage([*"a" * 10_000, item], str, str, journal=path)


def test_key_function_gives_the_keys(path: Path) -> None:
    items = [{"id": 1, "at": object()}, {"id": 2, "at": object()}, {"id": 1, "at": object()}]
    tokens = 0

    def fetch_token(item: dict[str, Any]) -> int:
        nonlocal tokens
        tokens += 1
        return 10 * item["id"]  # type: ignore[no-any-return] # it is an int

    for job in (run, iterate):
        assert job(items, fetch_token, str, key=lambda item: item["id"], journal=path) == ["10", "20", "10"]
    assert tokens == 2
    assert [record.item for record in Journal(path)] == [1, 2]
    with pytest.raises(TypeError, match=r"key returned bytes for item 1; the journal expects str, int"):
        run([1], fetch_token, str, key=lambda _: b"", journal=path)


@each_way
def test_the_same_key_twice_is_one_call_and_an_outcome_for_each(path: Path, job: Run) -> None:
    api = Api()
    items = [number % 7 for number in range(3000)]
    settings = {"window": 20} if job is not run else {}
    assert api.run(iter(items), job, journal=path, **settings) == results_of(items)
    assert api.items == dict.fromkeys(range(7), 1)


def test_list_remembers_no_item_that_is_recorded(path: Path) -> None:
    """Else memory would grow by as much again as the file does."""
    kept: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5000):
            kept.append(
                sum(isinstance(one, Outcome) for one in gc.get_objects()) if item % 1000 == 999 else 0
            )
            yield item

    run(items(), str, str, journal=path)
    assert max(kept) < 2000


# --- values


class Pair(NamedTuple):
    left: int
    right: int


class Words(list[str]):
    pass


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -0.0, 1.0, 2**100, "", "é😀\ud800", [], {}, [1, [True, None]], {"b": 1, "a": {"": []}},
    ],
    ids=ascii,
)  # fmt: skip
def test_value_comes_back_as_it_was(path: Path, value: object) -> None:
    for _ in range(2):
        (result,) = run(["a"], lambda _: value, lambda token: [token], journal=path)
        assert repr(result) == repr([value])
    (record,) = Journal(path)
    assert repr([record.token, record.result]) == repr([value, [value]])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ((1, 2), "a tuple"),
        ([(1, 2)], "a tuple"),
        ({"a": {1: 2}}, "a key of type int"),
        (math.nan, "what JSON can't say"),
        ([math.inf], "what JSON can't say"),
        (b"a", "what JSON can't say"),
        (Pair(1, 2), "a Pair"),
        (Words("a"), "a Words"),
        (OrderedDict(a=1), "a OrderedDict"),
        (Counter("a"), "a Counter"),
        (http.HTTPStatus.OK, "a HTTPStatus"),
        ("\ud83d" + "\ude00", "lone surrogates"),
        (object(), "what JSON can't say"),
    ],
    ids=ascii,
)
def test_value_that_json_would_change_is_an_error_that_names_the_way_out(
    path: Path, value: object, what: str
) -> None:
    with pytest.raises(TypeError) as caught:
        run(["a"], lambda _: "secret", lambda _: value, journal=path)
    assert str(caught.value) == (
        f"the result of item 'a' is or has {what}, and would not come back from the journal as it is; "
        "give Journal(..., encode=, decode=)"
    )
    other = path.with_name("other")
    with pytest.raises(TypeError, match=r"the token of item 'a' is or has .* or tokens=False$"):
        run(["a"], lambda _: value, lambda _: "", journal=other)
    assert run(["a"], lambda _: value, lambda _: "", journal=Journal(other, tokens=False)) == [""]
    (record,) = Journal(other)
    assert (record.token, record.result) == (None, "")


def test_cycle_is_an_error_too(path: Path) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError, match="what JSON can't say"):
        run(["a"], str, lambda _: value, journal=path)


@dataclasses.dataclass
class Report:
    title: str
    pages: tuple[int, ...]


def encode(value: str | Report) -> bytes:
    return json.dumps(value if isinstance(value, str) else dataclasses.asdict(value)).encode()


def decode(data: bytes) -> str | Report:
    value = json.loads(data)
    return value if isinstance(value, str) else Report(value["title"], tuple(value["pages"]))


def test_user_s_functions_write_and_read_what_json_can_not(path: Path) -> None:
    journal = Journal(path, encode=encode, decode=decode)
    api = SimulatedApi[str, Report](lambda token: Report(token, (1, 2)))
    for _ in range(2):
        assert run("ab", str.upper, api, journal=journal) == [Report("A", (1, 2)), Report("B", (1, 2))]
    assert api.calls == 2
    assert [(record.token, record.result) for record in journal] == [(x, Report(x, (1, 2))) for x in "AB"]
    with pytest.raises(
        JournalError, match=r"was written with encode=; give Journal\(\.\.\., encode=, decode=\)"
    ):
        list(Journal(path))
    assert Journal(path).recorded().results == 2
    with pytest.raises(JournalError, match="was written with encode=1, not 0"):
        run("ab", str.upper, api, journal=path)
    with pytest.raises(TypeError, match="encode returned str for the token of item 'c'; expected bytes"):
        run("c", str.upper, api, journal=Journal(path, encode=str, decode=str))  # type: ignore[arg-type]
