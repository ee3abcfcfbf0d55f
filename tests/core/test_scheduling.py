"""When calls begin, and how far the source is read: in virtual time, where every figure is exact."""

from __future__ import annotations

import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from contract import Plan, check
from fakes import each
from hypothesis import given
from hypothesis import strategies as st
from tenacity import Retrying, stop_after_attempt, wait_fixed

from twostage import Stage, iter_two_stage, run_two_stage
from twostage.base.gate import Gate
from twostage.base.words import STAGES
from twostage.core.lines import Line
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twostage.base.records import Call
    from twostage.base.runner import Runner


def retry_after(seconds: float) -> Retrying:
    return Retrying(stop=stop_after_attempt(20), wait=wait_fixed(seconds))


class Timed:
    """A function that takes `latency` seconds, and fails as many times as told for each argument."""

    def __init__(
        self,
        virtual: VirtualTime,
        latency: float | Callable[[Any], float] = 1.0,
        fails: dict[Any, int] | None = None,
    ) -> None:
        self.virtual = virtual
        self.latency = latency
        self.fails = Counter(fails or {})
        self.began: list[tuple[Any, float]] = []
        self.ended: list[float] = []

    def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - items and tokens of any kind
        self.began.append((argument, self.virtual.now))
        sleep(self.latency(argument) if callable(self.latency) else self.latency)
        self.ended.append(self.virtual.now)
        if not isinstance(argument, list) and self.fails[argument]:
            self.fails[argument] -= 1
            raise ApiError(503)
        return argument

    @property
    def times(self) -> list[float]:
        return [time for _, time in self.began]


# --- overlap and limits


def test_first_result_is_there_before_the_last_batch_is_sent(virtual: VirtualTime) -> None:
    tokens, results = Timed(virtual), Timed(virtual)
    run_two_stage(range(1000), tokens, results, batch_size=100)
    assert min(results.ended) < max(tokens.times)


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("fail", [0.0, 0.2])
def test_limits_are_reached_and_never_exceeded(
    virtual: VirtualTime, batch_size: int | None, fail: float
) -> None:
    tokens: SimulatedApi[Any, Any] = SimulatedApi(lambda it: it, latency=(0.5, 1.5), fail=fail)
    results: SimulatedApi[Any, Any] = SimulatedApi(lambda it: it, latency=(2, 6), fail=fail, seed=1)
    stage = Stage(tokens, workers=3, batch_size=batch_size) if batch_size else Stage(tokens, workers=3)
    run_two_stage(range(500), stage, Stage(results, workers=7), retry=retry_after(1))
    assert (tokens.most_at_once, results.most_at_once) == (3, 7)
    assert (results.calls > 500) is (fail > 0)


def test_makespan_is_that_of_the_bottleneck(virtual: VirtualTime) -> None:
    run_two_stage(
        range(10_000), Timed(virtual, 0.05), Timed(virtual, 0.01), batch_size=100, result_workers=64
    )
    ideal = 10_000 * 0.01 / 64
    assert ideal + 0.05 <= virtual.now <= 1.02 * (ideal + 0.05)


def test_batches_are_whole_but_the_last(virtual: VirtualTime) -> None:
    def source() -> Iterator[int]:
        for item in range(95):
            sleep(item % 3)
            yield item

    tokens = Timed(virtual)
    run_two_stage(source(), tokens, Timed(virtual), batch_size=10, window=35)
    assert [batch for batch, _ in tokens.began] == [
        list(range(at, min(at + 10, 95))) for at in range(0, 95, 10)
    ]


# --- retries


def test_a_retry_begins_when_it_is_due_and_not_before(virtual: VirtualTime) -> None:
    results = Timed(virtual, 2, fails={"item": 3})
    run_two_stage(["item"], str, results, retry=retry_after(7))
    assert results.times == [0, 9, 18, 27]


def test_a_waiting_retry_holds_no_worker(virtual: VirtualTime) -> None:
    results = Timed(virtual, 1, fails={0: 1})
    run_two_stage(range(20), int, results, result_workers=1, retry=retry_after(9.5))
    assert results.times == list(range(21))  # no gap: 10 others ran while the first one waited
    assert results.began[11][0] == 0  # and it went before the rest as soon as it was due


