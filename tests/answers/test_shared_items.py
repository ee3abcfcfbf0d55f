"""`key=`: items of equal key are asked for once, and each has its own outcome."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import Counter
from itertools import count, cycle, islice, repeat
from typing import TYPE_CHECKING, Any

import pytest
from fakes import ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, refusing, stage
from forms import Run, each_way, run
from tenacity import Retrying, stop_after_attempt, wait_none

from twostage import iter_two_stage
from twostage.testing import ApiError, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def same(item: Any) -> Any:  # noqa: ANN401 - whatever the items are
    return item


def fail_for(*bad: object, status: int = 404) -> Callable[[Any], str]:
    def answer(argument: object) -> str:
        if argument in bad:
            raise ApiError(status)
        return f"<{argument}>"

    return answer


def fetch_of(fetch: Callable[[Any], Any], batch_size: int | None) -> Any:  # noqa: ANN401 - one of two kinds
    return fetch if batch_size is None else stage(each(fetch), batch_size=batch_size)


# --- the list form: once in the whole job


@in_virtual_time
@pytest.mark.parametrize("key", [same, lambda item: item % 10], ids=["equal items", "equal keys"])
def test_ten_thousand_items_of_ten_keys_are_ten_calls_of_each_stage(key: Callable[[int], int]) -> None:
    rng = random.Random(1)
    items = [rng.randrange(10) if key is same else rng.randrange(10**6) for _ in range(10_000)]
    first = {key(item): item for item in reversed(items)}
    tokens, results = Fake(same, lambda _: rng.random()), Fake(str, lambda _: rng.random())
    assert run(items, tokens, results, key=key) == [str(first[key(item)]) for item in items]
    assert sorted(tokens.asked) == sorted(results.asked) == sorted(first.values())


@in_virtual_time
def test_list_form_asks_once_though_the_first_was_done_long_before() -> None:
    def source() -> Iterator[str]:
        for item in "ababa":
            yield item
            sleep(100)

    tokens, results = Fake(str, 1), Fake(str.upper, 1)
    assert run(source(), tokens, results, key=same, window=1) == list("ABABA")
    assert (tokens.asked, results.asked) == (["a", "b"], ["a", "b"])


def test_each_item_has_its_key_s_result_on_real_threads() -> None:
    rng = random.Random(1)
    items = [rng.randrange(300) for _ in range(5000)]
    tokens, results = Fake(each(same)), Fake(lambda token: token * 2)
    assert run(items, tokens, results, key=same, batch_size=7) == [item * 2 for item in items]
    assert sorted(tokens.asked_items) == sorted(results.asked) == sorted(set(items))


# --- batches


@in_virtual_time
def test_duplicates_in_one_batch_are_asked_for_once() -> None:
    tokens = Fake(each(str.upper))
    assert run("aabab", tokens, str.lower, key=same, batch_size=5) == list("aabab")
    assert tokens.asked == [["a", "b"]]


@in_virtual_time
@each_way
def test_batches_are_full_of_distinct_items(job: Run) -> None:
    items = [item for item in range(100) for _ in range(7)]
    tokens = Fake(each(str), 1)
    assert job(items, tokens, int, key=same, batch_size=10) == items
    assert tokens.asked == [list(range(at, at + 10)) for at in range(0, 100, 10)]


@in_virtual_time
def test_batch_may_fail_and_be_split_around_a_bad_item_and_its_duplicates() -> None:
    tokens = Fake(refusing({"c"}))
    results = run("abcdabcd", tokens, str, key=same, batch_size=4, return_exceptions=True)
    assert [*results[:2], *results[3:6], results[7]] == ["<a>", "<b>", "<d>", "<a>", "<b>", "<d>"]
    assert isinstance(results[2], ApiError)
    assert results[2] is results[6]


# --- outcomes


@in_virtual_time
@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_item_has_an_outcome_of_its_own_with_what_is_shared(batch_size: int | None) -> None:
    rows = [{"id": number % 2, "row": number} for number in range(6)]  # not hashable
    tokens = fetch_of(lambda row: [row["id"]], batch_size)
    outcomes = outcomes_of(rows, tokens, lambda token: {"of": token[0]}, key=lambda row: row["id"])
    assert [outcome.index for outcome in outcomes] == list(range(6))
    assert all(outcome.item is row for outcome, row in zip(outcomes, rows, strict=True))
    assert [outcome.result for outcome in outcomes] == [{"of": 0}, {"of": 1}] * 3
    assert len({id(outcome) for outcome in outcomes}) == 6
    for shared in (outcomes[::2], outcomes[1::2]):
        assert len({id(outcome.result) for outcome in shared}) == 1
        assert len({id(outcome.token) for outcome in shared}) == 1


@in_virtual_time
def test_attempts_are_those_of_the_first_item() -> None:
    left = Counter({"A": 2})

    def answer(token: str) -> str:
        if left[token]:
            left[token] -= 1
            raise ApiError(503)
        return token

    results = Fake(answer)
    outcomes = outcomes_of("abaab", str.upper, results, key=same)
    assert [(outcome.token_attempts, outcome.result_attempts) for outcome in outcomes] == [
        (1, 3),
        (1, 1),
        (1, 3),
        (1, 3),
        (1, 1),
    ]
    assert Counter(results.asked) == {"A": 3, "B": 1}


@in_virtual_time
def test_ordered_stream_keeps_the_order_among_duplicates() -> None:
    rng = random.Random(1)
    items = [rng.randrange(20) for _ in range(500)]
    with iter_two_stage(
        items, str, Fake(int, lambda _: rng.uniform(0, 9)), key=same, ordered=True
    ) as outcomes:
        assert [(outcome.index, outcome.result) for outcome in outcomes] == list(enumerate(items))


@in_virtual_time
@pytest.mark.parametrize("fails_first", [True, False])
@pytest.mark.parametrize("batch_size", [None, 2])
@each_way
def test_all_items_of_a_key_fail_with_the_same_exception(
    job: Run, batch_size: int | None, *, fails_first: bool
) -> None:
    failing, passing = Fake(fail_for("a", status=400)), Fake(same)  # which a batch survives
    first, second = (failing, passing) if fails_first else (passing, failing)
    settings: dict[str, Any] = {"key": same, "return_exceptions": True}
    one, two, three, four = job("aaba", fetch_of(first, batch_size), second, **settings)
    assert isinstance(one, ApiError)
    assert one is two
    assert one is four
    assert three == "<b>"
    assert len(notes(one)) == 1
    assert failing.asked.count("a") == (2 if fails_first and batch_size else 1)  # again, when it stood alone


@in_virtual_time
@each_way
def test_failure_of_a_key_ends_the_job_where_no_exceptions_are_wanted(job: Run) -> None:
    results = Fake(fail_for("a"), 1)
    with pytest.raises(ApiError) as raised:
        job("aaaa", str, results, key=same)
    assert notes(raised.value) == ["twostage: stage two, 'a', 1 attempt"]
    assert len(results.calls) == 1


# --- the stream: among what is in the window


@in_virtual_time
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("batch_size", [None, 100])
def test_endless_source_of_one_key_goes_on(batch_size: int | None, *, ordered: bool) -> None:
    tokens = Fake(same, 1)
    fetch = fetch_of(tokens, batch_size)
    with iter_two_stage(
        repeat("x"), fetch, Fake(str.upper, 1), key=same, window=1000, ordered=ordered
    ) as outcomes:
        taken = list(islice(outcomes, 20_000))
    assert {outcome.result for outcome in taken} == {"X"}
    assert sorted(outcome.index for outcome in taken) == list(range(20_000))
    assert 1 <= len(tokens.calls) <= 1000


@in_virtual_time
@pytest.mark.parametrize("batch_size", [None, 100])
def test_endless_source_of_fewer_keys_than_a_batch_goes_on(batch_size: int | None) -> None:
    tokens = Fake(same, 1)
    with iter_two_stage(
        cycle("abc"), fetch_of(tokens, batch_size), Fake(str.upper, 1), key=same, window=200
    ) as outcomes:
        taken = list(islice(outcomes, 5000))
    assert all(outcome.result == "ABC"[outcome.index % 3] for outcome in taken)
    assert len(tokens.calls) <= 1000


@in_virtual_time
def test_stream_asks_again_when_the_first_outcome_was_taken() -> None:
    tokens = Fake(str, 1)
    with iter_two_stage("abaab", tokens, str.upper, key=same, window=1) as outcomes:
        assert [outcome.result for outcome in outcomes] == list("ABAAB")
    assert tokens.asked == list("abaab")


@in_virtual_time
def test_stream_shares_what_is_done_and_not_taken() -> None:
    def source() -> Iterator[str]:
        yield "a"
        sleep(100)  # the first is done by now; its consumer is here, and has not taken it
        yield "a"

    tokens = Fake(str, 1)
    assert [outcome.result for outcome in outcomes_of(source(), tokens, str.upper, key=same)] == ["A", "A"]
    assert tokens.asked == ["a"]


@in_virtual_time
@pytest.mark.parametrize("keys", [1, 3, 40])
@pytest.mark.parametrize(("batch_size", "window"), [(None, 50), (7, 50), (20, 20)])
def test_duplicates_count_in_the_window(keys: int, batch_size: int | None, window: int) -> None:
    read = taken = ahead = 0

    def source() -> Iterator[int]:
        nonlocal read, ahead
        rng = random.Random(keys)
        for _ in range(1000):
            read += 1
            ahead = max(ahead, read - taken)
            yield rng.randrange(keys)

    fetch = fetch_of(Fake(same, 1), batch_size)
    with iter_two_stage(source(), fetch, Fake(same, 1), key=same, window=window) as outcomes:
        for _ in outcomes:
            taken += 1
            if taken % 10 == 0:
                sleep(5)
    assert taken == read == 1000
    assert ahead <= window


class Key:
    """An identity that one can see the end of."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)


