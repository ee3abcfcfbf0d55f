"""Jobs on coroutine functions do what jobs on threads do, on a loop of their own or a user's."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections import Counter
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import AT_ONCE, PATIENCE, Clock, as_it_is, books, ours, until
from fakes import ExpiredError, each, outcomes_of, refusing, stage
from forms import Run, each_way, run
from pacing import asking
from scripts import ran
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from twostage import (
    AsyncExecutor,
    BatchLengthError,
    MissingToken,
    Rate,
    RunTimeout,
    Throttled,
    TooManyFailures,
    iter_two_stage,
    run_two_stage,
)
from twostage.pace.rates import RateGate
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from twostage.base.records import Call

HOUR: Final = Retrying(
    retry=retry_if_exception_type(ConnectionError), stop=stop_after_attempt(2), wait=wait_fixed(3600)
)


def awaited(fetch: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Makes a coroutine function that lets others run before it does what a plain function does."""

    async def call(*arguments: object) -> Any:  # noqa: ANN401 - whatever it gives
        await asyncio.sleep(0)
        return fetch(*arguments)

    return call


class AtOnce:
    """A coroutine function whose calls wait until as many run as are to, or until they are released."""

    def __init__(self, number: int) -> None:
        self.running = self.most = self.calls = 0
        self._number = number
        self._all = asyncio.Event()

    async def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - of both stages
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self._number:
            self._all.set()
        await asyncio.wait_for(self._all.wait(), PATIENCE)
        self.running -= 1
        return argument


# --- what is awaited, and where


class Fetch:
    async def __call__(self, item: int) -> int:
        return await self.method(item)

    async def method(self, item: int) -> int:
        await asyncio.sleep(0)
        return item + 1


async def add(number: int, item: int) -> int:
    await asyncio.sleep(0)
    return number + item


@functools.wraps(Fetch.method)
def wrapping(item: int) -> Coroutine[Any, Any, int]:
    return add(1, item)


@each_way
@pytest.mark.parametrize(
    "fetch",
    [Fetch(), Fetch().method, partial(add, 1), partial(partial(add), 1), wrapping],
    ids=["object", "method", "partial", "partial of partial", "wraps"],
)
@pytest.mark.parametrize("place", ["both", "stage one", "stage two"])
def test_either_stage_or_both_may_be_coroutine_functions(place: str, fetch: Any, job: Run) -> None:  # noqa: ANN401
    def plain(item: int) -> int:
        return item + 1

    first, second = plain if place == "stage two" else fetch, plain if place == "stage one" else fetch
    assert job(range(50), first, second) == list(range(2, 52))


@each_way
def test_both_stages_run_in_one_thread_whatever_loop_it_has(job: Run, on: dict[str, Any]) -> None:
    threads: set[threading.Thread] = set()
    loops: set[asyncio.AbstractEventLoop] = set()
    of_the_job: set[str] = set()

    async def fetch(argument: int) -> int:
        await asyncio.sleep(0)
        threads.add(threading.current_thread())
        loops.add(asyncio.get_running_loop())
        of_the_job.update(thread.name for thread in ours())
        return argument

    assert job(range(300), stage(fetch, **on), stage(fetch, **on)) == list(range(300))
    assert len(threads) == len(loops) == 1
    assert of_the_job == {"twostage-loop", "twostage-coordinator"}
    assert len(ours()) == len(on)  # the thread of the user's executor


def test_stage_without_an_executor_runs_on_the_loop_of_the_others(on: dict[str, Any]) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()

    async def fetch(argument: int) -> int:
        loops.add(asyncio.get_running_loop())
        return argument

    for first, second in (on, {}), ({}, on):
        loops.clear()
        run([1, 2], stage(fetch, **first), stage(fetch, **second))
        assert len(loops) == 1


def test_stage_of_threads_keeps_its_pool_beside_one_that_is_awaited() -> None:
    names: set[str] = set()

    def plain(argument: int) -> int:
        names.add(threading.current_thread().name.partition("_")[0])
        return argument

    assert run(range(20), plain, as_it_is) == run(range(20), as_it_is, plain) == list(range(20))
    assert names == {"twostage"}


