"""Batches that are refused as a whole for a bad item in them, and are split until it stands alone."""

from __future__ import annotations

import json
import math
import random
import ssl
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from fakes import ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, refusing, stage
from forms import Run, each_way, run
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from twostage import BatchLengthError, iter_two_stage
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable


def persistent(attempts: int = 3, wait: float = 1.0) -> Retrying:
    """Tries anything again, whatever it is."""
    return Retrying(
        retry=retry_if_exception(lambda _: True), stop=stop_after_attempt(attempts), wait=wait_fixed(wait)
    )


def not_utf8() -> Exception:
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


def not_json() -> Exception:
    try:
        json.loads("<html>")
    except json.JSONDecodeError as error:
        return error
    raise AssertionError


def check_all_but(bad: set[int], results: list[Any]) -> None:
    """Checks that exactly the bad items failed, and that the others have their own results."""
    failed = {item for item, result in enumerate(results) if isinstance(result, Exception)}
    assert failed == bad
    assert all(result == f"<{item}>" for item, result in enumerate(results) if item not in bad)


# --- what it costs


@in_virtual_time
def test_one_bad_item_of_a_hundred_costs_14_calls_wherever_it_stands() -> None:
    for position in range(100):
        fetch = Fake(refusing({position}))
        results = run(range(100), fetch, str, batch_size=100, return_exceptions=True)
        check_all_but({position}, results)
        assert len(fetch.calls) <= 1 + 14, position


@in_virtual_time
@pytest.mark.parametrize("workers", [1, 4, 50])
@pytest.mark.parametrize("batch_size", [64, 100, 200])
def test_five_percent_bad_in_every_batch_cost_no_more_than_the_sum_allows(
    batch_size: int, workers: int
) -> None:
    batches, rng = 20, random.Random(batch_size)
    bad = {
        batch * batch_size + place
        for batch in range(batches)
        for place in rng.sample(range(batch_size), round(batch_size * 0.05))
    }
    fetch = Fake(refusing(bad), 1)
    results = run(
        range(batches * batch_size),
        stage(fetch, batch_size=batch_size, workers=workers),
        str,
        return_exceptions=True,
    )
    check_all_but(bad, results)
    assert len(fetch.calls) <= 2 * len(bad) * math.log2(batch_size) + batches


@pytest.mark.parametrize("of_one_s_own", [False, True])
def test_good_items_survive_on_real_threads(*, of_one_s_own: bool) -> None:
    bad = set(random.Random(1).sample(range(2000), 60))
    fetch = Fake(refusing(bad))
    with ThreadPoolExecutor(8) as executor:
        first = stage(fetch, batch_size=50, workers=8, executor=executor if of_one_s_own else None)
        results = run(range(2000), first, str, return_exceptions=True)
    check_all_but(bad, results)
    assert len(fetch.calls) <= 2 * 60 * math.log2(50) + 40


@in_virtual_time
@each_way
def test_each_form_gives_the_same(job: Run) -> None:
    results = job(range(40), refusing({3, 17, 39}), str, batch_size=10, return_exceptions=True)
    check_all_but({3, 17, 39}, results)


# --- what is split


@in_virtual_time
@pytest.mark.parametrize(
    "error",
    [lambda: ApiError(400), lambda: ApiError(413), lambda: ApiError(422), lambda: ValueError("bad id")],
    ids=["400", "413", "422", "ValueError"],
)
def test_refusal_for_what_is_in_the_batch_is_split(error: Callable[[], Exception]) -> None:
    results = run(range(8), refusing({5}, error), str, batch_size=8, return_exceptions=True)
    check_all_but({5}, results)
    assert type(results[5]) is type(error())


@in_virtual_time
@pytest.mark.parametrize(
    "error",
    [
        not_utf8,
        not_json,
        lambda: BatchLengthError(4, 3),
        ssl.SSLCertVerificationError,
        lambda: ApiError(401),
        lambda: ApiError(403),
        lambda: ApiError(404),
        lambda: ApiError(409),
        lambda: TypeError("a bug"),
        lambda: KeyError("a bug"),
    ],
    ids=lambda error: str(error()),
)
def test_failure_for_another_reason_fails_its_batch_whole_in_one_call(error: Callable[[], Exception]) -> None:
    fetch = Fake(refusing({1}, error))
    results = run(range(8), fetch, str, batch_size=4, return_exceptions=True)
    check_all_but({0, 1, 2, 3}, results)
    assert len({id(result) for result in results[:4]}) == 1
    assert sorted(fetch.asked) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@in_virtual_time