def test_a_failed_batch_comes_back_whole_as_a_list_of_its_own(virtual: VirtualTime) -> None:
    seen: list[list[int]] = []

    def fetch_tokens(items: list[int]) -> list[int]:
        seen.append(items)
        taken = [items.pop() for _ in range(len(items))][::-1]
        if len(seen) == 1:
            raise ApiError(503)
        return taken

    kept: list[list[int]] = []

    def fetch_copied(items: list[int]) -> list[int]:
        kept.append(items.copy())
        return fetch_tokens(items)

    assert run_two_stage(range(6), fetch_copied, int, batch_size=6) == list(range(6))
    assert kept == [list(range(6))] * 2
    assert seen[0] is not seen[1]
    assert virtual.now > 0


def test_failures_with_long_waits_keep_the_workers_busy(virtual: VirtualTime) -> None:
    rng = random.Random(1)
    fails = {item: int(math.log(rng.random(), 0.2)) for item in range(15_000)}  # each attempt, one in five
    results = Timed(virtual, 0.01, fails)
    run_two_stage(range(15_000), each(int), results, batch_size=100, retry=retry_after(1))
    fresh: dict[int, float] = {}
    for item, time in results.began:
        fresh.setdefault(item, time)
    end = max(fresh.values())  # after it there are only waits of calls that have failed again and again
    busy = sum(time < end for time in results.times) * 0.01 / (32 * end)
    assert busy > 0.98


def test_retries_come_due_while_the_consumer_is_away(virtual: VirtualTime) -> None:
    tokens, results = Timed(virtual, fails={5: 2}), Timed(virtual, fails=dict.fromkeys(range(100), 3))
    with iter_two_stage(range(100), tokens, results, retry=retry_after(1)) as outcomes:
        next(outcomes)
        sleep(200)
        assert len(results.began) == 400
        assert max(results.ended) < 100
        assert len(list(outcomes)) == 99


# --- the two bounds


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("batch_size", "window"), [(1, 50), (20, 50), (20, 60), (7, 7)])
def test_window_is_exact(virtual: VirtualTime, batch_size: int, window: int, *, ordered: bool) -> None:
    read = taken = ahead = 0

    def source() -> Iterator[int]:
        nonlocal read, ahead
        for item in range(500):
            read += 1
            ahead = max(ahead, read - taken)
            yield item

    rng = random.Random(1)
    latency = lambda item: 100.0 if item == 3 else rng.expovariate(1)  # noqa: E731 - a straggler
    with iter_two_stage(
        source(),
        Timed(virtual),
        Timed(virtual, latency),
        batch_size=batch_size,
        result_workers=200,
        window=window,
        ordered=ordered,
    ) as outcomes:
        for _ in outcomes:
            taken += 1
            if taken % 10 == 0:
                sleep(5)
    assert taken == read == 500
    assert window - batch_size < ahead <= window
    assert ahead == window or window % batch_size


def test_window_of_the_list_counts_what_is_not_finished(virtual: VirtualTime) -> None:
    results = Timed(virtual, lambda item: 1000.0 if item == 3 else 1.0)
    run_two_stage(range(500), int, results, window=20)
    assert max(results.times) < 100  # the straggler takes one place of 20, and stalls nobody
    assert virtual.now == pytest.approx(1000, abs=2)


@pytest.mark.parametrize(
    ("batch_size", "token_workers", "result_workers"), [(1, 2, 8), (10, 2, 8), (100, 4, 64)]
)
def test_no_more_than_the_bound_is_started_before_a_slow_consumer(
    virtual: VirtualTime, batch_size: int, token_workers: int, result_workers: int
) -> None:
    started = 0

    def fetch_tokens(items: list[int]) -> list[int]:
        nonlocal started
        started += len(items)
        sleep(1)
        return items

    bound = max(256, 2 * (token_workers * batch_size + result_workers))
    with iter_two_stage(
        count(),
        fetch_tokens,
        Timed(virtual),
        batch_size=batch_size,
        token_workers=token_workers,
        result_workers=result_workers,
    ) as outcomes:
        next(outcomes)
        sleep(1000)
        assert bound <= started
        for taken in range(1, 3 * bound):
            assert started < bound + taken + batch_size
            next(outcomes)
            sleep(random.random())


