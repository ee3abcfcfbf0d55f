"""Rates: no window of `per` seconds sees more than `limit` begin, and as many as that allows do begin."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import time
import weakref
from collections import Counter
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial, reduce
from heapq import heappop, heappush
from itertools import cycle, pairwise, product
from multiprocessing import get_context
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from common import ALWAYS, LeaveError, frames, until
from fakes import ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, refusing, stage
from forms import each_way
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_none

from twostage import Rate, RunTimeout, Stage, Throttled, iter_two_stage, run_two_stage
from twostage.base.records import Call
from twostage.pace.rates import RateGate
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from forms import Run

Item: TypeAlias = dict[str, int]

PERSISTENT = Retrying(
    retry=retry_if_exception(lambda _: True), stop=stop_after_attempt(1000), wait=wait_none()
)
NOBODY: Any = None  # runs what a gate is asked about by itself


def same(argument: Any) -> Any:  # noqa: ANN401 - whatever it is
    return argument


def slow_at_first(path: Path) -> bool:
    """Notes when it begins, in whatever process."""
    path.write_text(str(time.monotonic()))
    if path.name == "0":
        sleep(0.3)  # past the window of the first three
    return True


def begins(fake: Fake) -> list[float]:
    return [made.began for made in fake.calls]


def kept(starts: Iterable[float | tuple[float, float]], limit: float, per: float) -> bool:
    """Whether no window of `per` seconds sees more begin than `limit`; a start may weigh something."""
    weighed = sorted(start if isinstance(start, tuple) else (start, 1.0) for start in starts)
    for place, (first, _) in enumerate(weighed):
        window = [cost for began, cost in weighed[place:] if began < first + per]
        if math.fsum(window) > limit * (1 + 1e-12):
            return False
    return True


# --- numbers


@each_way
@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (2, [0, 0, 1, 1, 2]),
        (2.0, [0, 0, 1, 1, 2]),
        (Fraction(2), [0, 0, 1, 1, 2]),
        (0.5, [0, 2, 4, 6, 8]),
        (Fraction(1, 2), [0, 2, 4, 6, 8]),
        (2.5, [0, 0.4, 0.8, 1.2, 1.6]),
        (Rate(2), [0, 0, 60, 60, 120]),
        (Rate(3, per=0.5), [0, 0, 0, 0.5, 0.5]),
        (Rate(2.5, per=1), [0, 0, 1, 1, 2]),
        ([2], [0, 0, 1, 1, 2]),
        ((Rate(3, per=10), 2), [0, 0, 1, 10, 10]),
        ([], [0, 0, 0, 0, 0]),
    ],
)
def test_rate_of_either_stage(job: Run, rate: Any, expected: list[float]) -> None:  # noqa: ANN401
    for rated in ("one", "two"):
        with VirtualTime() as virtual:
            fetch = Fake(same, latency=0.1, virtual=virtual)
            stages = [Stage(fetch, workers=8, rate=rate), same]
            assert job(range(5), *(stages if rated == "one" else reversed(stages))) == [0, 1, 2, 3, 4]
            assert begins(fetch) == pytest.approx(expected)


@pytest.mark.parametrize("latency", [0.0, 0.7, 40.0])
def test_as_many_begin_as_may(virtual: VirtualTime, latency: float) -> None:
    fetch = Fake(same, latency=latency, virtual=virtual)
    run_two_stage(range(100), same, Stage(fetch, workers=100, rate=Rate(7, per=1.1)), token_workers=100)
    assert all(later == first + 1.1 for first, later in pairwise(begins(fetch)[::7]))
    assert Counter(begins(fetch)).most_common()[-2][1] == 7
    assert virtual.now == pytest.approx(14 * 1.1 + latency)


def test_window_slides_with_the_starts(virtual: VirtualTime) -> None:
    fetch_token = Fake(same, latency=lambda item: (1, 1, 8, 1, 1)[item])
    fetch_result = Fake(same, virtual=virtual)
    run_two_stage(range(5), fetch_token, Stage(fetch_result, rate=Rate(2, per=10)), token_workers=1)
    assert begins(fetch_result) == [1, 2, 11, 12, 21]


def test_workers_bound_what_runs_at_once_still(virtual: VirtualTime) -> None:
    fetch = SimulatedApi(same, latency=3)
    run_two_stage(range(20), same, Stage(fetch, workers=4, rate=50))
    assert (fetch.most_at_once, virtual.now) == (4, 15)


def test_call_that_waits_holds_nobody_else_back(virtual: VirtualTime) -> None:
    fetch_token = Fake(same, latency=1, virtual=virtual)
    fetch_result = Fake(same, virtual=virtual)
    run_two_stage(range(8), fetch_token, Stage(fetch_result, workers=1, rate=0.1), token_workers=1)
    assert begins(fetch_token) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert begins(fetch_result) == [1, 11, 21, 31, 41, 51, 61, 71]


def test_each_job_has_a_window_of_its_own(virtual: VirtualTime) -> None:
    fetch = Fake(same, virtual=virtual)
    rated = Stage(fetch, rate=Rate(2, per=1000))
    for _ in range(3):
        run_two_stage(range(2), same, rated)
    assert begins(fetch) == [0] * 6


# --- weights


def test_calls_weigh_what_cost_says_and_begin_in_their_order(virtual: VirtualTime) -> None:
    fetch = Fake(same, virtual=virtual)
    costs = [4, 4, 10, 1, 0, 0.5, 9]
    rate = Rate(10, per=60, cost=itemgetter(1))
    items = list(enumerate(costs))
    run_two_stage(items, same, Stage(fetch, rate=rate), token_workers=1)
    assert fetch.asked == items
    assert begins(fetch) == [0, 0, 60, 120, 120, 120, 180]


def test_dear_call_is_not_overtaken_for_ever(virtual: VirtualTime) -> None:
    fetch = Fake(same, latency=0.5, virtual=virtual)
    rate = Rate(10, per=10, cost=lambda item: 10 if item == 20 else 1)
    run_two_stage(range(40), Fake(same, latency=0.3), Stage(fetch, rate=rate), token_workers=1)
    assert fetch.asked == list(range(40))
    assert kept([(made.began, 10.0 if made.argument == 20 else 1.0) for made in fetch.calls], 10, 10)


def test_several_rates_are_taken_all_or_none(virtual: VirtualTime) -> None:
    fetch = Fake(same, virtual=virtual)
    rates = [Rate(2, per=100), Rate(10, per=10, cost=itemgetter(1))]
    run_two_stage([(0, 10), (1, 10), (2, 1), (3, 1), (4, 1)], same, Stage(fetch, rate=rates), token_workers=1)
    assert begins(fetch) == [0, 10, 100, 110, 200]


def test_cost_is_asked_once_a_start_before_it(virtual: VirtualTime) -> None:
    def cost(item: int) -> float:
        asked.append((virtual.now, item))
        return 1

    def answer(item: int) -> int:
        if item == 1 and fetch.asked.count(1) == 1:
            raise ApiError(503)
        return item

    asked: list[tuple[float, int]] = []
    fetch = Fake(answer, virtual=virtual)
    run_two_stage(range(4), same, Stage(fetch, rate=Rate(1, per=10, cost=cost), retry=ALWAYS))
    assert fetch.asked == [0, 1, 2, 1, 3]
    assert [item for _, item in asked] == fetch.asked
    assert [now for now, _ in asked] == [0, 0, 10, 20, 30]  # by then it waits for its window


def test_cost_of_another_attempt_is_asked_anew(virtual: VirtualTime) -> None:
    def cost(batch: list[int]) -> float:
        asked.append(batch)
        return len(batch)

    asked: list[list[int]] = []
    fetch = Fake(lambda batch: {item: item for item in batch[:2]}, virtual=virtual)
    rate = Rate(6, per=10, cost=cost)
    run_two_stage(range(5), stage(fetch, batch_size=5, retry_missing=True, retry=ALWAYS, rate=rate), same)
    assert asked == fetch.asked == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]
    assert begins(fetch) == [0, 10, 10]


def test_call_that_has_to_go_first_is_asked_for_its_own_cost() -> None:
    gate = RateGate(Rate(10, cost=lambda call: call.attempts), same)
    dear, cheap = Call(), Call()
    dear.attempts, cheap.attempts = 8, 2
    for call in (dear, cheap):
        assert gate.when_may_start(10.0, NOBODY, call) == 10
    gate.started(cheap, 10.0)
    assert gate.when_may_start(10.0, NOBODY, dear) == 10
    gate.started(dear, 10.0)
    assert gate.when_may_start(10.0, NOBODY, cheap) == 70


def test_settling_lower_lets_others_begin_earlier(virtual: VirtualTime) -> None:
    fetch = Fake(same, latency=1, virtual=virtual)
    rate = Rate(10, per=60, cost=lambda item: 6, settle=lambda item, answer: 2)
    run_two_stage(range(4), same, Stage(fetch, rate=rate), token_workers=1)
    assert begins(fetch) == [0, 1, 2, 60]


@pytest.mark.parametrize("settled", [10, 25, 1e300])
def test_settling_higher_holds_others_back(virtual: VirtualTime, settled: float) -> None:
    fetch = Fake(same, latency=1, virtual=virtual)
    rate = Rate(10, per=60, cost=lambda item: 1, settle=lambda item, answer: settled)
    run_two_stage(range(3), same, Stage(fetch, workers=1, rate=rate))
    assert begins(fetch) == [0, 60, 120]


def test_weight_so_large_that_others_vanish_in_it_is_forgotten(virtual: VirtualTime) -> None:
    fetch = Fake(same, latency=1, virtual=virtual)
    rate = Rate(10, cost=lambda item: 4, settle=lambda item, answer: 4 if item else 1e300)
    run_two_stage(range(5), same, Stage(fetch, rate=rate), token_workers=1)
    assert begins(fetch) == [0, 0, 60, 60, 120]


def test_settling_without_a_cost(virtual: VirtualTime) -> None:
    fetch = Fake(same, latency=1, virtual=virtual)
    rate = Rate(2, per=60, settle=lambda item, answer: 0 if item == 0 else 1)
    run_two_stage(range(4), same, Stage(fetch, rate=rate), token_workers=1)
    assert begins(fetch) == [0, 0, 1, 60]


@in_virtual_time
def test_settle_is_told_of_answers_and_of_no_failure() -> None:
    def settle(batch: list[int], answer: list[str]) -> float:
        told.append((batch, answer))
        return 1

    def answer(batch: list[int]) -> list[str]:
        if len(fetch.calls) == 1:
            raise ApiError(503)
        return [str(item) for item in batch]

    told: list[Any] = []
    fetch = Fake(answer)
    run_two_stage(range(3), stage(fetch, batch_size=2, workers=1, rate=Rate(9, settle=settle)), same)
    assert sorted(told) == [([0, 1], ["0", "1"]), ([2], ["2"])]


@in_virtual_time
def test_cost_above_its_limit_fails_that_call_alone() -> None:
    rate = Rate(10, cost=len)
    outcomes = outcomes_of(["a", "b" * 11, "c"], same, Stage(same, rate=rate))
    assert [type(outcome.exception) for outcome in outcomes] == [type(None), ValueError, type(None)]
    error = outcomes[1].exception
    assert str(error) == "the call weighs 11, and its rate allows 10"
    assert notes(error) == ["twostage: stage two, 'bbbbbbbbbbb', 0 attempts"]
    assert outcomes[1].result_attempts == 0


@in_virtual_time
def test_cost_above_the_limit_of_one_of_several_rates() -> None:
    rates = [Rate(100, cost=len), Rate(10, cost=len), Rate(1, per=1)]
    fetch = Fake(same)
    outcomes = outcomes_of(["b" * 11, "a", "b" * 12, "c"], same, Stage(fetch, rate=rates))
    assert [outcome.exception is None for outcome in outcomes] == [False, True, False, True]
    assert fetch.asked == ["a", "c"]


@each_way
@pytest.mark.parametrize("rated", ["one", "two"])
def test_cost_above_its_limit_is_the_job_s_end(job: Run, rated: str) -> None:
    with VirtualTime():
        fetch = Fake(same, latency=1)
        stages = [Stage(fetch, rate=Rate(10, cost=len)), same]
        with pytest.raises(ValueError, match="the call weighs 11, and its rate allows 10") as caught:
            job(["a", "b" * 11, *"cdefgh"], *(stages if rated == "one" else reversed(stages)))
        assert notes(caught.value) == [f"twostage: stage {rated}, 'bbbbbbbbbbb', 0 attempts"]
        assert len(fetch.calls) <= 7


@in_virtual_time
def test_cost_that_raises_fails_its_call() -> None:
    def cost(item: int) -> float:
        return {0: 1, 2: 1}[item]

    outcomes = outcomes_of(range(3), Stage(same, rate=Rate(10, cost=cost)), same)
    assert [repr(outcome.exception) for outcome in outcomes] == ["None", "KeyError(1)", "None"]
    assert frames(outcomes[1].exception or LeaveError()) == ["cost"]
    assert notes(outcomes[1].exception) == ["twostage: stage one, 1, 0 attempts"]


@in_virtual_time
@pytest.mark.parametrize("weight", ["3", None, -1, math.nan, math.inf, True, [1], 10**400], ids=type)
def test_cost_that_is_no_weight_fails_its_call(weight: Any) -> None:  # noqa: ANN401
    rate = Rate(10, cost=lambda item: weight if item == 1 else 1)
    outcomes = outcomes_of(range(3), same, Stage(same, rate=rate))
    assert [outcome.exception is None for outcome in outcomes] == [True, False, True]
    with pytest.raises(ValueError, match=r"^cost returned .*; expected a number of at least 0\n"):
        outcomes[1].result  # noqa: B018 - it raises


@in_virtual_time
def test_all_calls_may_be_refused_by_their_cost() -> None:
    outcomes = outcomes_of(range(3000), same, Stage(same, rate=Rate(1, cost=lambda item: 2)))
    assert {type(outcome.exception) for outcome in outcomes} == {ValueError}


@in_virtual_time
@pytest.mark.parametrize("function", ["cost", "settle"])
def test_what_is_no_exception_ends_the_job(function: str) -> None:
    def leave(*_: object) -> float:
        raise LeaveError

    with pytest.raises(LeaveError):
        outcomes_of(range(3), same, Stage(same, rate=replace(Rate(10), **{function: leave})))  # type: ignore[arg-type]


@in_virtual_time
def test_settle_that_raises_ends_the_job() -> None:
    def settle(item: int, answer: int) -> float:
        return {0: 1, 2: 1}[item]

    with pytest.raises(KeyError) as caught:
        outcomes_of(range(9), same, Stage(same, workers=1, rate=Rate(10, settle=settle)))
    assert frames(caught.value)[-1] == "settle"


@in_virtual_time
@pytest.mark.parametrize("weight", ["3", None, -1, math.nan, True], ids=type)
def test_settle_that_gives_no_weight_ends_the_job(weight: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=r"^settle returned .*; expected a number of at least 0$"):
        outcomes_of(range(9), same, Stage(same, rate=Rate(10, settle=lambda item, answer: weight)))


# --- with all the rest


def test_batch_is_one_start_and_weighs_what_cost_says_of_it(virtual: VirtualTime) -> None:
    one, two = Fake(each(same), latency=0.1, virtual=virtual), Fake(each(same), latency=0.1, virtual=virtual)
    fetch_tokens = stage(one, batch_size=4, rate=Rate(8, per=10, cost=sum))
    fetch_results = stage(two, batch_size=2, rate=Rate(1, per=3))
    items = [1, 1, 1, 1, 2, 2, 2, 2, 5, 0, 0, 3]
    assert run_two_stage(items, fetch_tokens, fetch_results) == items
    assert one.asked == [[1, 1, 1, 1], [2, 2, 2, 2], [5, 0, 0, 3]]
    assert begins(one) == [0, 10, 20]
    assert sorted(two.asked_items) == sorted(items)
    assert kept(begins(two), 1, 3)


def test_retries_count(virtual: VirtualTime) -> None:
    def answer(item: int) -> int:
        if fetch.asked.count(item) < 3:
            raise ApiError(503)
        return item

    fetch = Fake(answer, virtual=virtual)
    run_two_stage(range(2), same, Stage(fetch, rate=Rate(1, per=10), retry=ALWAYS), token_workers=1)
    assert begins(fetch) == [0, 10, 20, 30, 40, 50]


def test_retry_waits_behind_the_call_that_waits_for_the_rate(virtual: VirtualTime) -> None:
    def answer(item: int) -> int:
        if fetch.asked.count(item) == 1 and item == 0:
            raise ApiError(503)
        return item

    fetch = Fake(answer, latency=1, virtual=virtual)
    rate = Rate(1, per=10, cost=lambda item: 1)
    run_two_stage(range(4), same, Stage(fetch, rate=rate, retry=ALWAYS), token_workers=1)
    assert fetch.asked == [0, 1, 0, 2, 3]
    assert begins(fetch) == [0, 10, 20, 30, 40]


def test_halves_of_a_refused_batch_count(virtual: VirtualTime) -> None:
    fetch = Fake(refusing({5}), latency=0.1, virtual=virtual)
    outcomes = outcomes_of(range(16), stage(fetch, batch_size=8, rate=Rate(2, per=10)), same)
    assert [outcome.item for outcome in outcomes if outcome.exception] == [5]
    assert len(fetch.calls) == 2 + 6
    assert begins(fetch) == [0, 0, 10, 10, 20, 20, 30, 30]


def expired_at_first() -> Callable[[int], int]:
    """Returns a function of stage two to which each token is no good at the first time."""
    asked: Counter[int] = Counter()

    def fetch_result(token: int) -> int:
        asked[token] += 1
        if asked[token] == 1:
            raise ExpiredError
        return token

    return fetch_result


def test_second_token_counts(virtual: VirtualTime) -> None:
    fetch_token, rate = Fake(same, virtual=virtual), Rate(2, per=10)
    results = run_two_stage(
        range(6), Stage(fetch_token, rate=rate), expired_at_first(), refresh_token_on=ExpiredError
    )
    assert results == [0, 1, 2, 3, 4, 5]
    assert begins(fetch_token) == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40, 50, 50]


def test_each_token_of_many_counts(virtual: VirtualTime) -> None:
    fetch = Fake(same, virtual=virtual)
    results = run_two_stage([3, 0, 2], range, Stage(fetch, rate=Rate(2, per=10)), many=True)
    assert results == [[0, 1, 2], [], [0, 1]]
    assert begins(fetch) == [0, 0, 10, 10, 20]


def test_token_of_many_whose_cost_is_refused() -> None:
    with VirtualTime():
        fetch_result = Stage(same, rate=Rate(1, per=1, cost=same))
        results: Any = run_two_stage([2, 4], range, fetch_result, many=True, return_exceptions=True)
    assert results[0] == [0, 1]
    assert [type(result) for result in results[1]] == [int, int, ValueError, ValueError]


def test_pause_holds_back_too_and_the_rate_goes_on_after_it(virtual: VirtualTime) -> None:
    def answer(item: int) -> int:
        if len(fetch.calls) == 3:
            raise Throttled(25)
        return item

    fetch = Fake(answer, virtual=virtual)
    run_two_stage(range(6), same, Stage(fetch, rate=Rate(2, per=10)), token_workers=1)
    began = begins(fetch)
    assert began[:4] == [0, 0, 10, 10]  # the fourth begins before the third is heard of
    assert began[4] >= 35
    assert kept(began, 2, 10)
    assert len(began) == 7


def test_call_that_was_taken_back_before_it_began_is_no_start(virtual: VirtualTime) -> None:
    gate = RateGate(Rate(10, per=10, cost=lambda call: 6), same)
    call = Call()
    gate.started(call, 1.0)
    assert gate.when_may_start(2.0, NOBODY, Call()) > 2
    gate.taken_back(call)
    assert gate.when_may_start(2.0, NOBODY, Call()) == 2
    gate.started(call, 2.0)
    assert gate.when_may_start(3.0, NOBODY, Call()) > 3


def test_time_out_is_for_those_that_wait_for_the_rate_too(virtual: VirtualTime) -> None:
    fetch = Fake(same, virtual=virtual)
    rated = Stage(fetch, rate=Rate(1, per=10))
    results: Any = run_two_stage(range(6), same, rated, timeout=25, return_exceptions=True)
    assert begins(fetch) == [0, 10, 20]
    assert results[:3] == [0, 1, 2]
    assert {type(result) for result in results[3:]} == {RunTimeout}
    assert virtual.now == 25


def test_attempt_s_time_does_not_run_while_it_waits(virtual: VirtualTime) -> None:
    fetch = Fake(same, latency=2, virtual=virtual)
    run_two_stage(range(4), same, Stage(fetch, attempt_timeout=3, rate=0.1, retry=None))
    assert begins(fetch) == [0, 10, 20, 30]


def test_adaptive_stage_keeps_its_rate(virtual: VirtualTime) -> None:
    api = SimulatedApi(same, latency=(0.5, 2), limit=5)
    fetch = Fake(api, virtual=virtual)
    run_two_stage(range(300), same, Stage(fetch, workers=40, adaptive=True, rate=Rate(9, per=3)))
    assert kept(begins(fetch), 9, 3)
    assert len(fetch.calls) > 300  # it has found out
    assert virtual.now < 300 / 3 * 1.2


def test_stage_that_both_a_rate_and_an_outage_hold_back(virtual: VirtualTime) -> None:
    def answer(item: int) -> int:
        if 50 < virtual.now < 150:
            raise ConnectionRefusedError
        return item

    fetch = Fake(answer, latency=0.5, virtual=virtual)
    assert run_two_stage(range(500), same, Stage(fetch, workers=8, rate=Rate(20, per=5))) == list(range(500))
    assert kept(begins(fetch), 20, 5)


@st.composite
def rates(draw: st.DrawFn) -> list[Rate]:
    costs = [None, itemgetter("cost"), itemgetter("size")]
    periods = st.floats(0.05, 20) | st.sampled_from([0.1, 0.3, 1 / 3, 1.1, 7])
    return [
        Rate(draw(st.integers(6 if cost else 1, 20)), per=draw(periods), cost=cost)
        for cost in draw(st.lists(st.sampled_from(costs), min_size=1, max_size=3))
    ]


weights = st.lists(st.integers(0, 6), min_size=1, max_size=40)
times = st.lists(st.floats(0, 9) | st.sampled_from([0.0, 0.1, 0.3]), min_size=1, max_size=7)


def items_of(costs: list[int]) -> list[Item]:
    return [{"cost": cost, "size": place % 7} for place, cost in enumerate(costs)]


@settings(deadline=None, max_examples=150)
@given(
    wanted=rates(),
    costs=weights,
    latencies=times,
    fail=st.sampled_from([0.0, 0.3]),
    workers=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_no_window_ever_sees_more_than_its_limit(
    wanted: list[Rate], costs: list[int], latencies: list[float], fail: float, workers: int, seed: int
) -> None:
    turns = cycle(latencies)
    with VirtualTime(seed) as virtual:
        api = SimulatedApi(same, latency=lambda _: next(turns), fail=fail, seed=seed)
        fakes = [Fake(api, virtual=virtual), Fake(api, virtual=virtual)]
        stages = [Stage(fake, workers=workers, rate=wanted, retry=PERSISTENT) for fake in fakes]
        assert run_two_stage(items_of(costs), *stages) == items_of(costs)
    for fake, rate in product(fakes, wanted):
        assert kept([(made.began, weight(rate, made.argument)) for made in fake.calls], rate.limit, rate.per)


def weight(rate: Rate, item: Item) -> float:
    return 1 if rate.cost is None else rate.cost(item)


def earliest(
    items: Sequence[Item], wanted: Sequence[Rate], latencies: Sequence[float], workers: int
) -> list[float]:
    """Says when each call begins if none overtakes another, and each begins as soon as it may."""
    now = 0.0
    made: list[tuple[float, Item]] = []
    ends: list[float] = []
    for item, latency in zip(items, cycle(latencies), strict=False):
        if len(ends) == workers:
            now = max(now, heappop(ends))
        full = True
        while full:
            full = False
            for rate in wanted:
                window = [start for start in made if start[0] + rate.per > now]
                if sum(weight(rate, other) for _, other in window) + weight(rate, item) > rate.limit:
                    now, full = window[0][0] + rate.per, True
        made.append((now, item))
        heappush(ends, now + latency)
    return [began for began, _ in made]


@settings(deadline=None, max_examples=150)
@given(wanted=rates(), costs=weights, latencies=times, workers=st.integers(1, 12))
def test_each_call_begins_as_soon_as_it_may(
    wanted: list[Rate], costs: list[int], latencies: list[float], workers: int
) -> None:
    turns = cycle(latencies)
    with VirtualTime() as virtual:
        fetch = Fake(same, latency=lambda _: next(turns), virtual=virtual)
        items = items_of(costs)
        run_two_stage(items, same, Stage(fetch, workers=workers, rate=wanted), token_workers=1)
    assert fetch.asked == items
    assert begins(fetch) == earliest(items, wanted, latencies, workers)


@pytest.mark.parametrize("costs", [(0.1, 0.2, 0.3), (0.1, 0.7, 1.1), (0.3, 0.3, 0.3)])
def test_costs_that_round_badly_keep_nobody_waiting_for_ever(
    virtual: VirtualTime, costs: tuple[float, ...]
) -> None:
    limit = reduce(add, costs)  # `sum` does not round like that
    fetch = Fake(same, virtual=virtual)
    items = [*enumerate(costs), (3, limit)]
    run_two_stage(items, same, Stage(fetch, rate=Rate(limit, cost=itemgetter(1))), token_workers=1)
    assert begins(fake=fetch) == [0, 0, 0, 60]


def test_call_waits_for_the_latest_of_those_that_have_to_leave_the_window() -> None:
    gate = RateGate(Rate(2, per=1, cost=same), lambda call: call.attempts)
    late, early, dear = Call(), Call(), Call()
    late.attempts = early.attempts = 1
    dear.attempts = 2
    for call in (late, early):
        assert gate.when_may_start(10.0, NOBODY, call) <= 10
        gate.started(call, 10.0)
    early.began = 10.25
    assert gate.when_may_start(10.5, NOBODY, dear) == 11.5  # `late` has not begun yet
    late.began = 10.75
    assert gate.when_may_start(11.25, NOBODY, dear) == 11.75
    assert gate.when_may_start(11.75, NOBODY, dear) == 11.75


def test_settling_after_the_window_does_not_count(virtual: VirtualTime) -> None:
    fetch_token = Fake(same, latency=5)
    fetch_result = Fake(same, latency=lambda item: 22 if item == 0 else 1, virtual=virtual)
    rate = Rate(2, per=10, settle=lambda item, answer: 1)
    run_two_stage(range(10), fetch_token, Stage(fetch_result, workers=3, rate=rate), token_workers=1)
    assert begins(fetch_result) == [5.0 * place for place in range(1, 11)]


def test_start_that_was_taken_back_holds_nothing_back() -> None:
    gate = RateGate(Rate(2, per=1), same)
    first, gone, later = Call(), Call(), Call()
    for call in (gone, first):
        gate.started(call, 10.0)
    assert gate.when_may_start(10.5, NOBODY) > 10.5
    gate.taken_back(gone)
    assert gate.when_may_start(10.5, NOBODY) == 10.5
    first.began = 10.5
    gate.ended(first, None, None, 10.5)
    gate.started(later, 10.5)
    later.began = 10.5
    assert gate.when_may_start(10.5, NOBODY) == 11.5
    assert gate.when_may_start(11.5, NOBODY) == 11.5
    assert not gate._starts


def test_rate_keeps_no_answer() -> None:
    class Answer:
        pass

    gone = []
    with iter_two_stage(range(3), same, Stage(lambda token: Answer(), rate=Rate(100))) as outcomes:
        for outcome in outcomes:
            gone.append(weakref.ref(outcome.result))
            del outcome
            gc.collect()
            until(lambda: gone[-1]() is None)
    assert len(gone) == 3


@in_virtual_time
def test_item_that_comes_back_for_a_token_waits_for_the_rate() -> None:
    results = run_two_stage(
        range(3), Stage(same, rate=Rate(3, per=10)), expired_at_first(), refresh_token_on=ExpiredError
    )
    assert results == [0, 1, 2]


@in_virtual_time
def test_half_of_a_batch_whose_cost_is_refused_while_all_workers_are_busy() -> None:
    def fetch_tokens(batch: list[int]) -> list[int]:
        sleep(1 if 0 in batch else 30)
        if 0 in batch and len(batch) > 1:
            raise ApiError(400)
        return batch

    def cost(batch: list[int]) -> float:
        return {3: 1, 2: 1}[len(batch)]

    outcomes = outcomes_of(
        range(9), stage(fetch_tokens, batch_size=3, workers=2, rate=Rate(100, cost=cost)), same
    )
    assert [str(outcome.exception) for outcome in outcomes] == ["1"] * 3 + ["None"] * 6


def test_batches_that_wait_for_a_split_go_on_if_its_half_may_never_start() -> None:
    with VirtualTime():
        rate = Rate(100, cost=lambda batch: {4: 1}[len(batch)])
        fetch_tokens = Fake(refusing({0, 4, 8, 12}), latency=1)
        outcomes = outcomes_of(range(16), stage(fetch_tokens, batch_size=4, rate=rate), same)
    assert [str(outcome.exception) for outcome in outcomes] == ["2"] * 16


# --- on real threads


@pytest.mark.parametrize(
    ("pool", "most"),
    [
        (ThreadPoolExecutor, 3),
        (
            partial(ProcessPoolExecutor, mp_context=get_context("spawn")),
            3 + 2,
        ),  # it hands out two more than it has processes
    ],
    ids=["threads", "processes"],
)
def test_call_counts_from_when_it_begins_and_not_from_when_an_executor_got_it(
    pool: Callable[[int], Executor], most: int, tmp_path: Path
) -> None:
    with pool(1) as executor:
        fetch_result = stage(slow_at_first, workers=8, executor=executor, rate=Rate(3, per=0.2))
        run_two_stage(range(6), lambda item: tmp_path / str(item), fetch_result)
    begun = [float(path.read_text()) for path in tmp_path.iterdir()]
    assert len(begun) == 6
    assert kept(begun, most, 0.1)  # half of it, as it is noted a little later than it begins


class RememberingPool(ThreadPoolExecutor):
    """Has its futures."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.futures: list[Future[Any]] = []

    def submit(self, *call: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
        future = super().submit(*call, **named)
        self.futures.append(future)
        return future


def test_rate_is_given_back_what_a_pause_takes_back() -> None:
    def fetch_result(item: int) -> int:
        begun.append(item)
        if begun == [0]:
            until(lambda: len(pool.futures) == 3)
            raise Throttled(0.01)
        if begun == [0, 1]:
            until(pool.futures[2].cancelled)
        return item

    begun: list[int] = []
    with RememberingPool(1) as pool:
        rated = Stage(fetch_result, workers=3, executor=pool, rate=Rate(4, per=3600))
        assert run_two_stage(range(3), same, rated, token_workers=1) == [0, 1, 2]
    assert sorted(begun) == [0, 0, 1, 2]


def test_workers_note_begins_that_keep_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(gate: RateGate, call: Call, *end: Any) -> None:  # noqa: ANN401 - however it has ended
        noted.append(call.began)
        hear(gate, call, *end)

    noted: list[float] = []
    hear = RateGate.ended
    monkeypatch.setattr(RateGate, "ended", ended)
    fetch = SimulatedApi(same, latency=(0.0, 0.02), fail=0.1)
    begun: list[float] = []

    def fetch_result(item: int) -> int:
        begun.append(time.monotonic())
        fetch(item)
        return item

    rated = Stage(fetch_result, workers=16, rate=Rate(20, per=0.1), retry=ALWAYS)
    assert run_two_stage(range(80), same, rated) == list(range(80))
    assert len(noted) == len(begun) == fetch.calls > 80
    assert kept(noted, 20, 0.1)
    assert all(noted <= later for noted, later in zip(sorted(noted), sorted(begun), strict=True))


def test_rate_s_waits_leave_with_ctrl_c_s_end_of_the_job() -> None:
    with iter_two_stage(range(100), same, Stage(same, rate=Rate(1, per=3600))) as outcomes:
        assert next(outcomes).result == 0


# --- itself


def test_rate_survives_pickle_as_far_as_its_functions_do() -> None:
    rate = Rate(300, per=5, cost=len, settle=max)
    assert pickle.loads(pickle.dumps(rate)) == rate  # noqa: S301 - our own
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(Rate(300, cost=lambda item: 1))


def test_repr_tells_no_argument_of_a_function() -> None:
    rate = Rate(300, 5, cost=partial(max, "secret"), settle=partial(max, "secret"))
    assert repr(rate) == "Rate(limit=300, per=5)"
    assert repr(Stage(same, rate=[rate, 5])).count("secret") == 0


def test_rate_can_not_be_changed() -> None:
    rate: Any = Rate(5)
    with pytest.raises(AttributeError):
        rate.limit = 6


# --- bad arguments


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"limit": "5"}, TypeError, "limit is '5'; expected a number"),
        ({"limit": True}, TypeError, "limit is True; expected a number"),
        ({"limit": None}, TypeError, "limit is None; expected a number"),
        ({"limit": 0}, ValueError, "limit is 0; expected at least 1: for slower rates raise per"),
        ({"limit": 0.5}, ValueError, "limit is 0.5; expected at least 1: for slower rates raise per"),
        ({"limit": math.inf}, ValueError, "limit is inf; expected at least 1"),
        ({"limit": math.nan}, ValueError, "limit is nan; expected at least 1"),
        ({"limit": 10**400}, ValueError, r"limit is 1000\d*\.\.\.\d*; expected at least 1"),
        ({"limit": 0, "cost": len}, ValueError, "limit is 0; expected a number above 0"),
        ({"limit": -1, "cost": len}, ValueError, "limit is -1; expected a number above 0"),
        ({"per": "1"}, TypeError, "per is '1'; expected a number of seconds"),
        ({"per": None}, TypeError, "per is None; expected a number of seconds"),
        ({"per": 0}, ValueError, "per is 0; expected a number of seconds above 0"),
        ({"per": math.nan}, ValueError, "per is nan; expected a number of seconds above 0"),
        ({"per": 10**400}, ValueError, r"per is 1000\d*\.\.\.\d*; expected a number of seconds above 0"),
        ({"cost": 5}, TypeError, "cost is 5; expected a function"),
        ({"settle": 5}, TypeError, "settle is 5; expected a function"),
        ({"settle": asyncio.sleep}, TypeError, "settle is a coroutine function"),
    ],
)
def test_rate_that_can_not_be(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        Rate(**{"limit": 5, "per": 60} | settings)


@pytest.mark.parametrize(
    ("rate", "kind"),
    [
        ("9", TypeError),
        (True, TypeError),
        (len, TypeError),
        ({5: 1}, TypeError),
        ([5, "9"], TypeError),
        (0, ValueError),
        (-0.5, ValueError),
        (math.inf, ValueError),
        (math.nan, ValueError),
        (10**400, ValueError),
        ([5, 0], ValueError),
    ],
)
def test_stage_s_rate_that_can_not_be(rate: Any, kind: type[Exception]) -> None:  # noqa: ANN401
    with pytest.raises(kind, match=r"^rate is .*; expected a number of starts a second"):
        Stage(same, rate=rate)
