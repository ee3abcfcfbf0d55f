"""What a batch call may answer: by key, with failures in slots, and with what a policy refuses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
from fakes import Fake, each, in_virtual_time, notes, outcomes_of, stage
from forms import Run, each_way
from tenacity import RetryError, Retrying, retry_if_exception, retry_if_result, stop_after_attempt, wait_fixed

from twostage import MissingToken, Stage, is_transient, iter_two_stage, run_two_stage
from twostage.testing import ApiError, VirtualTime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tenacity import RetryCallState


pytestmark = in_virtual_time


def waiting(seconds: float = 5, attempts: int = 3, **more: Any) -> Retrying:  # noqa: ANN401 - passed on
    more.setdefault("retry", retry_if_exception(is_transient))
    return Retrying(stop=stop_after_attempt(attempts), wait=wait_fixed(seconds), **more)


def by_key(batch: list[Any]) -> dict[Any, str]:
    return {item: f"<{item}>" for item in reversed(batch)}


class Once:
    """Fails, or leaves out, each of some items as often as is said."""

    def __init__(self, **times: int) -> None:
        self.left = Counter(times)

    def __call__(self, item: str) -> bool:
        self.left[item] -= 1
        return self.left[item] >= 0


# --- by key


class Other(Mapping[Any, Any]):
    """A mapping that is no dict."""

    def __init__(self, values: dict[Any, Any]) -> None:
        self.values_of = values

    def __getitem__(self, key: object) -> object:
        return self.values_of[key]

    def __len__(self) -> int:
        return len(self.values_of)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values_of)


@each_way
@pytest.mark.parametrize("kind", [dict, Other])
def test_answer_by_key_gives_each_item_its_own_token(job: Run, kind: Callable[[Any], Any]) -> None:
    def fetch_tokens(batch: list[int]) -> object:
        return kind(by_key(batch) | {"more": "than was asked for", -1: "<>"})

    tokens = stage(fetch_tokens, batch_size=4)
    assert job(range(10), tokens, str) == [f"<{item}>" for item in range(10)]


def test_item_that_is_left_out_fails_alone_and_once() -> None:
    tokens = Fake(lambda batch: {item: item for item in batch if item != "b"})
    a, b, c = outcomes_of("abc", stage(tokens, batch_size=3), str.upper)
    assert (a.result, c.result) == ("A", "C")
    assert isinstance(b.exception, MissingToken)
    assert isinstance(b.exception, LookupError)
    assert not is_transient(b.exception)
    assert str(b.exception) == "fetch_token returned a dict that does not have it"
    assert notes(b.exception) == ["twostage: stage one, 'b', 1 attempt"]
    assert tokens.asked == [["a", "b", "c"]]


def test_each_item_that_is_left_out_has_a_failure_of_its_own() -> None:
    a, b = outcomes_of("ab", stage(lambda _: {}, batch_size=2), str)
    assert isinstance(a.exception, MissingToken)
    assert isinstance(b.exception, MissingToken)
    assert a.exception is not b.exception
    assert notes(b.exception) == ["twostage: stage one, 'b', 1 attempt"]


def test_keys_of_another_type_are_named() -> None:
    answers = stage(lambda batch: {str(item): "secret" for item in batch}, batch_size=2)
    for outcome in outcomes_of([1, 2], answers, str):
        assert str(outcome.exception) == (
            "fetch_token returned a dict that has none of the items: "
            "they are of type int, and its keys of type str"
        )
    at_two: Any = stage(lambda tokens: {token.encode(): "secret" for token in tokens}, batch_size=2)
    for outcome in outcomes_of("ab", str, at_two):
        assert str(outcome.exception).endswith("the tokens: they are of type str, and its keys of type bytes")


def test_answer_that_makes_keys_up_gives_no_token_to_what_it_has_left_out() -> None:
    def fetch_tokens(batch: list[str]) -> dict[str, str]:
        answer: defaultdict[str, str] = defaultdict(lambda: "made up")
        answer[batch[0]] = "token"
        return answer

    first, second = outcomes_of("ab", stage(fetch_tokens, batch_size=2), str)
    assert first.result == "token"
    assert isinstance(second.exception, MissingToken)


def test_unhashable_item_and_an_answer_by_key_are_a_type_error() -> None:
    tokens = Fake(lambda _: {"a": 1})
    for outcome in outcomes_of([{"id": 1}, {"id": 2}], stage(tokens, batch_size=2), str):
        assert isinstance(outcome.exception, TypeError)
        assert str(outcome.exception) == (
            "fetch_token returned dict for a batch, but a dict can't be a key in it; "
            "expected a list, in the order of the items"
        )
    assert len(tokens.calls) == 1


def test_mapping_that_raises_fails_its_batch_with_that() -> None:
    class Broken(Other):
        def __getitem__(self, _: object) -> object:
            raise ZeroDivisionError

    first, _ = outcomes_of("ab", stage(lambda _: Broken({"a": 1}), batch_size=2), str)
    assert isinstance(first.exception, ZeroDivisionError)


def test_missing_items_are_asked_for_again_and_no_others(virtual: VirtualTime) -> None:
    late = Once(b=1, d=2)
    tokens = Fake(lambda batch: {item: item for item in batch if not late(item)}, 1, virtual=virtual)
    outcomes = outcomes_of("abcd", stage(tokens, batch_size=4, retry=waiting(), retry_missing=True), str)
    assert [outcome.result for outcome in outcomes] == list("abcd")
    assert [outcome.token_attempts for outcome in outcomes] == [1, 2, 1, 3]
    assert tokens.asked == [list("abcd"), ["b", "d"], ["d"]]
    assert [made.began for made in tokens.calls] == [0, 6, 12]


def test_missing_item_is_given_up_as_the_policy_has_it() -> None:
    tokens = Fake(lambda batch: {item: item for item in batch if item == "a"})
    a, b = outcomes_of("ab", stage(tokens, batch_size=2, retry=waiting(), retry_missing=True), str)
    assert a.result == "a"
    assert isinstance(b.exception, MissingToken)
    assert notes(b.exception) == ["twostage: stage one, 'b', 3 attempts"]
    assert tokens.asked == [["a", "b"], ["b"], ["b"]]


def test_retry_missing_needs_batches() -> None:
    with pytest.raises(TypeError, match=r"^fetch_token's Stage has retry_missing=True, but no batch_size"):
        run_two_stage("ab", Stage(str, retry_missing=True), str)
    with pytest.raises(TypeError, match=r"^retry_missing is 1; expected True or False"):
        stage(str, batch_size=2, retry_missing=1)


# --- failures in slots


def failing(
    error: Callable[[], BaseException], chosen: Callable[[str], bool]
) -> Callable[[list[Any]], list[Any]]:
    return each(lambda item: error() if chosen(item) else item)


@each_way
def test_failure_in_a_slot_is_that_item_s_alone(job: Run) -> None:
    tokens = stage(failing(lambda: ApiError(404), "b".__eq__), batch_size=3)
    a, b, c = job("abc", tokens, str.upper, return_exceptions=True)
    assert (a, c) == ("A", "C")
    assert isinstance(b, ApiError)
    assert notes(b) == ["twostage: stage one, 'b', 1 attempt"]


@each_way
def test_failure_in_a_slot_ends_the_job_where_no_exceptions_are_wanted(job: Run) -> None:
    with pytest.raises(ApiError) as raised:
        job("abc", stage(failing(lambda: ApiError(404), "b".__eq__), batch_size=3), str.upper)
    assert notes(raised.value) == ["twostage: stage one, 'b', 1 attempt"]


def test_answers_beside_the_failure_that_ends_the_job_are_handed_over() -> None:
    results = stage(failing(lambda: ApiError(404), "a".__eq__), batch_size=3)
    taken: list[str] = []
    with iter_two_stage("abc", stage(list, batch_size=3), results) as outcomes:  # noqa: SIM117 - raised by it
        with pytest.raises(ApiError):
            taken.extend(outcome.item for outcome in outcomes)
    assert sorted(taken) == ["b", "c"]


def test_slots_to_be_tried_again_are_one_call_with_one_wait(virtual: VirtualTime) -> None:
    waits: list[int] = []
    told: list[int] = []

    def wait(state: RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 5.0

    late = Once(b=2, d=1)
    policy = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(9),
        wait=wait,
        before_sleep=lambda state: told.append(state.attempt_number),
    )
    tokens = Fake(failing(lambda: ApiError(503), late), 1, virtual=virtual)
    outcomes = outcomes_of("abcdefgh", stage(tokens, batch_size=4, workers=1, retry=policy), str)
    assert [outcome.result for outcome in outcomes] == list("abcdefgh")
    # The other batch is not merged with them, nor do they go before they are due.
    assert tokens.asked == [list("abcd"), list("efgh"), ["b", "d"], ["b"]]
    assert [made.began for made in tokens.calls] == [0, 1, 6, 12]
    assert [outcome.token_attempts for outcome in outcomes] == [1, 3, 1, 2, 1, 1, 1, 1]
    assert (waits, told) == ([1, 2], [1, 2])


def test_lasting_and_passing_failures_in_one_answer_part() -> None:
    late = Once(b=1)

    def answer(item: str) -> object:
        return ApiError(503) if late(item) else ApiError(404) if item == "c" else item

    tokens = Fake(each(answer))
    a, b, c = outcomes_of("abc", stage(tokens, batch_size=3, retry=waiting()), str)
    assert (a.result, b.result) == ("a", "b")
    assert isinstance(c.exception, ApiError)
    assert c.exception.status == 404
    assert tokens.asked == [list("abc"), ["b"]]


def test_slots_that_are_given_up_have_their_own_failures() -> None:
    tokens = Fake(each(lambda item: item if item == "a" else ApiError(503)))
    a, b, c = outcomes_of("abc", stage(tokens, batch_size=3, retry=waiting()), str)
    assert a.result == "a"
    assert isinstance(b.exception, ApiError)
    assert isinstance(c.exception, ApiError)
    assert b.exception is not c.exception
    assert notes(c.exception) == ["twostage: stage one, 'c', 3 attempts"]
    assert len(tokens.calls) == 3


def test_one_exception_in_all_slots_is_noted_once() -> None:
    error = ApiError(404)
    a, b = outcomes_of("ab", stage(lambda batch: [error] * len(batch), batch_size=2), str)
    assert a.exception is error
    assert b.exception is error
    assert len(notes(error)) == 1


def test_failures_by_key_are_as_those_in_a_list() -> None:
    late = Once(b=1)
    tokens = Fake(lambda batch: {item: ApiError(503) if late(item) else item for item in batch})
    outcomes = outcomes_of("abc", stage(tokens, batch_size=3, retry=waiting()), str)
    assert [outcome.result for outcome in outcomes] == list("abc")
    assert tokens.asked == [list("abc"), ["b"]]


@each_way
def test_base_exception_in_a_slot_ends_the_job(job: Run) -> None:
    tokens = stage(failing(SystemExit, "b".__eq__), batch_size=3)
    with pytest.raises(SystemExit):
        job("abc", tokens, str, return_exceptions=True)


@each_way
def test_exception_that_an_unbatched_function_returns_is_a_value(job: Run) -> None:
    error = ApiError(503)
    calls = Fake(lambda _: error)
    assert job("a", calls, lambda token: token is error) == [True]
    assert job("a", str, calls, return_exceptions=False) == [error]
    assert len(calls.calls) == 2


# --- what a policy refuses


def test_policy_that_judges_results_judges_each_slot(virtual: VirtualTime) -> None:
    late = Once(b=1, d=2)
    tokens = Fake(each(lambda item: None if late(item) else item), 1, virtual=virtual)
    policy = waiting(retry=retry_if_result(lambda token: token is None))
    outcomes = outcomes_of("abcd", stage(tokens, batch_size=4, retry=policy), str)
    assert [outcome.result for outcome in outcomes] == list("abcd")
    assert tokens.asked == [list("abcd"), ["b", "d"], ["d"]]
    assert [made.began for made in tokens.calls] == [0, 6, 12]
    assert [outcome.token_attempts for outcome in outcomes] == [1, 2, 1, 3]


def test_slot_that_is_refused_to_the_end_is_a_retry_error_alone() -> None:
    policy = waiting(retry=retry_if_result("b".__eq__))
    a, b = outcomes_of("ab", stage(list, batch_size=2, retry=policy), str)
    assert a.result == "a"
    assert isinstance(b.exception, RetryError)
    assert notes(b.exception) == ["twostage: stage one, 'b', 3 attempts"]


def test_error_callback_gives_a_value_for_its_slot() -> None:
    policy = waiting(retry=retry_if_result("a".__ne__), retry_error_callback=lambda _: "instead")
    outcomes = outcomes_of("abc", stage(list, batch_size=3, retry=policy), str)
    assert [outcome.result for outcome in outcomes] == ["a", "instead", "instead"]


def test_error_callback_s_exception_is_its_slot_s_failure() -> None:
    policy = waiting(retry_error_callback=lambda _: LookupError("given up"))
    tokens = each(lambda item: item if item == "a" else ApiError(503))
    a, b = outcomes_of("ab", stage(tokens, batch_size=2, retry=policy), str)
    assert a.result == "a"
    assert isinstance(b.exception, LookupError)


# --- calls that must not be repeated


@pytest.mark.parametrize("none", [None, Retrying(enabled=False)], ids=["None", "enabled=False"])
@pytest.mark.parametrize("answer", [lambda _: {}, each(lambda _: ApiError(503))], ids=["missing", "slots"])
def test_nothing_is_sent_again_where_there_is_no_retry(none: Any, answer: Any) -> None:  # noqa: ANN401
    tokens = Fake(answer)
    outcomes = outcomes_of("abc", stage(tokens, batch_size=3, retry=none, retry_missing=True), str)
    assert all(isinstance(outcome.exception, (ApiError, MissingToken)) for outcome in outcomes)
    assert len(tokens.calls) == 1


def test_no_text_shows_a_token_or_a_result(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "twostage")
    late = Once(a=1)

    def fetch_results(tokens: list[str]) -> dict[str, object]:
        return {token: ApiError(503) if late(token[-1]) else "secret" for token in tokens if token[-1] != "b"}

    at_two = stage(fetch_results, batch_size=9, retry=waiting())
    outcomes = outcomes_of("abc", stage(each("secret {}".format), batch_size=3), at_two)
    assert isinstance(outcomes[1].exception, MissingToken)
    shown = [repr(outcomes), caplog.text, *(f"{one.exception!r} {notes(one.exception)}" for one in outcomes)]
    assert "secret" not in "".join(shown)
    assert "ApiError, status 503" in caplog.text
