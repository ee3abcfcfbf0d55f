"""Many tokens for one item: its result is the list of their results."""

from __future__ import annotations

import array
import random
from collections import Counter, deque
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from fakes import Array, ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, stage
from forms import Run, each_way, run
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_fixed

from twostage import iter_two_stage
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = in_virtual_time


def list_orders(customer: int) -> list[str]:
    """Lists none, one, two or three orders of a customer."""
    return [f"{customer}/{order}" for order in range(customer % 4)]


def details(order: str) -> str:
    return f"<{order}>"


def expected(customers: int) -> list[list[str]]:
    return [[details(order) for order in list_orders(customer)] for customer in range(customers)]


def failing(*bad: str, error: Callable[[], Exception] = lambda: ApiError(404)) -> Callable[[str], str]:
    def answer(order: str) -> str:
        if order in bad:
            raise error()
        return details(order)

    return answer


def three_tokens(item: str) -> list[str]:
    return [f"{item}{number}" for number in range(3)]


# --- the item's list


@each_way
@pytest.mark.parametrize("shorthand", [False, True])
def test_result_is_the_list_of_the_tokens_results_in_their_order(job: Run, *, shorthand: bool) -> None:
    rng = random.Random(1)
    detail = Fake(details, lambda _: rng.uniform(0, 10))
    if shorthand:
        results = job(range(200), list_orders, detail, many=True)
    else:
        results = job(range(200), stage(list_orders, many=True), detail)
    assert results == expected(200)
    assert Counter(detail.asked) == Counter(order for item in range(200) for order in list_orders(item))


def test_item_without_tokens_has_an_empty_list_and_no_call() -> None:
    detail = Fake(details)
    outcomes = outcomes_of(range(5000), lambda _: [], detail, many=True)
    assert [(outcome.index, outcome.token, outcome.result) for outcome in outcomes] == [
        (index, [], []) for index in range(5000)
    ]
    assert {(outcome.token_attempts, outcome.result_attempts) for outcome in outcomes} == {(1, 0)}
    assert detail.calls == []
    assert run(range(5000), lambda _: (), detail, many=True) == [[]] * 5000


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "tokens",
    [(3, 1), {3, 1}, frozenset({3, 1}), deque([3, 1]), range(2), array.array("i", [3, 1]), Array(3, 1)],
    ids=lambda tokens: type(tokens).__name__,
)
def test_tokens_may_come_in_any_sized_iterable(
    tokens: Any,  # noqa: ANN401 - what a client may return
    *,
    batched: bool,
) -> None:
    if batched:
        fetch = stage(lambda batch: [tokens] * len(batch), many=True, batch_size=2)
    else:
        fetch = stage(lambda _: tokens, many=True)
    [outcome] = outcomes_of(["item"], fetch, lambda number: -number)
    assert outcome.token == list(tokens)
    assert type(outcome.token) is list
    assert outcome.result == [-number for number in tokens]


no_list = pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("secret", "str"),
        (b"secret", "bytes"),
        ({"secret": 1}, "dict"),
        (None, "NoneType"),
        (7, "int"),
        ((token for token in ["secret"]), "generator"),
    ],
    ids=lambda value: value if isinstance(value, str) and value != "secret" else "",
)


@no_list
def test_answer_that_is_no_list_of_tokens_is_a_type_error_of_one_call(answer: object, kind: str) -> None:
    fetch = Fake(lambda item: answer if item == "b" else [item])
    first, second, third = outcomes_of("abc", fetch, str.upper, many=True)
    assert (first.result, third.result) == (["A"], ["C"])
    assert isinstance(second.exception, TypeError)
    assert kind in str(second.exception)
    assert "secret" not in str(second.exception)
    assert notes(second.exception) == ["twostage: stage one, 'b', 1 attempt"]
    assert sorted(fetch.asked) == ["a", "b", "c"]


@no_list
def test_answer_in_a_batch_that_is_no_list_of_tokens_fails_its_item_alone(answer: object, kind: str) -> None:
    fetch = Fake(each(lambda item: answer if item == "b" else [item]))
    first, second, third = outcomes_of("abc", fetch, str.upper, many=True, batch_size=3)
    assert (first.result, third.result) == (["A"], ["C"])
    assert isinstance(second.exception, TypeError)
    assert kind in str(second.exception)
    assert "secret" not in str(second.exception)
    assert fetch.asked == [["a", "b", "c"]]


