"""Bad arguments are refused at the call: nothing was called then, and the source not touched."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import pydoc
import re
import reprlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest
from forms import run

from twostage import Stage, aiter_two_stage, arun_two_stage, iter_two_stage, run_two_stage
from twostage.base.options import JobOptions
from twostage.run import Options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


class Untouched:
    """A source and a function that nobody may use."""

    def __init__(self) -> None:
        self.uses: list[str] = []

    def __iter__(self) -> Iterator[int]:
        self.uses.append("read")
        return iter([1, 2, 3])

    def __call__(self, argument: object) -> object:
        self.uses.append("called")
        return argument


class Index:
    """An integer that is no `int`, as numpy's are."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class BadIndex:
    """Has `__index__` and is no integer, as a numpy array of several numbers is."""

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")

    def __repr__(self) -> str:
        return "array([1, 2])"


def refused(kind: type[Exception], message: str, **arguments: Any) -> None:  # noqa: ANN401 - bad on purpose
    """Checks that both functions refuse `arguments` at the call, with a message that begins so."""
    untouched = Untouched()
    arguments = {"items": untouched, "fetch_token": untouched, "fetch_result": untouched} | arguments
    for function in (run_two_stage, iter_two_stage):
        with pytest.raises(kind, match=f"^{re.escape(message)}"):
            function(**arguments)
    assert untouched.uses == []


def stage(**settings: Any) -> Stage[Any, Any]:  # noqa: ANN401 - as many are bad
    return Stage(Untouched(), **settings)


# --- numbers

no_integers = pytest.mark.parametrize(
    "number",
    [2.0, float("inf"), True, False, "2", [2], int, BadIndex()],
    ids=repr,
)
below_one = pytest.mark.parametrize(
    ("number", "shown"), [(0, 0), (-1, -1), (Index(0), 0), (-(10**30), -(10**30))], ids=str
)
NUMBERS = ("batch_size", "token_workers", "result_workers", "window")
NUMBERS_OF_A_STAGE = ("batch_size", "workers")


@no_integers
def test_number_that_is_no_integer_is_a_type_error(number: object) -> None:
    for name in NUMBERS:
        refused(TypeError, f"{name} is {number!r}; expected an integer of at least 1", **{name: number})
    for name in NUMBERS_OF_A_STAGE:
        message = re.escape(f"{name} is {number!r}; expected an integer of at least 1")
        with pytest.raises(TypeError, match=f"^{message}"):
            stage(**{name: number})


@below_one
def test_number_below_one_is_a_value_error(number: object, shown: int) -> None:
    for name in NUMBERS:
        refused(ValueError, f"{name} is {shown}; expected an integer of at least 1", **{name: number})
    for name in NUMBERS_OF_A_STAGE:
        with pytest.raises(ValueError, match=f"^{name} is {shown}; expected an integer of at least 1"):
            stage(**{name: number})


def test_workers_can_not_be_none() -> None:
    for name in ("token_workers", "result_workers"):
        refused(TypeError, f"{name} is None; expected an integer of at least 1", **{name: None})
    with pytest.raises(TypeError, match=r"^workers is None; expected an integer of at least 1"):
        stage(workers=None)


def test_integers_of_other_kinds_are_welcome() -> None:
    batches: list[list[int]] = []

    def fetch_tokens(batch: list[int]) -> list[int]:
        batches.append(batch)
        return batch

    two: Any = Index(2)  # numpy's integers are typed as having no `int` in them either
    for settings in (
        {"batch_size": two, "token_workers": two, "result_workers": two, "window": two},
        {"batch_size": two},
    ):
        results: list[Any] = run_two_stage([1, 2, 3], fetch_tokens, str, **settings)
        assert results == ["1", "2", "3"]
    assert sorted(map(len, batches)) == [1, 1, 2, 2]
    kept: Stage[int, int] = Stage(fetch_tokens, batch_size=two, workers=two)
    assert [type(kept.batch_size), kept.batch_size] == [int, 2]
    assert [type(kept.workers), kept.workers] == [int, 2]
    assert run_two_stage([1, 2, 3], kept, str) == ["1", "2", "3"]


@pytest.mark.parametrize("most", [1000, sys.maxsize])
def test_batch_size_may_be_more_than_there_are_items(most: int) -> None:
    assert run_two_stage("abc", lambda batch: [len(batch)] * len(batch), str, batch_size=most) == ["3"] * 3


def test_workers_may_be_more_than_there_are_items() -> None:
    results = run_two_stage("abc", str.upper, ord, token_workers=10**6, result_workers=10**6)
    assert results == [65, 66, 67]


