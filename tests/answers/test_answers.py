"""What calls may return, what becomes of other answers, and what an `Outcome` says."""

from __future__ import annotations

import array
import asyncio
import copy
import gc
import pickle
from collections import UserList, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import fakes
import pytest
import tenacity

from twostage import BatchLengthError, Outcome, Stage, iter_two_stage, run_two_stage


class ApiError(Exception):
    """A failure that is transient, as its status says."""

    def __init__(self, text: str = "", status: int = 503) -> None:
        super().__init__(text)
        self.status = status


def at_once(attempts: int) -> tenacity.Retrying:
    """Tries again at once, after any exception."""
    return tenacity.Retrying(stop=tenacity.stop_after_attempt(attempts))


def answering(answer: object) -> Callable[[object], Any]:
    return lambda _argument: answer


def outcomes_of(*arguments: Any, **settings: Any) -> list[Outcome[Any, Any, Any]]:  # noqa: ANN401 - any job
    """Returns a job's outcomes in order, the failed ones among them."""
    with iter_two_stage(*arguments, ordered=True, return_exceptions=True, **settings) as outcomes:
        return list(outcomes)


# --- as many tokens as items


@pytest.mark.parametrize(
    ("items", "returned", "expected"),
    [("abc", 2, 3), ("abc", 4, 3), ("abc", 0, 3), ("abcde", 3, 2), ("a", 2, 1)],
)
def test_wrong_number_of_tokens_is_an_error_with_both_numbers(
    items: str, returned: int, expected: int
) -> None:
    calls: list[str] = []

    def fetch_tokens(batch: list[str]) -> list[str]:
        calls.append("".join(batch))
        return ["token"] * (returned if len(batch) == expected else len(batch))

    with pytest.raises(BatchLengthError) as raised:
        run_two_stage(items, fetch_tokens, str, batch_size=3)
    assert (raised.value.expected, raised.value.returned) == (expected, returned)
    assert str(raised.value) == (
        f"fetch_token got {expected} items and returned {returned} tokens; "
        "it must return one token for each item, in the items' order"
    )
    assert len(set(calls)) == len(calls)  # it won't pass by itself, so it isn't tried again


def test_wrong_number_of_tokens_fails_the_items_of_its_batch_alone() -> None:
    def fetch_tokens(batch: list[str]) -> list[str]:
        return batch[:-1] if "c" in batch else batch

    outcomes = outcomes_of("abcde", fetch_tokens, str.upper, batch_size=2)
    errors = [outcome.exception for outcome in outcomes]
    assert isinstance(errors[2], BatchLengthError)
    assert errors == [None, None, errors[2], errors[2], None]
    assert [outcome.result for outcome in outcomes if outcome.exception is None] == ["A", "B", "E"]


def test_wrong_number_of_tokens_is_tried_again_by_a_policy_that_says_so() -> None:
    answers = [["x"], ["x", "y", "z"], ["x", "y"]]
    batch: Stage[str, str] = Stage(lambda _: answers.pop(0), batch_size=2, retry=at_once(3))
    assert run_two_stage("ab", batch, str.upper) == ["X", "Y"]


def test_batch_length_error_can_be_pickled_and_copied() -> None:
    error = BatchLengthError(3, 2)
    error.add_note("a note")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own
        assert type(twin) is BatchLengthError
        assert (twin.expected, twin.returned, str(twin)) == (3, 2, str(error))
        assert twin.__notes__ == ["a note"]
    assert isinstance(error, ValueError)


# --- what a batch may return


class Tokens(Sequence[str]):
    """Tokens that are no list, as a client's own answer may be."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - a slice or an index
        return self.tokens[index]


class Array(fakes.Array):
    """A collection as well, as numpy's are, and compared as they are."""

    def __contains__(self, number: object) -> bool:
        return number in self.numbers

    def __eq__(self, other: object) -> Any:  # noqa: ANN401 - as numpy's: an array of truth values
        return Array(*(number == other for number in self.numbers))

    __hash__ = None  # type: ignore[assignment] # as numpy's