@each_way
@pytest.mark.parametrize("mapping", [False, True])
def test_batches_give_a_list_for_each_item(job: Run, *, mapping: bool) -> None:
    def lists(batch: list[int]) -> Any:  # noqa: ANN401 - one of two
        if mapping:
            return {item: list_orders(item) for item in reversed(batch)}
        return [list_orders(item) for item in batch]

    fetch = Fake(lists, 1)
    assert job(range(95), fetch, Fake(details, 1), many=True, batch_size=10) == expected(95)
    assert len(fetch.calls) == 10


def test_equal_tokens_of_one_item_are_positions_of_their_own() -> None:
    token, asked = object(), count()
    assert run(["item"], lambda _: [token, token, token], lambda _: next(asked), many=True) == [[0, 1, 2]]


# --- failures


def test_failed_token_stands_in_its_place_among_the_results() -> None:
    detail = Fake(failing("a1", "b0", "b1", "b2"), 1)
    a, b, c = outcomes_of("abc", three_tokens, detail, many=True)
    assert [a.exception, b.exception, c.exception] == [None, None, None]
    assert a.result[::2] == ["<a0>", "<a2>"]
    assert isinstance(a.result[1], ApiError)
    assert notes(a.result[1]) == ["twostage: stage two, 'a', 1 attempt"]
    assert [type(result) for result in b.result] == [ApiError] * 3
    assert len({id(result) for result in b.result}) == 3
    assert c.result == ["<c0>", "<c1>", "<c2>"]
    assert len(detail.calls) == 9


def test_failed_token_stands_in_its_place_in_the_list_form_too() -> None:
    [[first, second, third]] = run("a", three_tokens, failing("a0"), many=True, return_exceptions=True)
    assert isinstance(first, ApiError)
    assert (second, third) == ("<a1>", "<a2>")


@each_way
@pytest.mark.parametrize(("workers", "most"), [(1, 3), (4, 10)])
def test_failed_token_ends_the_job_and_siblings_that_have_not_begun_are_not_begun(
    job: Run, workers: int, most: int
) -> None:
    detail = Fake(failing("item 2"), 1)
    with pytest.raises(ApiError) as raised:
        job(
            ["item"],
            lambda item: [f"{item} {number}" for number in range(1000)],
            detail,
            many=True,
            result_workers=workers,
        )
    assert notes(raised.value) == ["twostage: stage two, 'item', 1 attempt"]
    assert 3 <= len(detail.calls) <= most


def test_items_that_were_done_before_a_failure_are_handed_over_first() -> None:
    detail = Fake(failing("b1"), lambda order: 10.0 if order == "b1" else 1.0)
    with iter_two_stage("abc", three_tokens, detail, many=True) as outcomes:
        assert [next(outcomes).item, next(outcomes).item] == ["a", "c"]
        with pytest.raises(ApiError):
            next(outcomes)


def test_failure_of_stage_one_is_the_item_s_exception() -> None:
    def fetch(item: str) -> list[str]:
        if item == "b":
            raise ApiError(404)
        return three_tokens(item)

    a, b, c = outcomes_of("abc", fetch, details, many=True)
    assert isinstance(b.exception, ApiError)
    assert (b.token, b.token_attempts, b.result_attempts) == (None, 1, 0)
    assert (a.result, c.result) == (["<a0>", "<a1>", "<a2>"], ["<c0>", "<c1>", "<c2>"])


def test_single_tokens_are_tried_again_and_their_attempts_are_summed() -> None:
    left = Counter({"a1": 2, "b2": 1})

    def answer(order: str) -> str:
        if left[order]:
            left[order] -= 1
            raise ApiError(503)
        return details(order)

    detail = Fake(answer, 1)
    a, b, c = outcomes_of("abc", three_tokens, detail, many=True)
    assert (a.result, b.result) == (["<a0>", "<a1>", "<a2>"], ["<b0>", "<b1>", "<b2>"])
    assert (a.result_attempts, b.result_attempts, c.result_attempts) == (5, 4, 3)
    assert (a.token_attempts, a.token) == (1, ["a0", "a1", "a2"])
    assert Counter(detail.asked) - Counter(order for item in "abc" for order in three_tokens(item)) == {
        "a1": 2,
        "b2": 1,
    }


# --- when outcomes come


def test_item_is_done_when_the_last_of_its_tokens_is(virtual: VirtualTime) -> None:
    latency = {"a0": 1.0, "a1": 9.0, "a2": 2.0}
    with iter_two_stage(
        "abc", three_tokens, Fake(details, lambda order: latency.get(order, 4.0)), many=True
    ) as outcomes:
        times = [(outcome.item, virtual.now) for outcome in outcomes]
    assert times == [("b", 4.0), ("c", 4.0), ("a", 9.0)]