def test_none_is_no_batch() -> None:
    assert run_two_stage("ab", str.upper, ord, batch_size=None) == [65, 66]
    assert run_two_stage("ab", Stage(str.upper, batch_size=None), Stage(str.lower, batch_size=None)) == [
        "a",
        "b",
    ]


def test_batch_size_of_one_is_a_list_of_one() -> None:
    def fetch_tokens(batch: list[str]) -> list[str]:
        assert type(batch) is list
        assert len(batch) == 1
        return batch

    assert run_two_stage("abc", fetch_tokens, str.upper, batch_size=1) == ["A", "B", "C"]


# --- the window


def test_window_smaller_than_a_batch_is_a_value_error() -> None:
    message = "window is 9; expected at least the batch_size of 10"
    refused(ValueError, message, window=9, batch_size=10)
    refused(ValueError, message, window=9, fetch_token=stage(batch_size=10))


def test_window_of_a_batch_is_enough() -> None:
    assert run_two_stage("abcde", list, str.upper, batch_size=2, window=2) == ["A", "B", "C", "D", "E"]
    assert run_two_stage("abc", str.upper, ord, window=1) == [65, 66, 67]


# --- functions

FUNCTIONS = ("fetch_token", "fetch_result")


class Awaitably:
    """Callable, but what it returns has to be awaited."""

    async def __call__(self, argument: object) -> object:
        return argument

    async def method(self, argument: object) -> object:
        return argument

    @classmethod
    async def class_method(cls, argument: object) -> object:
        return argument


class CalledByPartial:
    __call__ = staticmethod(partial(Awaitably.class_method))


async def coroutine_function(argument: object) -> object:
    return argument


async def generator_function(argument: object) -> AsyncIterator[object]:
    yield argument


@pytest.mark.parametrize(
    "function",
    [None, 3, "fetch", ["fetch"], object(), Ellipsis],
    ids=lambda function: type(function).__name__,
)
def test_what_can_not_be_called_is_a_type_error(function: Any) -> None:  # noqa: ANN401
    for name in FUNCTIONS:
        refused(TypeError, f"{name} is {function!r}; expected a function", **{name: function})
    with pytest.raises(TypeError, match=re.escape(f"fetch is {function!r}; expected a function")):
        Stage(function)


def wrapping(argument: object) -> object:
    return coroutine_function(argument)


wraps = functools.wraps(coroutine_function)(wrapping)

coroutine_functions = {
    "function": coroutine_function,
    "partial": partial(coroutine_function),
    "partial of partial": partial(partial(coroutine_function)),
    "method": Awaitably().method,
    "class method": Awaitably.class_method,
    "callable": Awaitably(),
    "partial of callable": partial(Awaitably()),
    "partial as __call__": CalledByPartial(),
    "mock": AsyncMock(side_effect=lambda argument: argument),
}


@pytest.mark.parametrize(
    "function",
    [*coroutine_functions.values(), wraps, partial(wraps)],
    ids=[*coroutine_functions, "wraps", "its partial"],
)
def test_coroutine_function_is_known(function: Callable[[object], object]) -> None:
    assert Stage(function).awaits
    assert run("ab", function, function) == ["a", "b"]
    assert run("ab", list, function, batch_size=2) == ["a", "b"]


@pytest.mark.parametrize("function", coroutine_functions.values(), ids=coroutine_functions)
def test_coroutine_function_that_nobody_awaits_is_a_type_error(function: Callable[..., Any]) -> None:
    inner: object = function
    while isinstance(inner, partial):  # whose arguments may be secrets
        inner = inner.func
    refused(TypeError, f"key is a coroutine function ({inner!r}); expected a plain function", key=function)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(TypeError, match=r"expected an AsyncExecutor, or none$"),
    ):
        Stage(function, executor=pool)


def test_function_that_wraps_a_coroutine_function_and_runs_it_itself_takes_an_executor_of_threads() -> None:
    @functools.wraps(coroutine_function)
    def runs_it(argument: str) -> object:
        return asyncio.run(coroutine_function(argument))

    with ThreadPoolExecutor(1) as pool:
        assert run_two_stage("ab", Stage(runs_it, executor=pool), str) == ["a", "b"]


@pytest.mark.parametrize("function", [generator_function, partial(generator_function)])
def test_async_generator_function_is_a_type_error(function: Callable[..., object]) -> None:
    for name in FUNCTIONS:
        message = f"{name} is an async generator function ({generator_function!r}); expected a function, or a"
        refused(TypeError, message, **{name: function})
        refused(TypeError, message, **{name: function}, batch_size=10)
    with pytest.raises(TypeError, match=r"^fetch is an async generator function"):
        Stage(function)