def test_delayed_calls_and_held_outcomes_do_not_count_in_the_bound(virtual: VirtualTime) -> None:
    failing = Timed(virtual, fails=dict.fromkeys(range(1000), 1))
    run_two_stage(range(2000), int, failing, retry=retry_after(1000))
    assert sum(time < 1000 for time in failing.times) == 2000
    straggling = Timed(virtual, lambda item: 1000.0 if item == 0 else 1.0)
    began = virtual.now
    with iter_two_stage(range(2000), int, straggling, ordered=True) as outcomes:
        assert [outcome.item for outcome in outcomes] == list(range(2000))
    assert max(straggling.times) < began + 100


# --- source and consumer


def test_a_pause_of_the_consumer_idles_nobody(virtual: VirtualTime) -> None:
    def job(pause: float) -> float:
        began = virtual.now
        with iter_two_stage(
            range(10_000), Timed(virtual, 0.05), Timed(virtual, 0.01), batch_size=100, result_workers=64
        ) as outcomes:
            for number, _ in enumerate(outcomes, 1):
                if number % 500 == 0:
                    sleep(pause)
        return virtual.now - began

    steady = job(0)
    assert job(0.07) < 1.02 * steady + 0.07  # 1.4 s of pauses in 1.6 s


def test_outcomes_do_not_wait_for_a_source_that_pages(virtual: VirtualTime) -> None:
    def source() -> Iterator[int]:
        for item in range(60):
            if item % 10 == 0:
                sleep(10)
            yield item

    results = Timed(virtual)
    late = []
    with iter_two_stage(source(), Timed(virtual), results, batch_size=10, ordered=True) as outcomes:
        late = [virtual.now - results.ended[outcome.index] for outcome in outcomes]
    assert max(late) <= 10  # one page at most


def test_the_list_goes_on_while_its_source_pages(virtual: VirtualTime) -> None:
    def source() -> Iterator[int]:
        for item in range(100):
            sleep(1)
            yield item

    results = Timed(virtual)
    run_two_stage(source(), int, results)
    assert virtual.now == pytest.approx(101)
    assert results.times == list(range(1, 101))


def test_the_source_is_read_on_while_the_consumer_takes_its_time(virtual: VirtualTime) -> None:
    results = Timed(virtual)
    with iter_two_stage(range(5000), each(int), results, batch_size=10, result_workers=10) as outcomes:
        for _ in outcomes:
            sleep(0.1)  # as long as the workers need for one
    assert virtual.now == pytest.approx(501, abs=3)


def test_outcomes_come_as_they_complete_or_in_order(virtual: VirtualTime) -> None:
    latency = (9, 1, 5, 3, 7).__getitem__
    for ordered, expected in ((False, [1, 3, 2, 4, 0]), (True, [0, 1, 2, 3, 4])):
        with iter_two_stage(range(5), int, Timed(virtual, latency), ordered=ordered) as outcomes:
            assert [outcome.index for outcome in outcomes] == expected


def test_nothing_begins_before_the_first_next_nor_after_close(virtual: VirtualTime) -> None:
    tokens, results = Timed(virtual), Timed(virtual)
    outcomes = iter_two_stage(count(), tokens, results)
    sleep(10)
    assert tokens.began == []
    next(outcomes)
    outcomes.close()
    begun = len(tokens.began), len(results.began)
    sleep(10)
    assert begun == (len(tokens.began), len(results.began))
    assert list(outcomes) == []


def test_failure_cancels_what_waits_and_awaits_what_runs(virtual: VirtualTime) -> None:
    def fail_second(item: int) -> int:
        sleep(1 if item == 1 else 5)
        if item == 1:
            raise ApiError(404)
        return item

    results = Timed(virtual)
    with pytest.raises(ApiError):
        run_two_stage(range(1000), Stage(fail_second, workers=3), results)
    assert virtual.now == 5
    assert results.began == []