def test_no_loop_is_started_if_nothing_is_awaited_or_called() -> None:
    seen: set[str] = set()

    def fetch(argument: int) -> int:
        seen.update(thread.name.partition("_")[0] for thread in ours())
        return argument

    run(range(20), fetch, fetch)
    assert seen == {"twostage", "twostage-coordinator"}
    with iter_two_stage([1], as_it_is, as_it_is):
        assert not ours()

    def source() -> Iterator[int]:
        seen.update(thread.name for thread in ours())
        yield from ()

    assert run(source(), as_it_is, as_it_is) == []
    assert "twostage-loop" not in seen


def test_executor_of_the_users_goes_on_after_the_job(on: dict[str, Any]) -> None:
    for _ in range(2):
        run(range(9), stage(as_it_is, **on), as_it_is)
        with pytest.raises(LookupError):
            run(range(9), stage(awaited({}.__getitem__), **on), as_it_is, retry=None)
    if on:
        assert on["executor"].submit(as_it_is, 5).result() == 5


# --- how many at once


@each_way
@pytest.mark.parametrize("place", ["stage one", "stage two"])
def test_so_many_calls_run_at_once_and_no_more(place: str, job: Run, on: dict[str, Any]) -> None:
    fetch = AtOnce(7)
    limited = stage(fetch, workers=7, **on)
    stages = (limited, as_it_is) if place == "stage one" else (as_it_is, limited)
    assert job(range(300), *stages) == list(range(300))
    assert (fetch.most, fetch.calls) == (7, 300)


@pytest.mark.parametrize("place", ["stage one", "stage two"])
def test_hundred_is_the_default(place: str) -> None:
    fetch = AtOnce(100)
    stages = (fetch, as_it_is) if place == "stage one" else (as_it_is, fetch)
    assert run(range(300), *stages) == list(range(300))
    assert fetch.most == 100


def test_ten_thousand_calls_run_at_once_in_less_than_200_mb() -> None:
    script = """
        import asyncio, re
        from pathlib import Path
        from twostage import Stage, run_two_stage

        running = most = 0

        async def call(argument):
            global running, most
            running += 1
            most = max(most, running)
            if running == 10_000:
                full.set()
            await full.wait()
            await asyncio.sleep(0.01)
            running -= 1
            return argument

        for first, second in (list, call), (call, list):
            full, most = asyncio.Event(), 0
            batched = {"batch_size": 100} if first is list else {}
            first, second = (
                Stage(one, workers=10_000) if one is call else one for one in (first, second)
            )
            if second is list:
                second = str
            results = run_two_stage(range(20_000), first, second, **batched)
            assert len(results) == 20_000 and most == 10_000
        # Not `getrusage`: that begins with what the process had that has started this one.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) / 1024)
    """
    done = ran(script, patience=5 * PATIENCE)
    assert done.stderr == ""
    assert float(done.stdout) < 200


# --- answers


@each_way
def test_batches_of_both_stages(job: Run, on: dict[str, Any]) -> None:
    sizes: Counter[int] = Counter()

    async def fetch_tokens(batch: list[int]) -> list[int]:
        sizes[len(batch)] += 1
        await asyncio.sleep(0)
        return [item + 1 for item in batch]

    async def fetch_results(batch: list[int]) -> dict[int, int]:
        assert len(batch) <= 4
        return {token: -token for token in reversed(batch)}

    first = stage(fetch_tokens, batch_size=10, **on)
    assert job(range(95), first, stage(fetch_results, batch_size=4, **on)) == [-n for n in range(1, 96)]
    assert sizes == {10: 9, 5: 1}


@each_way
def test_answers_that_are_wrong_fail_their_items(job: Run) -> None:
    async def fetch_tokens(batch: list[str]) -> Any:  # noqa: ANN401 - right or wrong
        if "few" in batch:
            return []
        if "left out" in batch:
            return {item: item for item in batch if item != "left out"}
        return [LookupError(item) if item == "slot" else item for item in batch]

    items = ["few", "a", "b", "left out", "slot", "c"]
    results = job(items, stage(fetch_tokens, batch_size=2), as_it_is, return_exceptions=True)
    assert [type(one) for one in results] == [BatchLengthError] * 2 + [str, MissingToken, LookupError, str]


@each_way
def test_many_tokens_for_an_item(job: Run, on: dict[str, Any]) -> None:
    async def fetch_tokens(item: int) -> list[int]:
        return list(range(item))

    results = job(range(6), stage(fetch_tokens, many=True, **on), as_it_is)
    assert results == [list(range(item)) for item in range(6)]


