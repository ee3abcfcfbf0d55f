"""Rates: no window of `per` seconds sees more than `limit` begin, and as many as that allows do begin."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from common import LeaveError, each_way, until
from fakes import ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, refusing, stage
from hypothesis import given, settings
from hypothesis import strategies as st

from twostage import Rate, Stage, Throttled, iter_two_stage, run_two_stage
from twostage.calls import Call
from twostage.gates import RateGate
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from common import Run

NOBODY: Any = None  # runs what a gate is asked about by itself


def same(argument: Any) -> Any:  # noqa: ANN401 - whatever it is
    return argument


def slow_at_first(path: Path) -> bool:
    """Notes when it begins, in whatever process."""
    path.write_text(str(time.monotonic()))
    if path.name == "0":
        sleep(1.2)
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


# --- what was found


@pytest.mark.parametrize("costs", [(0.1, 0.2, 0.3), (0.1, 0.7, 1.1), (0.3, 0.3, 0.3)])
def test_costs_that_round_badly_keep_nobody_waiting_for_ever(
    virtual: VirtualTime, costs: tuple[float, ...]
) -> None:
    limit = sum(costs)
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
    def fetch_result(token: int) -> int:
        asked[token] += 1
        if asked[token] == 1:
            raise ExpiredError
        return token

    asked: Counter[int] = Counter()
    fetch_token = Stage(same, rate=Rate(3, per=10))
    assert run_two_stage(range(3), fetch_token, fetch_result, refresh_token_on=ExpiredError) == [0, 1, 2]


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


# --- on real threads


@pytest.mark.parametrize(
    ("pool", "most"),
    [
        (ThreadPoolExecutor, 3),
        (ProcessPoolExecutor, 3 + 2),  # it hands out two more than it has processes
    ],
)
def test_call_counts_from_when_it_begins_and_not_from_when_an_executor_got_it(
    pool: Callable[[int], Executor], most: int, tmp_path: Path
) -> None:
    with pool(1) as executor:
        fetch_result = stage(slow_at_first, workers=8, executor=executor, rate=Rate(3, per=0.4))
        run_two_stage(range(9), lambda item: tmp_path / str(item), fetch_result)
    begun = [float(path.read_text()) for path in tmp_path.iterdir()]
    assert len(begun) == 9
    assert kept(begun, most, 0.2)  # half of it, as it is noted a little later than it begins