class ListOfItsOwn(list[Any]):
    pass


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2],
        (1, 2),
        ListOfItsOwn([1, 2]),
        UserList([1, 2]),
        deque([1, 2]),
        range(1, 3),
        array.array("i", [1, 2]),
        Array(1, 2),
        Tokens("1", "2"),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_batch_may_return_any_sequence(answer: Any) -> None:  # noqa: ANN401
    assert run_two_stage("ab", answering(answer), int, batch_size=2) == [1, 2]
    with pytest.raises(BatchLengthError) as raised:
        run_two_stage("abc", answering(answer), int, batch_size=3)
    assert (raised.value.expected, raised.value.returned) == (3, 2)


def test_token_and_result_may_be_anything() -> None:
    anything: list[Any] = [None, 0, "", [], {}, "ab", b"ab", [1, 2], {1, 2}, Array(1, 2), ValueError]
    for token in anything:
        single: Stage[str, Any] = Stage(answering(token))
        batch: Stage[str, Any] = Stage(answering([token, token]), batch_size=2)
        for stage in (single, batch):
            results = run_two_stage("ab", stage, lambda given: given)
            assert len(results) == 2
            assert all(result is token for result in results)


def generate() -> Generator[str]:
    yield from "ab"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (None, "NoneType"),
        ("ab", "str"),
        (b"ab", "bytes"),
        (bytearray(b"ab"), "bytearray"),
        ({"a": 1, "b": 2}.keys(), "dict_keys"),
        ({"a": 1, "b": 2}.items(), "dict_items"),
        ({"a", "b"}, "set"),
        (frozenset("ab"), "frozenset"),
        (generate(), "generator"),
        (iter(["a", "b"]), "list_iterator"),
        (map(str, "ab"), "map"),
        (2, "int"),
        (2.0, "float"),
        (True, "bool"),
        (object(), "object"),
        (list, "type"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) > 2 else "",
)
def test_batch_answer_that_is_no_sequence_is_a_type_error(answer: object, kind: str) -> None:
    message = (
        f"^fetch_token returned {kind} for a batch; expected a list .* with one token for each item, "
        "in the items' order"
    )
    with pytest.raises(TypeError, match=message) as raised:
        run_two_stage("ab", answering(answer), str, batch_size=2)
    assert raised.value.__notes__ == ["twostage: stage one, 2 items from 'a', 1 attempt"]
    first, second = outcomes_of("ab", answering(answer), str, batch_size=2)
    assert isinstance(first.exception, TypeError)
    assert first.exception is second.exception


class BrokenTokens(Tokens):
    """An answer that breaks when it is looked at."""

    def __len__(self) -> int:
        raise LookupError("an answer's own mistake")


class LazyTokens(Tokens):
    """An answer that breaks when it is read."""

    def __iter__(self) -> Iterator[str]:
        yield "a"
        raise LookupError("an answer's own mistake")


@pytest.mark.parametrize("answer", [BrokenTokens("a", "b"), LazyTokens("a", "b")])
def test_answer_that_breaks_is_a_failure_of_its_call(answer: Tokens) -> None:
    def fetch_tokens(batch: list[str]) -> Sequence[str]:
        return answer if "a" in batch else batch

    first, second, third = outcomes_of("abc", fetch_tokens, str.upper, batch_size=2)
    assert isinstance(first.exception, LookupError)
    assert first.exception is second.exception
    assert (first.token, first.token_attempts, third.result) == (None, 1, "C")
    with pytest.raises(LookupError) as raised:
        run_two_stage("ab", fetch_tokens, str, batch_size=2)
    assert raised.value.__notes__ == ["twostage: stage one, 2 items from 'a', 1 attempt"]