def test_outage_is_tried_again_and_never_split() -> None:
    fetch = Fake(refusing({1}, lambda: ApiError(503)))
    results = run(range(4), stage(fetch, batch_size=4, retry=3), str, return_exceptions=True)
    check_all_but({0, 1, 2, 3}, results)
    assert fetch.asked == [[0, 1, 2, 3]] * 3


@in_virtual_time
def test_answer_with_too_few_tokens_is_not_split() -> None:
    fetch = Fake(lambda batch: batch[1:])
    results = run(range(4), fetch, str, batch_size=4, return_exceptions=True)
    assert [type(result) for result in results] == [BatchLengthError] * 4
    assert len(fetch.calls) == 1


@in_virtual_time
def test_status_decides_before_the_kind_of_exception() -> None:
    class ClientError(ValueError):
        status_code = 422

    results = run(range(8), refusing({5}, ClientError), str, batch_size=8, return_exceptions=True)
    check_all_but({5}, results)


@in_virtual_time
def test_bisect_false_fails_the_batch_whole() -> None:
    fetch = Fake(refusing({1}))
    first = stage(fetch, batch_size=4, bisect=False)
    results = run(range(8), first, str, return_exceptions=True)
    check_all_but({0, 1, 2, 3}, results)
    assert len(fetch.calls) == 2


@in_virtual_time
@pytest.mark.parametrize(
    "bisect",
    [LookupError, (OSError, LookupError), lambda error: "bad id" in str(error)],
    ids=["type", "tuple", "predicate"],
)
def test_bisect_says_what_is_split_instead_of_the_default(bisect: object) -> None:
    named = stage(refusing({1}, lambda: KeyError("bad id")), batch_size=4, bisect=bisect)
    check_all_but({1}, run(range(4), named, str, return_exceptions=True))
    fetch = Fake(refusing({1}))
    other = stage(fetch, batch_size=4, bisect=bisect)
    check_all_but({0, 1, 2, 3}, run(range(4), other, str, return_exceptions=True))
    assert len(fetch.calls) == 1


@pytest.mark.parametrize("bisect", [3, "400", (KeyError, 400), [KeyError]])
def test_bisect_of_a_wrong_kind_is_a_type_error_that_names_it(bisect: object) -> None:
    with pytest.raises(TypeError, match="bisect"):
        stage(str, batch_size=4, bisect=bisect)


# --- halves are calls like others


@in_virtual_time
def test_policy_that_tries_a_400_again_is_asked_first_and_anew_for_each_half() -> None:
    fetch = Fake(refusing({0}))
    first = stage(fetch, batch_size=2, retry=persistent(3), workers=1)
    bad, good = outcomes_of(range(2), first, str)
    assert sorted(fetch.asked) == [[0]] * 3 + [[0, 1]] * 3 + [[1]]
    assert fetch.asked[:3] == [[0, 1]] * 3
    assert (bad.token_attempts, good.token_attempts) == (3, 1)
    assert notes(bad.exception) == ["twostage: stage one, 0, 3 attempts"]


@in_virtual_time
def test_half_that_fails_for_a_moment_is_tried_again_whole() -> None:
    failed: list[list[int]] = []

    def answer(batch: list[int]) -> list[str]:
        if batch == [2, 3] and not failed:
            failed.append(batch)
            raise ApiError(503)
        return list(refusing({0})(batch))

    fetch = Fake(answer)
    outcomes = outcomes_of(range(4), fetch, str, batch_size=4)
    assert [outcome.token_attempts for outcome in outcomes] == [1, 1, 2, 2]
    assert fetch.asked.count([2, 3]) == 2


@in_virtual_time
def test_half_that_fails_for_another_reason_fails_whole() -> None:
    def answer(batch: list[int]) -> list[str]:
        if batch == [0, 1]:
            raise ApiError(404)
        return list(refusing({0})(batch))

    results = run(range(4), answer, str, batch_size=4, return_exceptions=True)
    check_all_but({0, 1}, results)
    assert results[0] is results[1]
    assert results[0].status == 404