def test_class_with_a_coroutine_as_call_is_itself_a_plain_function() -> None:
    class Token(Awaitably):
        def __init__(self, item: str) -> None:
            self.item = item

    assert run_two_stage("ab", Token, lambda token: token.item) == ["a", "b"]


@pytest.mark.parametrize("executor", [3, "threads", object(), ThreadPoolExecutor, [ThreadPoolExecutor]])
def test_executor_that_is_none_is_a_type_error(executor: Any) -> None:  # noqa: ANN401
    message = f"executor is {executor!r}; expected a concurrent.futures.Executor"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        Stage(str, executor=executor)


# --- what is said twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"fetch_token": stage(batch_size=3), "batch_size": 2},
            "batch_size (2) and batch_size of fetch_token's Stage (3) are both given; expected one",
        ),
        (
            {"fetch_token": stage(batch_size=3), "batch_size": 3},
            "batch_size (3) and batch_size of fetch_token's Stage (3) are both given; expected one",
        ),
        (
            {"fetch_token": stage(batch_size=3), "batch_size": None},
            "batch_size (None) and batch_size of fetch_token's Stage (3) are both given; expected one",
        ),
        (
            {"fetch_token": stage(workers=4), "token_workers": 4},
            "token_workers (4) and workers of fetch_token's Stage (4) are both given; expected one",
        ),
        (
            {"fetch_result": stage(workers=6), "result_workers": 5},
            "result_workers (5) and workers of fetch_result's Stage (6) are both given; expected one",
        ),
    ],
    ids=["batch_size", "equal", "None", "token_workers", "result_workers"],
)
def test_shorthand_beside_a_stage_that_sets_the_same_is_a_type_error(
    arguments: dict[str, Any], message: str
) -> None:
    refused(TypeError, message, **arguments)


def test_shorthand_beside_a_stage_that_does_not_set_the_same_is_used() -> None:
    sizes: list[int] = []

    def fetch_tokens(batch: list[str]) -> list[str]:
        sizes.append(len(batch))
        return batch

    batch: Any = Stage(fetch_tokens, workers=1)
    assert run_two_stage("abc", batch, Stage(str.upper, retry=None), batch_size=2, result_workers=1) == [
        "A",
        "B",
        "C",
    ]
    assert sizes == [2, 1]


# --- items


class BrokenSource:
    def __iter__(self) -> Iterator[int]:
        raise LookupError("the source's own mistake")


@pytest.mark.parametrize(
    "items", [3, None, object(), len, generator_function(1)], ids=lambda items: type(items).__name__
)
def test_items_that_can_not_be_iterated_are_a_type_error(items: object) -> None:
    refused(TypeError, f"items is {reprlib.repr(items)}; expected something to iterate over", items=items)


def test_source_that_breaks_when_iterated_is_raised_as_it_is() -> None:
    refused(LookupError, "the source's own mistake", items=BrokenSource())


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("abc", "abc"),
        (b"ab", [97, 98]),
        ({"a": 1}, ["a"]),
        (range(3), [0, 1, 2]),
        (iter([1, None]), [1, None]),
    ],
    ids=["str", "bytes", "dict", "range", "iterator"],
)
def test_anything_that_can_be_iterated_is_fine(items: Any, expected: Any) -> None:  # noqa: ANN401
    results = run_two_stage(items, lambda item: [item], lambda token: token[0])
    assert results == list(expected)


@pytest.mark.parametrize(
    "empty", [[], "", (), {}, range(0), iter(())], ids=lambda empty: type(empty).__name__
)
def test_no_items_are_no_calls_and_no_results(empty: Any) -> None:  # noqa: ANN401
    untouched: Any = Untouched()
    settings: Any
    for settings in ({}, {"batch_size": 10}, {"return_exceptions": True}):
        assert run_two_stage(empty, untouched, untouched, **settings) == []
        for ordered in (False, True):
            with iter_two_stage(empty, untouched, untouched, ordered=ordered, **settings) as outcomes:
                assert list(outcomes) == []
                assert list(outcomes) == []
    assert untouched.uses == []


# --- when


def test_good_arguments_alone_neither_call_nor_read_nor_start_a_thread() -> None:
    threads = threading.enumerate()
    read: list[int] = []
    untouched = Untouched()

    def source() -> Iterator[int]:
        for item in range(3):
            read.append(item)
            yield item

    outcomes = iter_two_stage(source(), untouched, untouched)
    assert threading.enumerate() == threads
    assert read == []
    assert untouched.uses == []
    outcomes.close()
    assert list(outcomes) == []
    assert read == []
    assert untouched.uses == []


# --- Stage


def test_stage_is_frozen() -> None:
    frozen = Stage(str, workers=3)
    for field in dataclasses.fields(frozen):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del frozen.workers
    assert frozen.workers == 3