@pytest.mark.parametrize("length", [1, 3])
def test_answer_with_another_number_of_tokens_than_it_says_is_a_batch_length_error(length: int) -> None:
    class Lying(Tokens):
        def __iter__(self) -> Iterator[str]:
            return iter("xyz"[:length])

    first, second, third = outcomes_of(
        "abc", lambda batch: Lying("x", "y") if "a" in batch else batch, str.upper, batch_size=2
    )
    assert isinstance(first.exception, BatchLengthError)
    assert (first.exception.expected, first.exception.returned) == (2, length)
    assert first.exception is second.exception
    assert third.result == "C"


@pytest.mark.parametrize("answer", [BrokenTokens("a", "b"), None, ["a"]], ids=["broken", "None", "short"])
def test_bad_answer_may_be_tried_again(answer: object) -> None:
    answers = [answer, ["x", "y"]]
    batch: Stage[str, str] = Stage(lambda _: answers.pop(0), batch_size=2, retry=at_once(2))  # type: ignore[arg-type]
    outcomes = outcomes_of("ab", batch, str.upper)
    assert [(outcome.result, outcome.token_attempts) for outcome in outcomes] == [("X", 2), ("Y", 2)]


# --- a list of its own


def test_each_attempt_gets_a_list_of_its_own() -> None:
    lists: list[list[str]] = []
    seen: list[list[str]] = []

    def fetch_tokens(batch: list[str]) -> list[str]:
        seen.append(batch.copy())
        lists.append(batch)
        tokens = [item.upper() for item in batch]
        batch.clear()
        batch.append("spoilt")
        if len(lists) < 3:
            raise ApiError
        return tokens

    stage = Stage(fetch_tokens, batch_size=2, retry=at_once(3))
    outcomes = outcomes_of("ab", stage, str.lower)
    assert seen == [["a", "b"]] * 3
    assert len(set(map(id, lists))) == 3
    assert [(outcome.item, outcome.token, outcome.result) for outcome in outcomes] == [
        ("a", "A", "a"),
        ("b", "B", "b"),
    ]


def test_batch_may_return_its_own_list() -> None:
    def fetch_tokens(batch: list[str]) -> list[str]:
        batch[:] = [item.upper() for item in batch]
        return batch

    outcomes = outcomes_of("abc", fetch_tokens, str.lower, batch_size=2)
    assert [(outcome.item, outcome.token) for outcome in outcomes] == [("a", "A"), ("b", "B"), ("c", "C")]


# --- functions that turn out to be coroutine functions


async def coroutine_function(argument: object) -> object:
    return argument


class Waiting:
    """Awaitable, and no coroutine."""

    def __await__(self) -> Generator[None, None, str]:
        yield
        return "result"


def future(_argument: object) -> asyncio.Future[object]:
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()


awaiting = pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda argument: coroutine_function(argument), "coroutine"),  # noqa: PLW0108 - no coroutine function
        (lambda _: Waiting(), "Waiting"),
        (future, "Future"),
    ],
    ids=["lambda", "awaitable", "future"],
)


@awaiting
def test_answer_to_be_awaited_is_a_type_error(function: Callable[[object], object], kind: str) -> None:
    message = f"returned a {kind}, which has to be awaited; expected a plain function"
    in_batches: Any = Stage(function, batch_size=2)  # type: ignore[arg-type]
    for fetch_token in (function, in_batches):
        with pytest.raises(TypeError, match=f"^fetch_token {message}"):
            run_two_stage("ab", fetch_token, str)
    with pytest.raises(TypeError, match=f"^fetch_result {message}"):
        run_two_stage("ab", str, function)
    gc.collect()  # a coroutine that was never awaited says so now, which is an error here


@awaiting
def test_answer_to_be_awaited_is_no_result_either(function: Callable[[object], object], kind: str) -> None:
    calls: list[object] = []

    def counted(argument: object) -> object:
        calls.append(argument)
        return function(argument)

    for stages in ((counted, str), (str, counted)):
        calls.clear()
        errors: list[Any] = run_two_stage("ab", *stages, return_exceptions=True)
        assert [type(error) for error in errors] == [TypeError, TypeError]
        assert sorted(map(str, calls)) == ["a", "b"]  # once each: it won't pass by itself
        assert errors[0].__notes__ in (
            ["twostage: stage one, 'a', 1 attempt"],
            ["twostage: stage two, 'a', 1 attempt"],
        )
    gc.collect()