@in_virtual_time
def test_keys_are_forgotten_when_their_outcomes_were_taken() -> None:
    alive: weakref.WeakSet[Key] = weakref.WeakSet()
    keys: list[weakref.ref[Key]] = []

    def key(item: int) -> Key:
        made = Key(item)
        keys.append(weakref.ref(made))
        return made

    most = 0
    with iter_two_stage(range(3000), int, int, key=key, window=50) as outcomes:
        for outcome in outcomes:
            if outcome.index % 100 == 0:
                gc.collect()
                most = max(most, sum(one() is not None for one in keys))
    assert not alive
    assert most <= 2 * 50


@in_virtual_time
def test_leaving_the_stream_ends_a_job_whose_duplicates_wait() -> None:
    tokens = Fake(same, 1)
    with iter_two_stage(repeat("x"), tokens, Fake(str, 1), key=same, window=100) as outcomes:
        next(outcomes)
    made = len(tokens.calls)
    sleep(100)
    assert len(tokens.calls) == made
    assert list(outcomes) == []


@in_virtual_time
def test_outcomes_that_were_done_before_a_failure_are_handed_over_first() -> None:
    results = Fake(fail_for("B"), lambda given: 9.0 if given == "B" else 1.0)
    with iter_two_stage("abaa", str.upper, results, key=same) as outcomes:
        assert sorted(next(outcomes).index for _ in range(3)) == [0, 2, 3]
        with pytest.raises(ApiError):
            next(outcomes)