@each_way
def test_refused_batches_are_split_until_the_bad_ones_stand_alone(job: Run, on: dict[str, Any]) -> None:
    fetch = awaited(refusing({3, 4, 17}))
    results = job(range(20), stage(fetch, batch_size=10, **on), as_it_is, return_exceptions=True)
    assert [item for item, one in enumerate(results) if isinstance(one, Exception)] == [3, 4, 17]


@each_way
def test_expired_tokens_are_refreshed(job: Run, on: dict[str, Any]) -> None:
    given: Counter[int] = Counter()

    async def fetch_token(item: int) -> tuple[int, int]:
        given[item] += 1
        return item, given[item]

    async def fetch_result(token: tuple[int, int]) -> int:
        item, number = token
        if number == 1:
            raise ExpiredError
        return item

    first, second = stage(fetch_token, **on), stage(fetch_result, **on)
    assert job(range(30), first, second, refresh_token_on=ExpiredError) == list(range(30))
    assert set(given.values()) == {2}


def test_equal_items_are_asked_for_once(on: dict[str, Any]) -> None:
    fetch = AtOnce(3)
    items = [item % 3 for item in range(30)]
    assert run(items, stage(fetch, **on), as_it_is, key=str) == items
    assert fetch.calls == 3


# --- retries, pauses, rates


@each_way
def test_failures_that_may_pass_are_tried_again(job: Run, on: dict[str, Any]) -> None:
    attempts: Counter[int] = Counter()

    async def fetch(item: int) -> int:
        attempts[item] += 1
        await asyncio.sleep(0)
        if attempts[item] <= item % 3:
            raise asyncio.TimeoutError if item % 2 else ConnectionError
        return item

    assert job(range(60), as_it_is, stage(fetch, retry=AT_ONCE, **on)) == list(range(60))
    assert attempts == {item: 1 + item % 3 for item in range(60)}


def test_call_that_waits_for_its_next_attempt_holds_no_place(clock: Clock, on: dict[str, Any]) -> None:
    attempts: list[int] = []

    async def fetch(item: int) -> int:
        attempts.append(item)
        if attempts == [0]:
            raise ConnectionError
        return item

    settings = stage(fetch, workers=1, retry=HOUR, **on)
    with iter_two_stage(range(10), each(int), settings, batch_size=10) as outcomes:
        assert [next(outcomes).item for _ in range(9)] == list(range(1, 10))
        clock.advance(3600)
        assert next(outcomes).result == 0
    assert attempts == [*range(10), 0]


def test_answer_that_asks_for_a_wait_pauses_the_stage(clock: Clock, on: dict[str, Any]) -> None:
    attempts: list[int] = []

    async def fetch(item: int) -> int:
        attempts.append(item)
        if len(attempts) == 2:
            raise asking(60)
        return item

    with iter_two_stage(range(10), each(int), stage(fetch, workers=1, **on), batch_size=10) as outcomes:
        assert next(outcomes).item == 0
        until(lambda: books(outcomes).delayed)
        clock.advance(59)
        assert attempts == [0, 1]
        clock.advance(1)
        assert sorted(outcome.item for outcome in outcomes) == list(range(1, 10))
    assert Counter(attempts) == {item: 1 + (item == 1) for item in range(10)}


@each_way
def test_limit_of_the_users_own_takes_no_attempt(job: Run, on: dict[str, Any]) -> None:
    asked: Counter[int] = Counter()

    async def fetch(item: int) -> int:
        asked[item] += 1
        if asked[item] == 1:
            raise Throttled(0.001)
        return item

    settings = stage(fetch, retry=1, **on)
    assert job(range(20), as_it_is, settings) == list(range(20))