# --- an outcome


def half_failing(letter: str) -> str:
    if letter in "BD":
        raise ApiError("secret text", 400)
    return f"secret {letter}"


def test_outcome_has_all_that_became_of_its_item() -> None:
    outcomes = outcomes_of("abcd", str.upper, half_failing)
    assert [(outcome.index, outcome.item, outcome.token) for outcome in outcomes] == [
        (0, "a", "A"),
        (1, "b", "B"),
        (2, "c", "C"),
        (3, "d", "D"),
    ]
    assert [type(outcome.exception) for outcome in outcomes] == [type(None), ApiError, type(None), ApiError]
    assert [outcome.result for outcome in outcomes if outcome.exception is None] == ["secret A", "secret C"]
    assert [(outcome.token_attempts, outcome.result_attempts) for outcome in outcomes] == [(1, 1)] * 4
    assert all(type(outcome) is Outcome for outcome in outcomes)


def test_outcome_of_a_failed_stage_one_has_neither_token_nor_a_call_of_stage_two() -> None:
    [outcome] = outcomes_of(["B"], half_failing, str, retry=at_once(3))
    assert (outcome.item, outcome.token, outcome.token_attempts, outcome.result_attempts) == ("B", None, 3, 0)
    [outcome] = outcomes_of(["b"], str.upper, half_failing, retry=at_once(4))
    assert (outcome.item, outcome.token, outcome.token_attempts, outcome.result_attempts) == ("b", "B", 1, 4)


def test_result_of_a_failed_outcome_is_its_exception_raised() -> None:
    [outcome] = outcomes_of(["b"], str.upper, half_failing)
    for _ in range(2):
        with pytest.raises(ApiError) as raised:
            print(outcome.result)
        assert raised.value is outcome.exception


def test_result_of_none_is_a_result() -> None:
    [outcome] = outcomes_of(["a"], str, answering(None))
    assert outcome.result is None
    assert outcome.exception is None


def test_exception_as_a_result_is_a_result() -> None:
    error = ApiError()
    [outcome] = outcomes_of(["a"], str, answering(error))
    assert outcome.result is error
    assert outcome.exception is None


def test_repr_shows_neither_token_nor_result_nor_an_exception_s_text() -> None:
    def fetch_result(token: str) -> str:
        if token.endswith("b"):
            raise ApiError("secret text")
        return "secret result"

    done, failed = outcomes_of(["a", "x" * 99 + "b"], "secret {}".format, fetch_result, retry=None)
    assert repr(done) == "<Outcome 0 of item 'a': done>"
    assert repr(failed) == "<Outcome 1 of item 'xxxxxxxxxxxx...xxxxxxxxxxxxb': ApiError>"


# --- failures as outcomes


def test_return_exceptions_puts_each_in_its_item_s_place() -> None:
    results = run_two_stage("abcd", str.upper, half_failing, return_exceptions=True)
    assert [str(result) for result in results] == ["secret A", "secret text", "secret C", "secret text"]
    assert [isinstance(result, ApiError) for result in results] == [False, True, False, True]


def test_failed_outcome_is_handed_over_among_the_others() -> None:
    with iter_two_stage("abcd", str.upper, half_failing, return_exceptions=True) as outcomes:
        failed = {outcome.item: outcome.exception is not None for outcome in outcomes}
    assert failed == {"a": False, "b": True, "c": False, "d": True}


@pytest.mark.parametrize("ordered", [False, True])
def test_first_failure_is_raised_from_next_without_return_exceptions(*, ordered: bool) -> None:
    with iter_two_stage("abcd", str.upper, half_failing, ordered=ordered, result_workers=1) as outcomes:
        assert next(outcomes).item == "a"
        with pytest.raises(ApiError):
            list(outcomes)
        assert list(outcomes) == []