# --- the key itself


@in_virtual_time
def test_without_a_key_equal_items_are_asked_for_each() -> None:
    tokens, results = Fake(each(same)), Fake(same)
    assert run([1, 1, 1, 1], tokens, results, batch_size=2) == [1] * 4
    assert (tokens.asked, results.asked) == ([[1, 1], [1, 1]], [1, 1, 1, 1])


@in_virtual_time
@pytest.mark.parametrize("keys", [(None, None), (1, True), ((1, "a"), (1, "a")), (0, 0.0)])
def test_keys_that_are_equal_are_one(keys: tuple[object, object]) -> None:
    tokens = Fake(same)
    run(range(2), tokens, str, key=keys.__getitem__)
    assert tokens.asked == [0]


@each_way
def test_key_is_called_in_the_caller_s_thread_once_for_each_item_in_order(job: Run) -> None:
    threads: set[int] = set()
    seen: list[int] = []

    def key(item: int) -> int:
        threads.add(threading.get_ident())
        seen.append(item)
        return item % 30

    assert job(range(500), int, int, key=key) == [item % 30 for item in range(500)] or job is not run
    assert threads == {threading.get_ident()}
    assert seen == list(range(500))


@in_virtual_time
@each_way
@pytest.mark.parametrize("return_exceptions", [False, True])
def test_key_that_raises_ends_the_job(job: Run, *, return_exceptions: bool) -> None:
    error = LookupError("no such field")

    def key(item: int) -> int:
        if item == 5:
            raise error
        return item

    tokens = Fake(same)
    with pytest.raises(LookupError) as raised:
        job(range(100), tokens, str, key=key, return_exceptions=return_exceptions)
    assert raised.value is error
    assert not [item for item in tokens.asked if item >= 5]