def test_api_that_is_down_is_asked_by_one_call_at_a_time(clock: Clock, on: dict[str, Any]) -> None:
    attempts = 0
    is_down = False

    async def fetch(item: int) -> int:
        nonlocal attempts
        attempts += 1
        if item == 0:
            return item
        await asyncio.to_thread(down.wait, PATIENCE)
        if is_down:
            raise ConnectionRefusedError
        return item

    down = threading.Event()
    settings = stage(fetch, workers=8, retry=AT_ONCE, **on)
    with iter_two_stage(range(50), each(int), settings, batch_size=50) as outcomes:
        results = [next(outcomes).result]
        line = books(outcomes).lines[1]
        until(lambda: attempts == 9)
        is_down = True
        down.set()
        until(lambda: line.pace.slows and line.runner.out == 0)
        for _ in range(5):
            before = attempts
            clock.advance(10)
            until(lambda: attempts > before and line.runner.out == 0)  # noqa: B023 - called at once
            assert attempts == before + 1
        is_down = False
        clock.advance(10)
        results += [outcome.result for outcome in outcomes]
    assert sorted(results) == list(range(50))


@each_way
def test_stage_that_adapts_finds_out_how_many_the_api_takes(job: Run, on: dict[str, Any]) -> None:
    running = 0

    async def fetch(item: int) -> int:
        nonlocal running
        if running == 5:
            raise ApiError(429)
        running += 1
        await asyncio.sleep(0.0005)  # as long as a call takes
        running -= 1
        return item

    adaptive = stage(fetch, workers=64, adaptive=True, retry=AT_ONCE, **on)
    assert job(range(200), as_it_is, adaptive) == list(range(200))


def test_attempts_begin_as_the_rate_has_it(monkeypatch: pytest.MonkeyPatch, on: dict[str, Any]) -> None:
    def ended(gate: RateGate, call: Call, *end: Any) -> None:  # noqa: ANN401 - however it has ended
        noted.append(call.began)
        hear(gate, call, *end)

    async def fetch(item: int) -> int:
        begun.append(time.monotonic())
        await asyncio.sleep(chance.latency())
        return item

    chance = Latencies()
    noted: list[float] = []
    begun: list[float] = []
    hear = RateGate.ended
    monkeypatch.setattr(RateGate, "ended", ended)
    rated = stage(fetch, workers=16, rate=Rate(20, per=0.1), **on)
    assert run(range(50), as_it_is, rated) == list(range(50))
    noted.sort()
    assert all(later - earlier >= 0.1 for earlier, later in zip(noted, noted[20:], strict=False))
    assert all(noted <= later for noted, later in zip(noted, sorted(begun), strict=True))