@pytest.mark.parametrize("exception", [KeyError("gone"), ApiError(status=404), StopIteration("early")])
def test_failed_batch_gives_its_exception_to_each_of_its_items(exception: Exception) -> None:
    def fetch_tokens(batch: list[str]) -> list[str]:
        if "d" in batch:
            raise exception
        return batch

    results = run_two_stage("abcdefgh", fetch_tokens, str.upper, batch_size=3, return_exceptions=True)
    assert results == ["A", "B", "C", exception, exception, exception, "G", "H"]
    outcomes = outcomes_of("abcdefgh", fetch_tokens, str.upper, batch_size=3)
    assert [outcome.exception for outcome in outcomes] == [None] * 3 + [exception] * 3 + [None] * 2
    assert [outcome.token_attempts for outcome in outcomes] == [1] * 8
    assert exception.__notes__ == ["twostage: stage one, 3 items from 'd', 1 attempt"]  # once


def test_many_failures_are_each_its_item_s_own() -> None:
    def fetch_result(token: int) -> int:
        if token % 3 == 0:
            raise ApiError(str(token), 404)
        return token

    results = run_two_stage(range(1000), int, fetch_result, return_exceptions=True)
    for item, result in enumerate(results):
        if item % 3:
            assert result == item
        else:
            assert isinstance(result, ApiError)
            assert str(result) == str(item)
            assert result.__notes__ == [f"twostage: stage two, {item}, 1 attempt"]


# --- the note


def failing(attempts: int = 1) -> Stage[Any, Any]:
    def fetch(_: object) -> str:
        raise ApiError("secret text", 400)

    return Stage(fetch, retry=at_once(attempts))


def failing_batch(size: int, attempts: int = 1) -> Stage[Any, Any]:
    stage = failing(attempts)
    return Stage(stage.fetch, batch_size=size, retry=stage.retry, bisect=False)


@pytest.mark.parametrize(
    ("items", "stages", "note"),
    [
        ("a", (failing(), str), "twostage: stage one, 'a', 1 attempt"),
        ("a", (failing(3), str), "twostage: stage one, 'a', 3 attempts"),
        ("a", (answering("secret token"), failing(2)), "twostage: stage two, 'a', 2 attempts"),
        ("ab", (failing_batch(2), str), "twostage: stage one, 2 items from 'a', 1 attempt"),
        ("a", (failing_batch(2), str), "twostage: stage one, 'a', 1 attempt"),
        ([{"id": 7}], (failing(), str), "twostage: stage one, {'id': 7}, 1 attempt"),
        (
            ["x" * 99],
            (failing_batch(5, 2), str),
            "twostage: stage one, 'xxxxxxxxxxxx...xxxxxxxxxxxxx', 2 attempts",
        ),
    ],
)
def test_note_says_stage_item_and_attempts(items: Any, stages: tuple[Any, Any], note: str) -> None:  # noqa: ANN401
    with pytest.raises(ApiError) as raised:
        run_two_stage(items, *stages)
    assert raised.value.__notes__ == [note]
    with iter_two_stage(items, *stages) as outcomes, pytest.raises(ApiError) as raised:
        next(outcomes)
    assert raised.value.__notes__ == [note]
    outcome = outcomes_of(items, *stages)[0]
    assert outcome.exception is not None
    assert outcome.exception.__notes__ == [note]


class BrokenRepr:
    def __repr__(self) -> str:
        raise LookupError("an item's own mistake")


def test_item_that_has_no_repr_does_no_harm() -> None:
    item = BrokenRepr()
    [error] = run_two_stage([item], failing(), str, return_exceptions=True)
    assert isinstance(error, ApiError)
    assert error.__notes__ == [f"twostage: stage one, <BrokenRepr instance at {id(item):#x}>, 1 attempt"]
