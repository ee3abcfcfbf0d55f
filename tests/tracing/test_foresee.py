"""What a trace foretells: held against what the job then takes, in virtual time."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
from forms import run
from pacing import asking
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from twostage import Rate, Stage, Throttled, Trace, iter_two_stage
from twostage.testing import ApiError, VirtualTime, sleep
from twostage.tracing import foresee

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSIENT = 503


@pytest.fixture(autouse=True)
def _in_fewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresee, "RUNS", 5)
    monkeypatch.setattr(foresee, "LARGE", 800)


class Api:
    """Both functions of a job: batches take 0.5 s and 10 ms an item, results 0.1 to 0.3 s; some fail."""

    def __init__(self, seed: int = 0, fail: float = 0.03) -> None:
        self._random = random.Random(seed)
        self._fail = fail
        self.calls = 0

    def _attempt(self, seconds: float) -> None:
        self.calls += 1
        sleep(seconds)
        if self._random.random() < self._fail:
            raise ApiError(TRANSIENT)

    def fetch_tokens(self, items: list[int]) -> list[int]:
        self._attempt((0.5 + 0.01 * len(items)) * self._random.uniform(0.7, 1.3))
        return items

    def fetch_result(self, token: int) -> int:
        self._attempt(self._random.uniform(0.1, 0.3))
        return token


def took(items: int = 1000, seed: int = 0, **settings: Any) -> tuple[Trace, float, int]:  # noqa: ANN401 - any job
    """Runs a job; returns its trace, its time and its calls."""
    trace, api = Trace(), Api(seed)
    retry = Retrying(retry=retry_if_exception(lambda _: True), wait=wait_fixed(2), stop=stop_after_attempt(9))
    first: dict[str, Any] = {"batch_size": settings.get("batch_size", 50), "rate": settings.get("token_rate")}
    with VirtualTime() as virtual:
        run(
            range(items),
            Stage(api.fetch_tokens, workers=settings.get("token_workers", 4), **first),
            Stage(api.fetch_result, workers=settings.get("result_workers", 8), rate=settings.get("rate")),
            retry=retry,
            trace=trace,
        )
        return trace, virtual.now, api.calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"result_workers": 24},
        {"result_workers": 64},
        {"token_workers": 1, "result_workers": 64},
        {"token_workers": 8, "result_workers": 200},
        {"rate": 20.0},
        {"token_rate": 0.5, "result_workers": 64},
    ],
    ids=str,
)
def test_job_with_other_settings_takes_what_was_foretold(changes: dict[str, Any]) -> None:
    foresight = took()[0].what_if(**changes)
    jobs = [took(seed=seed, **changes) for seed in range(1, 6)]
    seconds, calls = sorted(job[1] for job in jobs)[2], sorted(job[2] for job in jobs)[2]
    assert foresight.seconds == pytest.approx(seconds, rel=0.1)
    assert foresight.calls == pytest.approx(calls, rel=0.02)
    low, high = foresight.band
    assert low <= foresight.seconds <= high


def test_batch_size_that_was_not_seen_is_told_from_two_that_were() -> None:
    first, second = took(batch_size=20, result_workers=64), took(batch_size=100, result_workers=64)
    for one in (first, second):
        with pytest.raises(
            ValueError, match=r"batch_size is 200, the trace has \d+: expected a size that it has"
        ):
            one[0].what_if(batch_size=200)


def test_latency_of_a_size_is_fitted() -> None:
    trace = Trace()

    def fetch_tokens(items: list[int]) -> list[int]:
        sleep(1 + 0.1 * len(items))
        return items

    def source() -> Any:  # noqa: ANN401 - a generator
        for item in range(100):
            if item % 15 == 10:
                sleep(50)
            yield item

    def job(items: Any, batch_size: int) -> float:  # noqa: ANN401 - any iterable
        with VirtualTime() as virtual:
            settings: dict[str, Any] = {"linger": 1.0} if batch_size == 10 else {}
            stages = Stage(fetch_tokens, batch_size=batch_size, workers=1), str
            with iter_two_stage(items, *stages, trace=trace, **settings) as outcomes:
                assert len(list(outcomes)) == 100
            return virtual.now

    job(source(), 10)
    sizes = trace.stage(1).size
    assert sizes.count(10) >= 3
    assert sizes.count(5) >= 3
    expected = 4 * (1 + 0.1 * 25)
    with pytest.raises(ValueError, match="the source or the consumer took the rest"):
        trace.what_if(batch_size=25)
    trace.end = None if trace.end is None else trace.end._replace(seconds=17.0)  # as without its pauses
    assert trace.what_if(batch_size=25).seconds == pytest.approx(expected, rel=0.02)


def test_larger_job_takes_what_a_trial_has_foretold() -> None:
    inside = 0
    for seed in range(6):
        trial, *_ = took(items=100, seed=seed, batch_size=10)
        foresight = trial.foretell(items=3_000, result_workers=16)  # more than are tried in virtual time
        _, seconds, calls = took(items=3_000, seed=seed + 100, batch_size=10, result_workers=16)
        assert foresight.seconds == pytest.approx(seconds, rel=0.25)
        assert foresight.calls == pytest.approx(calls, rel=0.1)
        inside += foresight.band[0] <= seconds <= foresight.band[1]
    assert inside >= 4


def test_failures_are_as_they_were() -> None:
    """Some last, some are told to slow down, some pass; and an answer can have failures in it."""
    trace = Trace()
    draws = random.Random(1)
    refused = asking(1)

    def fetch_tokens(items: list[int]) -> list[Any]:
        sleep(1)
        bad = {0: ApiError(TRANSIENT), 1: LookupError()}
        return [bad.get(draws.randrange(20), item) for item in items]

    def fetch_result(token: int) -> int:
        sleep(1)
        if draws.random() < 0.01:
            raise refused
        return token

    with VirtualTime() as virtual:
        stages = Stage(fetch_tokens, batch_size=10), Stage(fetch_result, workers=16)
        run(range(1000), *stages, trace=trace, return_exceptions=True)
        seconds = virtual.now
    assert trace.what_if().seconds == pytest.approx(seconds, rel=0.15)
    assert trace.what_if().calls == pytest.approx(len(trace), rel=0.03)
    with pytest.raises(ValueError, match="stage two's API has asked to slow down"):
        trace.what_if(result_workers=17)
    assert trace.what_if(result_workers=8).seconds > seconds * 1.3


def test_many_tokens_are_as_many_as_they_were() -> None:
    trace = Trace()

    def fetch_token(item: int) -> list[int]:
        sleep(1)
        return [item] * (item % 5)

    def fetch_result(token: int) -> int:
        sleep(1)
        return token

    with VirtualTime() as virtual:
        run(range(500), fetch_token, fetch_result, many=True, token_workers=64, trace=trace)
        seconds = virtual.now
    assert trace.what_if().seconds == pytest.approx(seconds, rel=0.05)
    assert trace.what_if().calls == pytest.approx(1500, rel=0.05)


def test_nothing_is_logged_of_jobs_that_are_none(caplog: pytest.LogCaptureFixture) -> None:
    trace = took(200)[0]
    caplog.clear()
    caplog.set_level(logging.DEBUG, "twostage")
    trace.what_if()
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"workers": 3}, "workers can't be asked about; expected one of token_workers, result_workers,"),
        ({"result_workers": 0}, "result_workers is 0; expected an integer of at least 1"),
        ({"token_workers": 1.5}, "token_workers is 1.5; expected an integer"),
        ({"batch_size": True}, "batch_size is True; expected an integer"),
        ({"rate": -1}, "rate is -1; expected a number of starts a second above 0"),
        ({"rate": Rate(10, cost=len)}, "rate has a cost, of which the trace does not speak"),
    ],
)
def test_wrong_settings_are_errors(changes: dict[str, Any], error: str) -> None:
    trace = took(100)[0]
    with pytest.raises((TypeError, ValueError), match=f"^{error}"):
        trace.what_if(**changes)


def job_of(
    first: Callable[[Any], Any],
    second: Callable[[Any], Any] | Stage[Any, Any],
    **settings: Any,  # noqa: ANN401 - any job
) -> Trace:
    trace = Trace()
    with VirtualTime():
        run(range(50), first, second, trace=trace, return_exceptions=True, **settings)
    return trace


def test_what_the_trace_can_not_tell_is_refused() -> None:
    def slow(item: int) -> int:
        sleep(1)
        return item

    def fails(_: int) -> int:
        raise ApiError(TRANSIENT)

    with pytest.raises(ValueError, match="stage two has no attempts"):
        job_of(fails, slow).what_if()
    with pytest.raises(
        ValueError, match="of 1000 attempts of stage two failed: the trace speaks of little else"
    ):
        job_of(slow, fails, retry=20).what_if()
    with pytest.raises(ValueError, match="stage one took one item a call"):
        job_of(slow, slow).what_if(batch_size=10)
    weighed = job_of(slow, Stage(slow, rate=Rate(100, cost=lambda _: 2)))
    with pytest.raises(ValueError, match="stage two has a rate with a cost"):
        weighed.what_if()
    weighed.what_if(rate=None)
    held = [True]

    def limited(token: int) -> int:
        if held:
            held.clear()
            raise Throttled(5)
        return slow(token)

    assert job_of(slow, limited).what_if().calls == 100