class Latencies:
    """Short ones and long ones in turn."""

    def __init__(self) -> None:
        self._all = itertools.cycle([0.0, 0.003, 0.02])

    def latency(self) -> float:
        return next(self._all)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rate": 40},
        {"rate": [Rate(7), Rate(300, per=60)]},
        {"adaptive": True},
        {"pause": False, "patience": 5},
        {"attempt_timeout": 1.2},
        {"retry": 3},
        {"workers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_virtual_time_is_the_same_for_coroutine_functions(settings: dict[str, Any], seed: int) -> None:
    """An API that takes 12 at once, is down for a while and fails at times: outages, retries, limits."""

    def log(*, coroutines: bool) -> list[str]:
        lines: list[str] = []
        with VirtualTime(seed, log=lines.append) as virtual:
            api: SimulatedApi[int, int] = SimulatedApi(int, latency=(0.5, 1.5), fail=0.1, limit=12, seed=seed)

            def fetch(argument: int) -> int:
                if 8 <= virtual.now < 18:
                    sleep(0.1)
                    raise ConnectionRefusedError
                return api(argument)

            async def fetch_awaited(argument: int) -> int:
                return fetch(argument)

            one = stage(fetch_awaited if coroutines else fetch, **{"workers": 20} | settings)
            outcomes_of(range(150), one, one)
        return lines

    assert log(coroutines=True) == log(coroutines=False)


# --- ends of a run


@each_way
def test_time_out_of_the_run_starts_nothing_more_and_awaits_what_runs(
    job: Run, clock: Clock, on: dict[str, Any]
) -> None:
    begun: list[int] = []

    async def fetch(item: int) -> int:
        begun.append(item)
        if len(begun) == 2:
            await asyncio.to_thread(clock.advance, 60)
        return item

    settings = stage(fetch, workers=1, **on)
    results = job(range(9), each(int), settings, batch_size=9, timeout=60, return_exceptions=True)
    assert begun == [0, 1]
    assert results[:2] == [0, 1]
    assert {type(one) for one in results[2:]} == {RunTimeout}


@each_way
def test_too_many_failures_end_the_job(job: Run, on: dict[str, Any]) -> None:
    async def fetch(item: int) -> int:
        raise LookupError(item)

    with pytest.raises(TooManyFailures):
        job(itertools.count(), as_it_is, stage(fetch, **on), max_failures=5, return_exceptions=True)


def test_batch_leaves_part_full_when_its_items_have_lingered(clock: Clock, on: dict[str, Any]) -> None:
    over = threading.Event()

    def source() -> Iterator[int]:
        yield from range(3)
        assert over.wait(PATIENCE)

    first = stage(as_it_is, batch_size=2, **on)
    with iter_two_stage(source(), first, as_it_is, linger=5) as outcomes:
        assert {next(outcomes).item, next(outcomes).item} == {0, 1}
        until(lambda: books(outcomes).lines[0].waiting)
        clock.advance(5)
        assert next(outcomes).item == 2
        over.set()
        assert next(outcomes, None) is None


@pytest.mark.parametrize("ordered", [False, True])
def test_no_more_is_read_than_the_window_has_room_for(on: dict[str, Any], *, ordered: bool) -> None:
    read = taken = 0

    def source() -> Iterator[int]:
        nonlocal read
        for item in range(200):
            read += 1
            assert read - taken <= 20
            yield item

    first = stage(as_it_is, **on)
    with iter_two_stage(source(), first, as_it_is, window=20, ordered=ordered) as outcomes:
        for _ in outcomes:
            taken += 1
    assert taken == 200


# --- contexts, and jobs inside of jobs

span: ContextVar[str] = ContextVar("span", default="none")


@each_way
def test_each_attempt_has_a_copy_of_the_callers_variables(job: Run, on: dict[str, Any]) -> None:
    attempts: Counter[int] = Counter()

    async def fetch(argument: int) -> int:
        attempts[argument] += 1
        assert span.get() == "the caller's"
        span.set("of an attempt")
        await asyncio.sleep(0)
        assert span.get() == "of an attempt"
        if attempts[argument] == 1:
            raise ConnectionError
        return argument

    token = span.set("the caller's")
    try:
        both = stage(fetch, retry=AT_ONCE, **on)
        assert job(range(100), both, both) == list(range(100))
        assert span.get() == "the caller's"
    finally:
        span.reset(token)


def test_job_on_the_executor_whose_loop_its_caller_holds_is_refused() -> None:
    with AsyncExecutor() as executor:
        here = stage(as_it_is, executor=executor)

        async def nested(token: int) -> Any:  # noqa: ANN401 - of a job
            return run([token], int, here)

        async def deeper(token: int) -> Any:  # noqa: ANN401 - as above
            return await asyncio.to_thread(run, [token], int, here)

        message = "the executor of fetch_result's Stage runs the attempt that starts this job"
        with (
            pytest.warns(UserWarning, match="another event loop"),
            pytest.raises(RuntimeError, match=message),
        ):
            run([1], int, stage(nested, executor=executor))
        with pytest.raises(RuntimeError, match=message):
            run([1], int, stage(deeper, executor=executor))


def test_job_of_coroutine_functions_that_would_hold_up_a_loop_warns() -> None:
    async def nested(token: int) -> Any:  # noqa: ANN401 - of a job
        return run([token], as_it_is, as_it_is)

    with pytest.warns(UserWarning, match="coroutine functions are run on another event loop") as warned:
        assert run([1], as_it_is, nested) == [[1]]
    assert {one.filename for one in warned} == {run.__code__.co_filename}


def test_job_of_coroutine_functions_in_a_thread_of_another_one_s_call() -> None:
    async def nested(token: int) -> Any:  # noqa: ANN401 - of a job
        return await asyncio.to_thread(run_two_stage, [token], as_it_is, as_it_is)

    assert run(range(3), as_it_is, nested) == [[0], [1], [2]]


# --- virtual time


def test_coroutine_functions_sleep_in_virtual_time(virtual: VirtualTime) -> None:
    async def fetch_token(item: int) -> int:
        sleep(2)
        return await inner(item)

    async def inner(item: int) -> int:
        return item

    async def fetch_result(token: int) -> int:
        sleep(3600)
        return token

    assert run(range(1000), stage(fetch_token, workers=1000), stage(fetch_result, workers=500)) == list(
        range(1000)
    )
    assert virtual.now == 2 + 2 * 3600