def test_ordered_stream_holds_items_back_behind_the_one_whose_tokens_are_slow() -> None:
    detail = Fake(details, lambda order: 50.0 if order == "a1" else 1.0)
    with iter_two_stage("abc", three_tokens, detail, many=True, ordered=True) as outcomes:
        assert [outcome.item for outcome in outcomes] == ["a", "b", "c"]


# --- an item of very many tokens


@pytest.mark.parametrize(("tokens", "ordered"), [(20_000, False), (100_000, True)])
def test_item_of_very_many_tokens_holds_new_starts_and_the_source_back(tokens: int, *, ordered: bool) -> None:
    read = taken = 0

    def source() -> Iterator[int]:
        nonlocal read
        for item in count():
            read += 1
            assert read - taken <= 3000
            yield item

    fetch = Fake(lambda item: range(tokens) if item == 0 else [item], 1)
    with iter_two_stage(source(), fetch, Fake(int, 1), many=True, window=3000, ordered=ordered) as outcomes:
        for outcome in outcomes:
            taken += 1
            if outcome.index == 0:
                break
        assert outcome.result == list(range(tokens))
        # what was begun before its tokens were known, and then none until the last ones were under way
        assert len(fetch.calls) <= 256 + 150


def test_list_form_puts_very_many_tokens_together() -> None:
    results = run([0, 20_000, 1, 2], range, int, many=True)
    assert results == [[], list(range(20_000)), [0], [0, 1]]


def test_tokens_count_in_progress_before_a_slow_consumer() -> None:
    tokens = 0

    def fetch(item: int) -> list[int]:
        nonlocal tokens
        sleep(1)
        tokens += 100
        return [item] * 100

    with iter_two_stage(count(), fetch, Fake(int, 1), many=True, token_workers=1) as outcomes:
        next(outcomes)
        sleep(10_000)
        before = tokens
        assert before <= 100 * (256 + 4)  # all that were begun as items, when nobody knew
        next(outcomes)
        sleep(10_000)
        assert tokens <= before + 200


# --- with other options


def test_tokens_of_many_items_share_the_batches_of_stage_two() -> None:
    detail = Fake(each(details), 1)
    results = run(
        range(100), list_orders, stage(detail, batch_size=25, workers=2), many=True, token_workers=50
    )
    assert results == expected(100)
    assert max(detail.sizes) == 25
    assert any(len({order.partition("/")[0] for order in asked}) > 1 for asked in detail.asked)
    assert len(detail.calls) < 30  # of 150 tokens


def test_exception_in_a_slot_of_stage_two_stands_in_its_token_s_place() -> None:
    def answer(orders: list[str]) -> list[Any]:
        return [LookupError(order) if order in ("a1", "c0") else details(order) for order in orders]

    outcomes = outcomes_of("abc", three_tokens, stage(answer, batch_size=4), many=True)
    places = [[isinstance(result, LookupError) for result in outcome.result] for outcome in outcomes]
    assert places == [[False, True, False], [False, False, False], [True, False, False]]
    assert [outcome.exception for outcome in outcomes] == [None] * 3


def test_slot_of_stage_two_that_may_pass_is_asked_again_for_its_token_alone() -> None:
    failed: list[str] = []

    def answer(orders: list[str]) -> list[Any]:
        fails = [order for order in orders if order == "b1" and order not in failed]
        failed.extend(fails)
        return [ApiError(503) if order in fails else details(order) for order in orders]

    detail = Fake(answer, 1)
    a, b, _c = outcomes_of("abc", three_tokens, stage(detail, batch_size=9), many=True)
    assert b.result == ["<b0>", "<b1>", "<b2>"]
    assert (a.result_attempts, b.result_attempts) == (3, 4)
    assert detail.asked[-1] == ["b1"]


def test_bad_token_of_a_refused_batch_of_stage_two_fails_alone() -> None:
    def answer(orders: list[str]) -> list[str]:
        if "b1" in orders:
            raise ApiError(400)
        return [details(order) for order in orders]

    a, b, c = outcomes_of("abc", three_tokens, stage(answer, batch_size=9), many=True)
    assert (a.result, c.result) == (["<a0>", "<a1>", "<a2>"], ["<c0>", "<c1>", "<c2>"])
    assert (b.result[0], type(b.result[1]), b.result[2]) == ("<b0>", ApiError, "<b2>")