@in_virtual_time
def test_outcomes_before_a_key_that_raises_are_handed_over_first() -> None:
    def source() -> Iterable[str]:
        yield from "aba"
        sleep(100)
        yield "bad"

    def key(item: str) -> str:
        if item == "bad":
            raise LookupError
        return item

    indexes: list[int] = []
    with iter_two_stage(source(), str, str, key=key) as outcomes:  # noqa: SIM117 - what is raised, and where
        with pytest.raises(LookupError):
            indexes.extend(outcome.index for outcome in outcomes)
    assert sorted(indexes) == [] or sorted(indexes) == [0, 1, 2]


@in_virtual_time
@each_way
def test_key_that_is_not_hashable_is_a_type_error_that_names_it(job: Run) -> None:
    with pytest.raises(TypeError, match="key"):
        job(["a", "b"], str, str, key=lambda item: [item])


@pytest.mark.parametrize("key", [3, "id", ("id",)])
def test_key_that_is_no_function_is_a_type_error_before_any_call(key: object) -> None:
    tokens = Fake(same)
    with pytest.raises(TypeError, match="key"):
        run("ab", tokens, str, key=key)
    assert tokens.calls == []


# --- with other options


@in_virtual_time
@each_way
def test_list_of_many_tokens_is_shared(job: Run) -> None:
    tokens, results = Fake(lambda item: [f"{item}{number}" for number in range(3)]), Fake(str.upper, 1)
    one, two, three = job("aba", tokens, results, key=same, many=True)
    assert (one, two) == (["A0", "A1", "A2"], ["B0", "B1", "B2"])
    assert one is three
    assert len(results.calls) == 6


@in_virtual_time
def test_refreshed_token_is_for_all_items_of_the_key() -> None:
    tokens = Fake(lambda item: f"{item}{len(tokens.calls)}", 1)

    def answer(token: str) -> str:
        if token == "a1":  # noqa: S105 - no secret
            raise ExpiredError
        return token

    outcomes = outcomes_of("aaa", tokens, Fake(answer, 1), key=same, refresh_token_on=ExpiredError)
    assert [outcome.result for outcome in outcomes] == ["a2"] * 3
    assert [outcome.token for outcome in outcomes] == ["a2"] * 3
    assert len(tokens.calls) == 2


@in_virtual_time
def test_policy_that_gives_up_gives_up_for_all_items_of_the_key() -> None:
    tokens = Fake(fail_for("a", status=503))
    thrice = Retrying(stop=stop_after_attempt(3), wait=wait_none())
    outcomes = outcomes_of("aab", tokens, str, key=same, retry=thrice)
    assert [outcome.token_attempts for outcome in outcomes] == [3, 3, 1]
    assert tokens.asked.count("a") == 3


@in_virtual_time
def test_items_between_are_read_and_asked_while_one_key_is_slow() -> None:
    results = Fake(same, lambda given: 100.0 if given == "slow" else 1.0)
    items = ["slow", *range(50), "slow", *range(50, 100)]
    with iter_two_stage(items, same, results, key=same) as outcomes:
        order = [outcome.item for outcome in outcomes]
    assert order[-2:] == ["slow", "slow"]
    assert len(results.calls) == 101


@in_virtual_time
def test_all_distinct_keys_change_nothing() -> None:
    seen: list[list[list[int]]] = []
    keys: list[dict[str, Any]] = [{}, {"key": same}]
    for settings in keys:
        tokens = Fake(each(same), 1)
        with iter_two_stage(count(), tokens, Fake(same, 1), batch_size=10, **settings) as outcomes:
            assert [outcome.index for outcome in islice(outcomes, 100)] == list(range(100))
        seen.append(tokens.asked)
    assert seen[0] == seen[1]