@in_virtual_time
def test_halves_go_before_batches_that_wait() -> None:
    fetch = Fake(refusing({1}), 1)
    run(range(16), stage(fetch, batch_size=4, workers=1), str, return_exceptions=True)
    assert fetch.asked[0] == [0, 1, 2, 3]
    assert sorted(fetch.asked[1:5]) == [[0], [0, 1], [1], [2, 3]]
    assert fetch.asked[5:] == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@in_virtual_time
def test_larger_half_of_an_odd_batch_comes_first() -> None:
    fetch = Fake(refusing({24}), 1)
    run(range(25), stage(fetch, batch_size=25, workers=1), str, return_exceptions=True)
    assert fetch.asked[1:3] == [list(range(13)), list(range(13, 25))]


@in_virtual_time
@each_way
def test_failure_that_ends_the_job_is_the_bad_item_s_alone(job: Run) -> None:
    fetch = Fake(refusing({7}), 1)
    with pytest.raises(ApiError) as raised:
        job(range(8), fetch, str, batch_size=8)
    assert raised.value.status == 400
    assert notes(raised.value) == ["twostage: stage one, 7, 1 attempt"]
    assert [7] in fetch.asked


@in_virtual_time
def test_leaving_the_stream_ends_a_split_that_is_under_way() -> None:
    fetch = Fake(refusing(set(range(1, 10_000))), 1)
    settings: dict[str, Any] = {"batch_size": 64, "return_exceptions": True, "ordered": True}
    with iter_two_stage(count(), fetch, str, **settings) as outcomes:
        assert next(outcomes).result == "<0>"
    made = len(fetch.calls)
    sleep(1000)
    assert len(fetch.calls) == made


# --- the guard: a bug is not 199 calls a batch


@in_virtual_time
@pytest.mark.parametrize("workers", [1, 4, 40])
def test_bug_costs_one_batch_199_calls_and_each_other_batch_one(workers: int) -> None:
    fetch = Fake(refusing(set(range(3000))), 1)
    outcomes = outcomes_of(range(3000), stage(fetch, batch_size=100, workers=workers), str)
    assert [type(outcome.exception) for outcome in outcomes] == [ApiError] * 3000
    assert len(fetch.calls) <= 199 + 29
    assert sum(size == 1 for size in fetch.sizes) == 100


@in_virtual_time
def test_batch_that_fails_whole_has_its_own_failure() -> None:
    fetch = Fake(refusing(set(range(40))), 1)
    outcomes = outcomes_of(range(40), stage(fetch, batch_size=10, workers=4), str)
    errors = [{id(outcome.exception) for outcome in outcomes[at : at + 10]} for at in range(0, 40, 10)]
    assert [len(of_batch) for of_batch in errors] == [10, 1, 1, 1]  # the first one was split to its end
    assert len(set.union(*errors)) == 13
    assert notes(outcomes[10].exception) == ["twostage: stage one, 10 items from 10, 1 attempt"]


@in_virtual_time
def test_bug_in_stage_two_costs_one_batch_49_calls_though_stage_one_is_accepted() -> None:
    fetch = Fake(refusing(set(range(500))), 1)
    results = run(
        range(500), each(int), stage(fetch, batch_size=25, workers=4), batch_size=50, return_exceptions=True
    )
    assert [type(result) for result in results] == [ApiError] * 500
    assert len(fetch.calls) <= 49 + 19


