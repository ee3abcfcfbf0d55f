"""Virtual time and the simulated API, which users test their own scripts with."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import Retrying, stop_after_attempt, wait_random

from twostage import iter_two_stage, run_two_stage
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Iterator


def logged_job(seed: int) -> str:
    lines: list[str] = []
    tokens: SimulatedApi[list[int], list[int]] = SimulatedApi(list, latency=(1, 3), fail=0.1, seed=seed)
    results = SimulatedApi(str, latency=lambda rng: rng.lognormvariate(0, 1), fail=0.1, limit=30, seed=seed)
    with VirtualTime(seed, log=lines.append):
        run_two_stage(range(300), tokens, results, batch_size=10)
    return "".join(lines)


def test_same_seed_gives_the_same_log_and_another_one_another() -> None:
    assert logged_job(1) == logged_job(1)
    assert logged_job(1) != logged_job(2)


def test_log_tells_each_begin_end_and_outcome() -> None:
    lines: list[str] = []
    with VirtualTime(log=lines.append):
        with pytest.raises(ApiError):
            run_two_stage([7], SimulatedApi(int, latency=2, fail=1), str, retry=None)
        with iter_two_stage([7, 8], list, SimulatedApi(str, latency=0.5), batch_size=5) as outcomes:
            list(outcomes)
    assert lines == [
        "0.000000000 begin stage one, 1 items from 0\n",
        "2.000000000 end stage one, 1 items from 0, ApiError\n",
        "2.000000000 begin stage one, 2 items from 0\n",
        "2.000000000 end stage one, 2 items from 0\n",
        "2.000000000 begin stage two, item 0\n",
        "2.000000000 begin stage two, item 1\n",
        "2.500000000 end stage two, item 0\n",
        "2.500000000 end stage two, item 1\n",
        "2.500000000 hand over item 0\n",
        "2.500000000 hand over item 1\n",
    ]


def test_retries_draw_from_the_seed_and_leave_the_user_s_chance_alone() -> None:
    policy = Retrying(stop=stop_after_attempt(9), wait=wait_random(0, 10))

    def makespan(seed: int) -> float:
        with VirtualTime(seed) as virtual:
            run_two_stage(range(20), int, SimulatedApi(str, fail=0.5), retry=policy)
            return virtual.now

    random.seed(5)
    expected = random.random()
    random.seed(5)
    assert makespan(1) == makespan(1) != makespan(2)
    assert random.random() == expected


def test_nobody_waits_in_real_time() -> None:
    began = time.monotonic()
    with VirtualTime() as virtual:
        run_two_stage(range(100), int, SimulatedApi(str, latency=3600), result_workers=1)
        assert virtual.now == 360_000
    assert time.monotonic() - began < 3600
    assert threading.active_count() == 1


def test_sleep_of_source_and_consumer_passes_with_the_calls_going_on() -> None:
    with VirtualTime() as virtual:

        def source() -> Iterator[int]:
            for item in range(3):
                virtual.sleep(10)
                yield item

        with iter_two_stage(source(), SimulatedApi(int, latency=4), str) as outcomes:
            times = []
            for _ in outcomes:
                times.append(virtual.now)
                sleep(1)
        assert times == [20, 31, 35]  # it was read on in the consumer's thread


def test_now_in_a_function_has_what_the_attempt_slept() -> None:
    seen: list[float] = []
    with VirtualTime() as virtual:

        def fetch(item: int) -> int:
            for seconds in (1, 2):
                sleep(seconds)
                seen.append(virtual.now)
            return item

        run_two_stage([1, 2], fetch, str, token_workers=1)
    assert seen == [1, 3, 4, 6]


def test_two_jobs_can_run_in_turns() -> None:
    with VirtualTime() as virtual:
        first = iter_two_stage(range(3), int, SimulatedApi(str, latency=2), ordered=True)
        second = iter_two_stage(range(3), int, SimulatedApi(str, latency=3), ordered=True)
        got = [(a.result, b.result, virtual.now) for a, b in zip(first, second, strict=True)]
    assert got == [("0", "0", 5), ("1", "1", 5), ("2", "2", 5)]


def test_job_that_can_never_go_on_is_an_error_and_no_hang() -> None:
    with VirtualTime(), pytest.raises(RuntimeError, match="nothing is left that could happen"):
        # Its result's attempt would need a worker that a pool of 0 does not have.
        _starve()


def _starve() -> None:
    outcomes = iter_two_stage([1], int, SimulatedApi(str, latency=1))
    driver = outcomes._job._driver
    for runner in driver._runners:  # type: ignore[attr-defined]
        runner.idle = 0
    try:
        next(outcomes)
    finally:
        outcomes._job._ended = True  # or the end would wait for calls that never begin


def test_virtual_time_does_not_nest_and_is_over_after_its_block() -> None:
    with VirtualTime(), pytest.raises(RuntimeError, match="running already"), VirtualTime():
        pass
    assert run_two_stage([1], int, lambda _: threading.current_thread().name)[0].startswith("twostage")
    with VirtualTime(), pytest.raises(ValueError, match="seconds is -1"):
        sleep(-1)


def test_virtual_time_can_be_used_in_a_thread_s_own_context() -> None:
    with VirtualTime() as virtual:
        results = run_two_stage("ab", str.upper, SimulatedApi(str.lower, latency=5))
    assert (results, virtual.now) == (["a", "b"], 5)


# --- the simulated API


def test_simulated_api_fails_its_share() -> None:
    api = SimulatedApi(str, latency=1, fail=0.25)
    with VirtualTime():
        results = run_two_stage(range(2000), int, api, retry=None, return_exceptions=True)
    statuses = [error.status for error in results if isinstance(error, ApiError)]
    assert set(statuses) == {503}
    assert len(statuses) / 2000 == pytest.approx(0.25, abs=0.05)
    assert api.calls == 2000


def test_simulated_api_refuses_what_is_above_its_limit() -> None:
    api = SimulatedApi(str, latency=1, limit=10)
    with VirtualTime():
        results = run_two_stage(range(32), int, api, retry=None, return_exceptions=True)
    assert [error.status for error in results if isinstance(error, ApiError)] == [429] * 22
    assert api.most_at_once == 10


def test_simulated_api_works_in_real_time() -> None:
    api = SimulatedApi(str, latency=0.01, limit=4)
    gate = threading.Barrier(3)

    def fetch(item: int) -> str:
        gate.wait(10)
        return api(item)

    assert run_two_stage(range(9), int, fetch, result_workers=3) == list(map(str, range(9)))
    assert 1 <= api.most_at_once <= 3
    assert api.calls == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fail": 1.5}, "fail is 1.5; expected a share from 0 to 1"),
        ({"fail": -0.1}, "fail is -0.1"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"latency": -1}, "latency is -1"),
    ],
)
def test_simulated_api_refuses_what_can_not_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedApi(str, **settings)


def test_simulated_api_begins_anew_in_another_virtual_time() -> None:
    api = SimulatedApi(str, latency=1, limit=4)
    for calls in (8, 16):
        with VirtualTime() as virtual:
            run_two_stage(range(8), int, api, result_workers=4)
        assert (api.calls, virtual.now) == (calls, 2)