# --- one executor for both


def test_ready_tokens_go_before_ready_batches_on_a_shared_executor(virtual: VirtualTime) -> None:
    order: list[str] = []

    def fetch_tokens(items: list[int]) -> list[int]:
        order.append("batch")
        return items

    def fetch_result(token: int) -> int:
        order.append("token")
        return token

    with ThreadPoolExecutor(1) as shared:  # in virtual time it is a name for both to share
        run_two_stage(
            range(40),
            Stage(fetch_tokens, batch_size=10, workers=1, executor=shared),
            Stage(fetch_result, workers=1, executor=shared),
        )
    assert sorted(order) == ["batch"] * 4 + ["token"] * 40


# --- the seam for gates


class EverySecond(Gate):
    """Lets one call a second begin, and hears of each start and end."""

    def __init__(self) -> None:
        self.next = 0.0
        self.started_calls: list[Call] = []
        self.ended_calls: list[Call] = []

    def when_may_start(self, now: float, runner: Runner, call: Call | None = None) -> float:
        return max(now, self.next)

    def started(self, call: Call, now: float) -> None:
        assert now >= self.next
        self.next = now + 1
        self.started_calls.append(call)

    def ended(self, call: Call, answer: object, error: BaseException | None, now: float) -> None:
        self.ended_calls.append(call)


@pytest.mark.parametrize("stage", ["stage one", "stage two"])
def test_gate_holds_starts_back_and_hears_of_each(
    virtual: VirtualTime, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    gate = EverySecond()

    def gated_line(number: int, workers: int, _limit: float, *parts: Any, **more: Any) -> Line:  # noqa: ANN401 - passed on
        gates = [gate] if STAGES[number] == stage else []
        return Line(number, workers, 3, *parts, **more | {"gates": gates})

    monkeypatch.setattr("twostage.job.stages.Line", gated_line)
    fails = {4: 2}
    tokens = Timed(virtual, 0.5, fails if stage == "stage one" else None)
    results = Timed(virtual, 0.5, fails if stage == "stage two" else None)
    run_two_stage(range(10), tokens, results, token_workers=3, result_workers=3, retry=retry_after(0.25))
    times = (tokens if stage == "stage one" else results).times
    assert len(gate.started_calls) == len(gate.ended_calls) == len(times) == 12
    assert {after - before for before, after in pairwise(times)} == {1}


# --- each item gives exactly one outcome


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    items = draw(st.integers(0, 120))
    batch_size = draw(st.none() | st.integers(1, 50))
    some_items = st.frozensets(st.integers(0, max(items - 1, 0)), max_size=4)
    listed, return_exceptions = draw(st.booleans()), draw(st.booleans())
    return Plan(
        items=items,
        batch_size=batch_size,
        workers=draw(st.tuples(st.integers(1, 40), st.integers(1, 40))),
        window=(batch_size or 1) + draw(st.integers(0, 200)),
        latency=draw(
            st.sampled_from([lambda _: 1.0, random.Random.random, lambda rng: rng.paretovariate(1.2)])
        ),
        fail=draw(st.sampled_from([0.0, 0.1, 0.5])),
        lasting=draw(some_items) & frozenset(range(items)),
        miscounted=draw(some_items) & frozenset(range(items)),
        source_fails_at=draw(st.none() | st.integers(0, 120)),
        leave_after=draw(st.none() | st.integers(1, 120)),
        listed=listed,
        ordered=draw(st.booleans()),
        return_exceptions=return_exceptions,
        source_pause=draw(st.sampled_from([0.0, 0.3])),
        consumer_pause=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 2**16)),
        timeout=draw(st.none() | st.floats(0.01, 30)),
        max_failures=draw(st.none() | st.integers(1, 50) | st.floats(0.01, 0.99))
        if return_exceptions
        else None,
        linger=None if listed else draw(st.none() | st.floats(0.01, 10)),
    )


@given(plans())
def test_contract_holds_for_any_job(plan: Plan) -> None:
    check(plan)