def test_refused_batches_wait_for_the_one_that_is_split_and_follow_when_an_item_is_accepted(
    virtual: VirtualTime,
) -> None:
    good = {7, 15, 23, 31}  # the last of each batch: found when the split is at its end
    fetch = Fake(refusing(set(range(32)) - good), 1, virtual=virtual)
    results = run(range(32), stage(fetch, batch_size=8, workers=4), str, return_exceptions=True)
    check_all_but(set(range(32)) - good, results)
    accepted = min(made.ended for made in fetch.calls if not made.failed)
    before = [made for made in fetch.calls if made.size < 8 and made.began < accepted]
    assert len({made.argument[0] // 8 for made in before}) == 1
    assert len(before) > 4
    assert len(fetch.calls) <= 4 * 15


@in_virtual_time
def test_refused_batches_that_wait_fail_whole_when_no_item_of_the_split_one_is_accepted() -> None:
    fetch = Fake(refusing({*range(8), 9, 17, 25}), lambda batch: 0.5 if 0 in batch else 1.0)
    results = run(range(32), stage(fetch, batch_size=8, workers=4), str, return_exceptions=True)
    check_all_but(set(range(32)), results)
    assert len(fetch.calls) == 15 + 3


@in_virtual_time
def test_batch_that_is_accepted_has_refused_ones_split_again() -> None:
    bad = {*range(8), 9, 25}
    fetch = Fake(refusing(bad), 1)
    results = run(range(32), stage(fetch, batch_size=8, workers=1), str, return_exceptions=True)
    # the first is hopeless, so the second fails whole; the third is accepted, so the last is split
    check_all_but({*range(16), 25}, results)
    assert fetch.asked.count(list(range(8, 16))) == 1
    assert not [asked for asked in fetch.asked if len(asked) < 8 and asked[0] in range(8, 24)]


def test_batches_that_wait_for_a_split_stay_in_progress(virtual: VirtualTime) -> None:
    fetch = Fake(refusing(set(range(10_000))), 1, virtual=virtual)
    run(range(10_000), fetch, str, batch_size=100, return_exceptions=True)
    decided = max(made.ended for made in fetch.calls if made.size == 1)
    begun = sum(made.size == 100 and made.began < decided for made in fetch.calls)
    assert 4 <= begun <= 11  # 864 items, one batch, and one more as those of the split one fail


# --- 413: the batch is too large


class Limited:
    """Refuses batches of more than it takes."""

    def __init__(self, *limits: int, lowered_after: int = 60) -> None:
        self.limits = list(limits)
        self.lowered_after = lowered_after
        self.calls = 0

    def __call__(self, batch: list[Any]) -> list[str]:
        self.calls += 1
        if len(self.limits) > 1 and self.calls > self.lowered_after:
            self.limits.pop(0)
        if len(batch) > self.limits[0]:
            raise ApiError(413)
        return [f"<{one}>" for one in batch]


def first_fit(fetch: Fake, batch_size: int, size: int) -> float:
    """Returns when both halves of a batch that was too large were accepted for the first time."""
    ends: dict[int, list[float]] = {}
    for made in fetch.calls:
        if made.size == size and not made.failed:
            ends.setdefault(made.argument[0] // batch_size, []).append(made.ended)
    return min(sorted(of_batch)[1] for of_batch in ends.values() if len(of_batch) > 1)


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_half_is_the_size_from_then_on_when_a_batch_is_too_large(virtual: VirtualTime, workers: int) -> None:
    fetch = Fake(Limited(50), 1, virtual=virtual)
    results = run(range(10_000), stage(fetch, batch_size=100, workers=workers), str)
    check_all_but(set(), results)
    fits = first_fit(fetch, 100, 50)
    assert max(made.size for made in fetch.calls if made.began > fits) == 50
    refused = sum(size > 50 for size in fetch.sizes)
    assert 1 <= refused <= 3 * workers
    assert len(fetch.calls) - refused <= 210  # and they are not cut smaller than need be


@in_virtual_time
def test_size_is_halved_again_when_the_api_takes_less_later() -> None:
    fetch = Fake(Limited(50, 25), 1)
    results = run(range(10_000), stage(fetch, batch_size=100, workers=1), str)
    check_all_but(set(), results)
    assert max(fetch.sizes[:60]) == 100
    assert sum(size > 25 for size in fetch.sizes[60:]) <= 3
    assert max(fetch.sizes[66:]) == 25


@in_virtual_time
def test_size_goes_down_to_what_is_accepted_in_one_go() -> None:
    fetch = Fake(Limited(25), 1)
    results = run(range(2000), stage(fetch, batch_size=100, workers=1), str)
    check_all_but(set(), results)
    assert max(fetch.sizes[8:]) == 25


@in_virtual_time
@pytest.mark.parametrize(("batch_size", "limit", "size"), [(25, 13, 13), (25, 12, 7), (3, 2, 2), (2, 1, 1)])
def test_size_is_the_larger_half_of_an_odd_batch(batch_size: int, limit: int, size: int) -> None:
    fetch = Fake(Limited(limit), 1)
    results = run(range(500), stage(fetch, batch_size=batch_size, workers=1), str)
    check_all_but(set(), results)
    assert max(fetch.sizes[10:]) == size


@in_virtual_time
@pytest.mark.parametrize("status", [400, 413])
def test_size_stays_when_one_item_was_to_blame(status: int) -> None:
    fetch = Fake(refusing({5}, lambda: ApiError(status)), 1)
    results = run(range(1000), stage(fetch, batch_size=100, workers=1), str, return_exceptions=True)
    check_all_but({5}, results)
    assert fetch.sizes.count(100) == 10


@pytest.mark.parametrize("of_one_s_own", [False, True])
def test_batches_that_are_too_large_are_cut_anew_on_real_threads(*, of_one_s_own: bool) -> None:
    fetch = Fake(Limited(30))
    with ThreadPoolExecutor(4) as executor:
        first = stage(fetch, batch_size=64, executor=executor if of_one_s_own else None)
        results = run(range(5000), first, str)
    check_all_but(set(), results)
    assert fetch.sizes[-1] <= 30


# --- the second stage


@in_virtual_time
def test_bad_token_of_a_batch_of_stage_two_fails_alone() -> None:
    fetch = Fake(refusing({"t5"}), 1)
    outcomes = outcomes_of(
        range(25), each(lambda item: f"t{item}"), stage(fetch, batch_size=25, workers=1), batch_size=25
    )
    assert [outcome.index for outcome in outcomes if outcome.exception is not None] == [5]
    assert [outcome.result for outcome in outcomes if outcome.index != 5] == [
        f"<t{item}>" for item in range(25) if item != 5
    ]
    assert {outcome.result_attempts for outcome in outcomes} == {1}
    assert notes(outcomes[5].exception) == ["twostage: stage two, 5, 1 attempt"]
    assert len(fetch.calls) <= 1 + 10


@in_virtual_time
def test_size_of_stage_two_is_halved_when_its_batch_is_too_large() -> None:
    fetch = Fake(Limited(20), 1)
    results = run(range(1000), each(int), stage(fetch, batch_size=40, workers=2), batch_size=100)
    check_all_but(set(), results)
    assert max(fetch.sizes[12:]) == 20


# --- calls that must not be repeated


@in_virtual_time
@pytest.mark.parametrize("retry", [None, Retrying(enabled=False)], ids=["None", "enabled=False"])
def test_nothing_is_split_where_calls_must_not_be_repeated(retry: Retrying | None) -> None:
    fetch = Fake(refusing({1}))
    results = run(range(8), fetch, str, batch_size=4, retry=retry, return_exceptions=True)
    check_all_but({0, 1, 2, 3}, results)
    assert len(fetch.calls) == 2


@in_virtual_time
def test_one_attempt_is_not_none_and_allows_a_split() -> None:
    results = run(range(8), refusing({1}), str, batch_size=4, retry=1, return_exceptions=True)
    check_all_but({1}, results)


@in_virtual_time
def test_split_that_ends_in_an_outage_says_nothing_of_the_stage() -> None:
    def answer(batch: list[int]) -> list[int]:
        if len(batch) > 5:
            raise ApiError(413)
        if batch[0] < 10:
            raise ApiError(503)
        return batch

    outcomes = outcomes_of(range(100), stage(Fake(answer, 1), batch_size=10, retry=2), str)
    assert [outcome.index for outcome in outcomes if outcome.exception] == list(range(10))


@in_virtual_time
def test_split_that_ends_in_refreshes_says_nothing_of_the_stage() -> None:
    given: Counter[int] = Counter()

    def fetch_token(item: int) -> tuple[int, int]:
        given[item] += 1
        return item, given[item]

    def answer(tokens: list[tuple[int, int]]) -> list[object]:
        if len(tokens) > 1 and any(item in {0, 4} for item, _ in tokens):
            raise ApiError(400)
        if any(times == 1 for _, times in tokens):
            raise ExpiredError
        return [ApiError(404) if item in {0, 4} else item for item, _ in tokens]

    results = stage(Fake(answer, 1), batch_size=4, workers=2)
    outcomes = outcomes_of(range(8), fetch_token, results, refresh_token_on=ExpiredError)
    assert [outcome.index for outcome in outcomes if outcome.exception] == [0, 4]