def test_stage_replaced_in_part_is_checked_again() -> None:
    eight = dataclasses.replace(Stage(str, workers=3, retry=2), workers=8)
    assert (eight.fetch, eight.workers, eight.retry) == (str, 8, 2)
    with pytest.raises(ValueError, match="workers is 0"):
        dataclasses.replace(eight, workers=0)


def test_two_jobs_at_once_may_use_one_stage() -> None:
    first: Stage[str, str] = Stage(lambda batch: [item.upper() for item in batch], batch_size=2, workers=2)
    second = Stage(str.lower, workers=2, retry=2)
    ours = iter_two_stage("abc", first, second, ordered=True)
    with ours, iter_two_stage("xyz", first, second, ordered=True) as theirs:
        pairs = [(one.result, other.result) for one, other in zip(ours, theirs, strict=True)]
    assert pairs == [("a", "x"), ("b", "y"), ("c", "z")]
    assert run_two_stage("abc", first, second) == ["a", "b", "c"]


def test_one_stage_may_be_both() -> None:
    same: Stage[str, str] = Stage(lambda text: text + "!", workers=2)
    assert run_two_stage("ab", same, same) == ["a!!", "b!!"]


# --- defaults


@pytest.mark.parametrize("function", [run_two_stage, iter_two_stage])
def test_signature_says_what_the_defaults_mean(function: Callable[..., object]) -> None:
    parameters = inspect.signature(function).parameters
    assert [str(parameters[name].default) for name in ("batch_size", "token_workers", "result_workers")] == [
        "<default: one item a call>",
        "<default: 4; coroutine functions: 100>",
        "<default: 32; coroutine functions: 100>",
    ]
    assert repr(parameters["retry"].default) == "<default: 10 attempts if the failure is transient>"
    assert parameters["window"].default is None
    assert parameters["return_exceptions"].default is False
    assert " object at 0x" not in str(inspect.signature(function))


plain_text: Any = vars(pydoc)["plaintext"]  # which its stub does not know


@pytest.mark.parametrize("function", [run_two_stage, iter_two_stage, arun_two_stage, aiter_two_stage])
def test_misspelt_option_is_a_type_error_that_names_the_nearest(function: Callable[..., object]) -> None:
    untouched = Untouched()
    with pytest.raises(TypeError, match=r"^there is no option batchsize; did you mean batch_size\?$"):
        function(untouched, untouched, untouched, batchsize=3)
    with pytest.raises(TypeError, match=r"^there is no option colour$"):
        function(untouched, untouched, untouched, colour=3)
    assert untouched.uses == []


@pytest.mark.parametrize("function", [iter_two_stage, aiter_two_stage])
def test_each_option_has_its_default_in_the_signature(function: Callable[..., object]) -> None:
    shown = inspect.signature(function).parameters
    options = {one.name: one.default for one in dataclasses.fields(JobOptions)}
    assert list(shown) == ["items", "fetch_token", "fetch_result", *options]
    assert {name: shown[name].default for name in options} == options
    of_a_list = inspect.signature(run_two_stage).parameters
    assert list(of_a_list) == [name for name in shown if name not in {"ordered", "linger"}]
    assert list(inspect.signature(arun_two_stage).parameters) == list(of_a_list)
    assert list(Options.__annotations__) == [
        name
        for name in options
        if name not in {"batch_size", "many", "return_exceptions", "ordered", "linger"}
    ]


def test_help_says_what_the_defaults_mean() -> None:
    for documented in (run_two_stage, iter_two_stage, Stage):
        text = pydoc.render_doc(documented, renderer=plain_text)
        assert "= <default: one item a call>" in text
        assert " object at 0x" not in text


def test_stage_s_repr_says_what_the_defaults_mean_and_no_argument_of_a_partial() -> None:
    assert repr(Stage(partial(int, base=16))) == (
        "Stage(batch_size=<default: one item a call>, "
        "workers=<default: 4 for stage one, 32 for stage two, 100 for coroutine functions>, executor=None, "
        "retry=<default: 10 attempts if the failure is transient>, "
        "many=<default: False>, bisect=True, retry_missing=False, rate=None, adaptive=False, pause=True, "
        "patience=300.0, attempt_timeout=None)"
    )


def test_default_given_by_hand_is_as_if_not_given() -> None:
    signature = inspect.signature(run_two_stage).parameters
    defaults: Any = {
        name: signature[name].default for name in ("batch_size", "token_workers", "result_workers", "retry")
    }
    assert run_two_stage("ab", Stage(str.upper, workers=2), ord, **defaults) == [65, 66]
