"""Stage two in batches: a free worker takes of the tokens that wait, and never waits for more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from common import books
from fakes import Fake, each, in_virtual_time, notes, outcomes_of, refusing, stage
from forms import Run, each_way
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from twostage import BatchLengthError, MissingToken, is_transient, iter_two_stage, run_two_stage
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Iterator


def upper(tokens: list[str]) -> list[str]:
    return [token.upper() for token in tokens]


@each_way
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("executor", [False, True])
def test_results_are_each_token_s_own_on_real_threads(job: Run, size: int, *, executor: bool) -> None:
    items = [f"item {number}" for number in range(50)]
    with ThreadPoolExecutor(4) as pool:
        results = stage(upper, batch_size=size, workers=3, executor=pool if executor else None)
        assert job(items, stage(list, batch_size=7), results) == upper(items)


def test_tokens_of_one_answer_leave_in_batches(virtual: VirtualTime) -> None:
    results = Fake(each(str), 1, virtual=virtual)
    run_two_stage(range(100), stage(list, batch_size=100), stage(results, batch_size=25))
    assert results.sizes == [25] * 4
    assert [made.began for made in results.calls] == [0] * 4


def test_free_worker_takes_what_waits_and_never_waits_for_more(virtual: VirtualTime) -> None:
    # A token each second on one worker, and a result call of 3.5 s on one: 1, then what has gathered.
    tokens, results = Fake(int, 1, virtual=virtual), Fake(each(int), 3.5, virtual=virtual)
    run_two_stage(range(12), stage(tokens, workers=1), stage(results, batch_size=25, workers=1))
    assert results.asked == [[0], [1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [11]]
    assert [made.began for made in results.calls] == [1, 4.5, 8, 11.5, 15]


def test_no_more_of_them_run_at_once_than_workers(virtual: VirtualTime) -> None:
    results = Fake(each(int), 1, virtual=virtual)
    run_two_stage(range(100), stage(list, batch_size=50), stage(results, batch_size=5, workers=2))
    assert results.sizes == [5] * 20
    assert [made.began for made in results.calls] == [at // 2 for at in range(20)]


@in_virtual_time
def test_wrong_number_of_results_names_the_function() -> None:
    for outcome in outcomes_of("ab", stage(list, batch_size=2), stage(lambda _: ["a"], batch_size=9)):
        assert isinstance(outcome.exception, BatchLengthError)
        assert str(outcome.exception) == (
            "fetch_result got 2 tokens and returned 1 results; "
            "it must return one result for each token, in the tokens' order"
        )


@in_virtual_time
def test_results_by_token_slots_and_what_is_left_out() -> None:
    def fetch_results(tokens: list[str]) -> dict[str, object]:
        return {one: ApiError(404) if one == "b" else one.upper() for one in tokens if one != "c"}

    a, b, c = outcomes_of("abc", stage(list, batch_size=3), stage(fetch_results, batch_size=3))
    assert a.result == "A"
    assert isinstance(b.exception, ApiError)
    assert notes(b.exception) == ["twostage: stage two, 'b', 1 attempt"]
    assert isinstance(c.exception, MissingToken)
    assert str(c.exception) == "fetch_result returned a dict that does not have it"
    assert [outcome.result_attempts for outcome in (a, b, c)] == [1, 1, 1]


def test_failed_batch_goes_again_as_it_was(virtual: VirtualTime) -> None:
    def answer(tokens: list[int]) -> list[int]:
        if len(results.calls) == 1:
            raise ApiError(503)
        return tokens

    policy = Retrying(retry=retry_if_exception(is_transient), stop=stop_after_attempt(3), wait=wait_fixed(5))
    results = Fake(answer, 1, virtual=virtual)
    at_two = stage(results, batch_size=3, workers=1, retry=policy)
    outcomes = outcomes_of(range(6), stage(list, batch_size=6), at_two)
    assert results.asked == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert [made.began for made in results.calls] == [0, 1, 6]
    assert [outcome.result_attempts for outcome in outcomes] == [2, 2, 2, 1, 1, 1]


@in_virtual_time
def test_refused_batch_of_tokens_is_split() -> None:
    results = Fake(refusing({5}), 1)
    outcomes = outcomes_of(range(16), stage(list, batch_size=16), stage(results, batch_size=16))
    assert [outcome.index for outcome in outcomes if outcome.exception] == [5]
    assert len(results.calls) == 1 + 2 * 4


@in_virtual_time
def test_bound_counts_batches_of_results() -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for read in count(1):  # noqa: UP028 - it is looked at
            yield read

    bound = 2 * (4 * 10 + 3 * 200)
    results = stage(each(int), batch_size=200, workers=3)
    with iter_two_stage(source(), stage(list, batch_size=10), results) as outcomes:
        next(outcomes)
        sleep(100)
        coordinator: Any = books(outcomes)
        assert coordinator.bound == bound
        assert bound - 10 < coordinator.in_progress <= bound + 10


def test_one_item_at_a_time_as_well(virtual: VirtualTime) -> None:
    results = Fake(each(int), 1, virtual=virtual)
    assert run_two_stage(range(40), int, stage(results, batch_size=4, workers=2)) == list(range(40))
    assert max(results.sizes) == 4


def test_many_on_stage_two_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^fetch_result's Stage has many=True; only items have many tokens"):
        run_two_stage("ab", str, stage(list, many=True))
