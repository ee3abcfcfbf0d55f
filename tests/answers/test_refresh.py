"""Tokens that expire: their items go back to stage one for new ones."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS
from fakes import ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, stage
from forms import Run, each_way, run
from tenacity import Retrying, stop_after_attempt, wait_fixed

from twostage import iter_two_stage
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class OutdatedError(ExpiredError):
    """A subclass of what is named."""


class Tokens:
    """Gives each item a token that names the item and how often it was asked for: (item, 1), ..."""

    def __init__(self) -> None:
        self.given: Counter[Any] = Counter()

    def __call__(self, item: Any) -> tuple[Any, int]:  # noqa: ANN401 - any items
        self.given[item] += 1
        return item, self.given[item]


def expiring(
    times: dict[Any, int], error: Callable[[], Exception] = ExpiredError
) -> Callable[[tuple[Any, int]], Any]:
    """Makes a function that refuses so many first tokens of each item, and gives the item else."""

    def answer(token: tuple[Any, int]) -> Any:  # noqa: ANN401 - any items
        item, version = token
        if version <= times.get(item, 0):
            raise error()
        return item

    return answer


# --- what is refreshed


@in_virtual_time
@pytest.mark.parametrize(
    "refresh_token_on",
    [ExpiredError, (OSError, ExpiredError), lambda error: "late" in str(error), Exception],
    ids=["type", "tuple", "predicate", "base"],
)
@pytest.mark.parametrize("batch_size", [None, 10])
def test_expired_token_is_replaced(refresh_token_on: object, batch_size: int | None) -> None:
    tokens = Tokens()
    fetch = tokens if batch_size is None else stage(each(tokens), batch_size=batch_size)
    results = Fake(expiring({3: 1, 7: 1}, lambda: OutdatedError("too late")), 1)
    outcomes = outcomes_of(range(10), fetch, results, refresh_token_on=refresh_token_on)
    assert [outcome.result for outcome in outcomes] == list(range(10))
    assert [outcome.token for outcome in outcomes] == [
        (item, 2 if item in (3, 7) else 1) for item in range(10)
    ]
    assert tokens.given == {item: 2 if item in (3, 7) else 1 for item in range(10)}


@in_virtual_time
@pytest.mark.parametrize(
    "refresh_token_on",
    [OutdatedError, (OSError, OutdatedError), lambda _: False],
    ids=["type", "tuple", "no"],
)
def test_other_failure_is_no_refresh(refresh_token_on: object) -> None:
    tokens = Tokens()
    results = run("ab", tokens, expiring({"a": 1}), refresh_token_on=refresh_token_on, return_exceptions=True)
    assert [type(results[0]), results[1]] == [ExpiredError, "b"]
    assert tokens.given == {"a": 1, "b": 1}


@in_virtual_time
def test_predicate_is_asked_about_what_the_function_raised() -> None:
    error, asked = ApiError(401), []

    def judge(raised: Exception) -> bool:
        asked.append(raised)
        return False

    def fail(_: object) -> None:
        raise error

    [outcome] = outcomes_of("a", str, fail, refresh_token_on=judge)
    assert outcome.exception is error
    assert asked == [error]


@in_virtual_time
def test_stage_one_s_own_failure_is_no_refresh() -> None:
    def fail(_: object) -> None:
        raise ExpiredError

    tokens = Fake(fail)
    [outcome] = outcomes_of("a", tokens, str, refresh_token_on=ExpiredError, max_refreshes=5)
    assert isinstance(outcome.exception, ExpiredError)
    assert notes(outcome.exception) == ["twostage: stage one, 'a', 1 attempt"]
    assert len(tokens.calls) == 1


@in_virtual_time
def test_exception_that_is_returned_for_one_token_is_a_result() -> None:
    error, tokens = ExpiredError(), Tokens()
    assert run("a", tokens, lambda _: error, refresh_token_on=ExpiredError) == [error]
    assert tokens.given == {"a": 1}


@in_virtual_time
@each_way
def test_each_form_gives_the_same(job: Run) -> None:
    results = Fake(expiring(dict.fromkeys(range(0, 100, 7), 1)), lambda token: 1.0 + token[0] % 3)
    fetch = stage(each(Tokens()), batch_size=10)
    assert job(range(100), fetch, results, refresh_token_on=ExpiredError) == list(range(100))


@pytest.mark.parametrize("of_one_s_own", [False, True])
def test_every_item_has_its_result_on_real_threads(*, of_one_s_own: bool) -> None:
    expires = dict.fromkeys(random.Random(1).sample(range(2000), 400), 2)
    tokens = Tokens()
    with ThreadPoolExecutor(8) as executor:
        own = executor if of_one_s_own else None
        results = run(
            range(2000),
            stage(each(tokens), batch_size=20, workers=2, executor=own),
            stage(expiring(expires), workers=6, executor=own),
            refresh_token_on=ExpiredError,
            max_refreshes=2,
        )
    assert results == list(range(2000))
    assert tokens.given == {item: 3 if item in expires else 1 for item in range(2000)}


# --- how often


@in_virtual_time
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("retry", [10, ALWAYS], ids=["default", "retries anything"])
def test_failure_past_the_last_refresh_is_the_outcome_and_is_not_tried_again(
    retry: Retrying | int, most: int
) -> None:
    tokens, results = Fake(Tokens(), 1), Fake(expiring({"a": 99}), 1)
    settings = {"retry": retry, "refresh_token_on": ExpiredError, "max_refreshes": most}
    a, b = outcomes_of("ab", tokens, results, **settings)
    assert type(a.exception) is ExpiredError
    assert notes(a.exception) == ["twostage: stage two, 'a', 1 attempt"]
    assert b.result == "b"
    assert tokens.asked.count("a") == 1 + most
    assert len(results.calls) == 1 + most + 1


@in_virtual_time
def test_an_item_is_refreshed_once_by_default() -> None:
    tokens = Tokens()
    a, b = outcomes_of("ab", tokens, expiring({"a": 2, "b": 1}), refresh_token_on=ExpiredError)
    assert (type(a.exception), b.result) == (ExpiredError, "b")
    assert tokens.given == {"a": 2, "b": 2}


@in_virtual_time
@each_way
def test_failure_past_the_last_refresh_ends_the_job_where_no_exceptions_are_wanted(job: Run) -> None:
    with pytest.raises(ExpiredError) as raised:
        job("a", Tokens(), expiring({"a": 9}), refresh_token_on=ExpiredError)
    assert notes(raised.value) == ["twostage: stage two, 'a', 1 attempt"]


@in_virtual_time
def test_job_whose_tokens_all_expire_ends() -> None:
    tokens = Tokens()
    with iter_two_stage(
        range(1000),
        stage(each(tokens), batch_size=10),
        Fake(expiring(dict.fromkeys(range(1000), 99)), 1),
        refresh_token_on=ExpiredError,
        max_refreshes=3,
        return_exceptions=True,
        window=50,
    ) as outcomes:
        assert {type(outcome.exception) for outcome in outcomes} == {ExpiredError}
    assert set(tokens.given.values()) == {4}
    assert len(tokens.given) == 1000


# --- attempts and policies


@in_virtual_time
def test_attempts_of_stage_two_begin_afresh() -> None:
    fails = Counter({("a", 1): 2, ("a", 2): 2})

    def answer(token: tuple[str, int]) -> str:
        if fails[token]:
            fails[token] -= 1
            raise ApiError(503)
        return expiring({"a": 1})(token)  # type: ignore[no-any-return]

    results = Fake(answer)
    [outcome] = outcomes_of("a", Tokens(), results, retry=3, refresh_token_on=ExpiredError)
    assert outcome.result == "a"
    assert outcome.result_attempts == 3
    assert results.asked == [("a", 1)] * 3 + [("a", 2)] * 3


def test_refresh_is_judged_before_the_retry_policy_and_waits_for_nothing(virtual: VirtualTime) -> None:
    patient = Retrying(stop=stop_after_attempt(5), wait=wait_fixed(1000))  # tries anything again
    tokens, results = Fake(Tokens(), 1), Fake(expiring({"a": 1}), 1)
    assert run("a", tokens, results, retry=patient, refresh_token_on=ExpiredError) == ["a"]
    assert virtual.now == 4
    assert (len(tokens.calls), len(results.calls)) == (2, 2)


@in_virtual_time
def test_failure_that_may_pass_is_a_refresh_if_it_is_said_to_be_one() -> None:
    tokens, results = Tokens(), Fake(expiring({"a": 1}, lambda: ApiError(503)))
    assert run("a", tokens, results, refresh_token_on=ApiError) == ["a"]
    assert tokens.given == {"a": 2}
    assert results.asked == [("a", 1), ("a", 2)]


@in_virtual_time
def test_policy_of_stage_one_is_asked_about_a_refresh_as_about_any_call() -> None:
    ends: Iterator[object] = iter(["first", ApiError(503), ApiError(503), "second"])

    def answer(_: str) -> object:
        end = next(ends)
        if isinstance(end, Exception):
            raise end
        return end

    def fetch_result(token: str) -> str:
        if token == "first":  # noqa: S105 - no password
            raise ExpiredError
        return token

    tokens = Fake(answer)
    assert run("a", tokens, fetch_result, retry=3, refresh_token_on=ExpiredError) == ["second"]
    assert len(tokens.calls) == 4


@in_virtual_time
def test_failure_of_stage_one_in_a_refresh_is_the_outcome() -> None:
    tokens = Fake(str)

    def answer(item: str) -> object:
        if tokens.asked.count("a") == 2 and item == "a":
            raise ApiError(404)
        return item, 1

    tokens.answer = answer
    a, b = outcomes_of("ab", tokens, expiring({"a": 9}), refresh_token_on=ExpiredError)
    assert isinstance(a.exception, ApiError)
    assert notes(a.exception) == ["twostage: stage one, 'a', 1 attempt"]
    assert b.result == "b"


@in_virtual_time
@pytest.mark.parametrize("none", [None, Retrying(enabled=False)], ids=["None", "enabled=False"])
@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_there_is_no_refresh_where_calls_of_either_stage_must_not_be_repeated(
    none: Retrying | None, *, first: bool, second: bool
) -> None:
    tokens, results = Fake(Tokens()), Fake(expiring({"a": 1}))
    a, b = outcomes_of(
        "ab",
        stage(tokens, retry=none if first else 5),
        stage(results, retry=none if second else 5),
        refresh_token_on=ExpiredError,
    )
    assert (type(a.exception), b.result) == (ExpiredError, "b")
    assert sorted(tokens.asked) == ["a", "b"]
    assert len(results.calls) == 2


@in_virtual_time
def test_one_attempt_is_not_none_and_allows_a_refresh() -> None:
    assert run("a", Tokens(), expiring({"a": 1}), retry=1, refresh_token_on=ExpiredError) == ["a"]


# --- how refreshed items leave


@in_virtual_time
def test_items_that_expire_at_once_come_back_in_full_batches() -> None:
    tokens = Fake(each(Tokens()), 1)
    expired = dict.fromkeys(range(25), 1)
    results = run(
        range(25),
        stage(tokens, batch_size=10, workers=3),
        Fake(expiring(expired), 1),
        refresh_token_on=ExpiredError,
    )
    assert results == list(range(25))
    assert tokens.sizes == [10, 10, 5, 10, 10, 5]
    assert sorted(item for made in tokens.calls[3:] for item in made.argument) == list(range(25))


@in_virtual_time
def test_only_the_expired_items_of_a_batch_are_asked_for_again() -> None:
    tokens = Fake(each(Tokens()), 1)
    results = Fake(expiring({2: 1, 5: 1}), 1)
    run(range(10), stage(tokens, batch_size=10), results, refresh_token_on=ExpiredError)
    assert [tokens.asked[0], sorted(tokens.asked[1])] == [list(range(10)), [2, 5]]
    assert len(tokens.calls) == 2
    assert len(results.calls) == 12


def test_refreshed_item_never_waits_for_its_batch_to_be_filled(virtual: VirtualTime) -> None:
    def source() -> Iterator[int]:
        yield from range(10)
        sleep(1000)
        yield from range(10, 20)

    tokens = Fake(each(Tokens()), 1, virtual=virtual)
    results = Fake(expiring({3: 1}), 1)
    job = run(source(), stage(tokens, batch_size=10), results, refresh_token_on=ExpiredError)
    assert job == list(range(20))
    assert [(made.argument, made.began) for made in tokens.calls] == [
        (list(range(10)), 0),
        ([3], 2),
        (list(range(10, 20)), 1000),
    ]


@in_virtual_time
def test_fresh_items_ride_along_with_refreshed_ones() -> None:
    tokens = Fake(each(Tokens()), 10)
    results = Fake(expiring({1: 1, 4: 1, 7: 1}), 1)
    job = run(range(30), stage(tokens, batch_size=10, workers=1), results, refresh_token_on=ExpiredError)
    assert job == list(range(30))
    assert tokens.sizes == [10, 10, 10, 3]
    assert {1, 4, 7} < set(tokens.asked[2])


@pytest.mark.parametrize("batch_size", [None, 10])
def test_refreshed_item_leaves_at_the_next_free_worker_before_fresh_ones(
    virtual: VirtualTime, batch_size: int | None
) -> None:
    calls = Fake(Tokens() if batch_size is None else each(Tokens()), 10, virtual=virtual)
    results = Fake(expiring({0: 1}), 1)
    job = run(
        range(200), stage(calls, batch_size=batch_size, workers=2), results, refresh_token_on=ExpiredError
    )
    assert job == list(range(200))
    # 0 to 10 two calls; at 10 the next two begin, at 11 the token has expired, at 20 a worker is free
    again = [made for made in calls.calls if made.argument == 0 or (batch_size and 0 in made.argument)][1:]
    assert [made.began for made in again] == [20]
    assert calls.calls.index(again[0]) in (4, 5)


def test_refreshed_items_count_in_the_bound_before_a_slow_consumer(virtual: VirtualTime) -> None:
    tokens = Tokens()

    class AllOnce(dict[int, int]):
        def get(self, _key: int, _default: object = None) -> int:
            return 1

    with iter_two_stage(
        count(),
        stage(each(tokens), batch_size=10),
        Fake(expiring(AllOnce()), 1),
        refresh_token_on=ExpiredError,
    ) as outcomes:
        for taken in range(1, 600):
            next(outcomes)
            sleep(50)
            assert len(tokens.given) <= 256 + 10 + taken


@in_virtual_time
def test_ordered_stream_waits_for_a_refreshed_item() -> None:
    results = Fake(expiring({2: 1}), 1)
    with iter_two_stage(
        range(20), Fake(Tokens(), 1), results, refresh_token_on=ExpiredError, ordered=True
    ) as outcomes:
        assert [outcome.result for outcome in outcomes] == list(range(20))


@in_virtual_time
def test_leaving_the_stream_drops_what_waits_for_a_new_token() -> None:
    tokens = Fake(Tokens(), 10)
    results = Fake(expiring({1: 1, 2: 1, 3: 1}), 1)
    with iter_two_stage(
        range(1000), stage(tokens, workers=1), results, refresh_token_on=ExpiredError
    ) as outcomes:
        assert next(outcomes).result == 0
    begun = len(tokens.calls)
    sleep(1000)
    assert len(tokens.calls) == begun


# --- stage two in batches


@in_virtual_time
def test_exception_in_a_slot_refreshes_its_item_alone() -> None:
    tokens = Fake(each(Tokens()), 1)

    def answer(batch: list[tuple[int, int]]) -> list[Any]:
        return [ExpiredError() if token == (2, 1) else token[0] for token in batch]

    results = Fake(answer, 1)
    outcomes = outcomes_of(
        range(5), stage(tokens, batch_size=5), stage(results, batch_size=5), refresh_token_on=ExpiredError
    )
    assert [outcome.result for outcome in outcomes] == list(range(5))
    assert tokens.asked == [[0, 1, 2, 3, 4], [2]]
    assert results.asked[1:] == [[(2, 2)]]
    assert outcomes[2].token == (2, 2)


@in_virtual_time
def test_exception_in_a_slot_past_the_last_refresh_is_its_item_s_outcome() -> None:
    def answer(batch: list[tuple[int, int]]) -> list[Any]:
        return [ExpiredError() if item == 2 else item for item, _ in batch]

    settings = {"refresh_token_on": ExpiredError, "retry": ALWAYS}
    tokens = Tokens()
    outcomes = outcomes_of(range(5), tokens, stage(answer, batch_size=5), **settings)
    assert [type(outcome.exception) for outcome in outcomes if outcome.exception] == [ExpiredError]
    assert [outcome.result for outcome in outcomes if outcome.exception is None] == [0, 1, 3, 4]
    assert tokens.given == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1}


def whole(bad: Callable[[tuple[int, int]], bool]) -> Callable[[list[tuple[int, int]]], list[int]]:
    """Makes a function that fails a batch whole if one of its tokens has expired."""

    def answer(batch: list[tuple[int, int]]) -> list[int]:
        if any(map(bad, batch)):
            raise ExpiredError
        return [item for item, _ in batch]

    return answer


@in_virtual_time
def test_batch_that_fails_whole_has_all_its_items_refreshed() -> None:
    tokens, results = Fake(each(Tokens()), 1), Fake(whole(lambda token: token == (2, 1)), 1)
    job = run(
        range(4), stage(tokens, batch_size=4), stage(results, batch_size=4), refresh_token_on=ExpiredError
    )
    assert job == list(range(4))
    assert [sorted(batch) for batch in tokens.asked] == [[0, 1, 2, 3]] * 2
    assert len(results.calls) == 2


@in_virtual_time
def test_items_without_a_refresh_left_go_again_in_halves_until_they_stand_alone() -> None:
    tokens, results = Fake(each(Tokens()), 1), Fake(whole(lambda token: token[0] == 5), 1)
    outcomes = outcomes_of(
        range(8), stage(tokens, batch_size=8), stage(results, batch_size=8), refresh_token_on=ExpiredError
    )
    assert [outcome.index for outcome in outcomes if outcome.exception] == [5]
    assert type(outcomes[5].exception) is ExpiredError
    assert [outcome.result for outcome in outcomes if not outcome.exception] == [0, 1, 2, 3, 4, 6, 7]
    assert tokens.sizes == [8, 8]
    assert results.sizes[:2] == [8, 8]
    assert len(results.calls) <= 2 + 6
    assert all(version == 2 for asked in results.asked[1:] for _, version in asked)


@in_virtual_time
def test_batch_of_items_with_and_without_a_refresh_left_is_parted() -> None:
    # item 0 has used its refresh up when its new token meets those of fresh items
    tokens = Fake(each(Tokens()), 1)

    def answer(batch: list[tuple[int, int]]) -> list[Any]:
        if len(batch) == 1 and batch[0] == (0, 1):
            raise ExpiredError
        if (1, 1) in batch:
            raise ExpiredError
        return [item for item, _ in batch]

    results = Fake(answer, lambda batch: 1.0)

    def source() -> Iterator[int]:
        yield 0
        sleep(1.5)  # the first token is on its way
        yield from (1, 2)

    outcomes = outcomes_of(
        source(),
        stage(tokens, batch_size=1, workers=4),
        stage(results, batch_size=3, workers=1),
        refresh_token_on=ExpiredError,
    )
    assert [outcome.result for outcome in outcomes] == [0, 1, 2]
    asked = Counter(tokens.asked_items)
    assert asked[0] == 2  # and not a third time, though a batch it was in failed
    assert asked[1] == 2


@in_virtual_time
def test_bisect_false_fails_items_without_a_refresh_left_together() -> None:
    tokens = Fake(each(Tokens()), 1)
    results = Fake(whole(lambda token: token[0] == 5), 1)
    outcomes = outcomes_of(
        range(8),
        stage(tokens, batch_size=8),
        stage(results, batch_size=8, bisect=False),
        refresh_token_on=ExpiredError,
    )
    assert [type(outcome.exception) for outcome in outcomes] == [ExpiredError] * 8
    assert len({id(outcome.exception) for outcome in outcomes}) == 1
    assert results.sizes == [8, 8]


# --- arguments


@pytest.mark.parametrize("refresh_token_on", [401, "ExpiredError", (ExpiredError, 401), [ExpiredError], True])
def test_refresh_token_on_of_a_wrong_kind_is_a_type_error(refresh_token_on: object) -> None:
    tokens = Tokens()
    with pytest.raises(TypeError, match="refresh_token_on"):
        run("a", tokens, str, refresh_token_on=refresh_token_on)
    assert not tokens.given


@pytest.mark.parametrize("most", [1.5, "1", None, True])
def test_max_refreshes_of_a_wrong_kind_is_a_type_error(most: object) -> None:
    with pytest.raises(TypeError, match="max_refreshes"):
        run("a", str, str, refresh_token_on=ExpiredError, max_refreshes=most)


@pytest.mark.parametrize("most", [0, -1])
def test_max_refreshes_below_one_is_a_value_error(most: int) -> None:
    with pytest.raises(ValueError, match="max_refreshes"):
        run("a", str, str, refresh_token_on=ExpiredError, max_refreshes=most)