class Lists:
    """Lists an item's tokens; each list names how often the item was asked for."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths
        self.asked: Counter[str] = Counter()

    def __call__(self, item: str) -> list[str]:
        length = self.lengths[min(self.asked[item], len(self.lengths) - 1)]
        self.asked[item] += 1
        return [f"{item}{self.asked[item]}.{number}" for number in range(length)]


def test_refresh_begins_the_item_again_and_drops_siblings_that_wait() -> None:
    detail = Fake(failing("a1.1", error=ExpiredError), 1)
    [outcome] = outcomes_of("a", Lists(4), detail, many=True, result_workers=1, refresh_token_on=ExpiredError)
    assert outcome.result == ["<a2.0>", "<a2.1>", "<a2.2>", "<a2.3>"]
    assert outcome.token == ["a2.0", "a2.1", "a2.2", "a2.3"]
    assert detail.asked == ["a1.0", "a1.1", "a2.0", "a2.1", "a2.2", "a2.3"]


@pytest.mark.parametrize("late", ["a result", "a failure", "a refresh", "one that may pass"])
@pytest.mark.parametrize("length", [0, 2, 5])
def test_sibling_that_runs_through_a_refresh_is_not_in_the_result(length: int, late: str) -> None:
    errors = {"a failure": ApiError(404), "a refresh": ExpiredError(), "one that may pass": ApiError(503)}

    def answer(order: str) -> str:
        if order == "a1.1":
            raise ExpiredError
        if order == "a1.2" and late in errors:
            raise errors[late]
        return details(order)

    detail = Fake(answer, lambda order: 50.0 if order == "a1.2" else 1.0)
    lists = Lists(3, length)
    a, b = outcomes_of("ab", lists, detail, many=True, refresh_token_on=ExpiredError)
    assert a.exception is None
    assert a.result == [f"<a2.{number}>" for number in range(length)]
    assert b.result == ["<b1.0>", "<b1.1>", "<b1.2>"]
    assert lists.asked == {"a": 2, "b": 1}
    assert detail.asked.count("a1.2") == 1


def test_two_siblings_that_expire_at_once_are_one_refresh() -> None:
    lists = Lists(3)
    expired = ("a1.0", "a1.1", "a1.2")
    [outcome] = outcomes_of(
        "a", lists, Fake(failing(*expired, error=ExpiredError), 1), many=True, refresh_token_on=ExpiredError
    )
    assert outcome.result == ["<a2.0>", "<a2.1>", "<a2.2>"]
    assert lists.asked == {"a": 2}


def test_token_past_the_last_refresh_stands_in_its_place() -> None:
    detail = Fake(failing("a1.1", "a2.1", error=ExpiredError), 1)
    [outcome] = outcomes_of("a", Lists(3), detail, many=True, refresh_token_on=ExpiredError)
    assert outcome.exception is None
    assert (outcome.result[0], type(outcome.result[1]), outcome.result[2]) == (
        "<a2.0>",
        ExpiredError,
        "<a2.2>",
    )


def test_waiting_retry_of_an_old_list_is_dropped_by_a_refresh() -> None:
    def answer(order: str) -> str:
        if order == "a1.0":
            raise ApiError(503)
        if order == "a1.1":
            raise ExpiredError
        return details(order)

    patient = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(100))
    detail = Fake(answer, lambda order: 2.0 if order == "a1.1" else 1.0)
    [outcome] = outcomes_of("a", Lists(2), detail, many=True, refresh_token_on=ExpiredError, retry=patient)
    assert outcome.result == ["<a2.0>", "<a2.1>"]
    assert detail.asked.count("a1.0") == 1


# --- arguments


def test_many_belongs_to_stage_one() -> None:
    with pytest.raises(TypeError, match="many"):
        run("a", str, stage(str, many=True))


def test_many_is_said_once() -> None:
    with pytest.raises(TypeError, match="many"):
        run("a", stage(three_tokens, many=True), str, many=True)


def test_without_many_a_list_is_one_token() -> None:
    assert run("a", three_tokens, len) == [3]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_policy_that_judges_results_sees_what_the_function_returned(batch_size: int | None) -> None:
    late = {"b"}

    def answer(item: str) -> list[str] | None:
        if item in late:
            late.discard(item)
            return None  # not ready
        return [item]

    policy = Retrying(retry=retry_if_result(lambda tokens: tokens is None), stop=stop_after_attempt(3))
    tokens = Fake(answer if batch_size is None else each(answer))
    listed = stage(tokens, batch_size=batch_size, many=True, retry=policy)
    assert [outcome.result for outcome in outcomes_of("ab", listed, str)] == [["a"], ["b"]]
    assert len(tokens.calls) == (3 if batch_size is None else 2)
