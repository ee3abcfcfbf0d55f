"""An outage is waited out: one probe at a time, nothing is lost, and soon the stage is at its full pace."""

from __future__ import annotations

import logging
import socket
from functools import partial
from itertools import chain, pairwise, repeat
from statistics import mean
from typing import TYPE_CHECKING, Any, Final

import pytest
from fakes import ExpiredError, Fake, each, in_virtual_time, outcomes_of, stage
from forms import each_way
from pacing import Outages, answered_between, asking, failing, first_of, most_at_once, starts
from requesting import httpx_get, requests_get
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
    wait_random_exponential,
)

from twostage import RunTimeout, is_transient, run_two_stage
from twostage.pace import outages
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forms import Run

SINCE: Final = 5.0
"""When the outages of most tests begin: in the middle of the job."""


def quick(attempts: int = 3, wait: float = 0.5) -> Retrying:
    return Retrying(
        retry=retry_if_exception(is_transient), stop=stop_after_attempt(attempts), wait=wait_fixed(wait)
    )


def said(caplog: pytest.LogCaptureFixture, text: str = "the API") -> list[str]:
    return [message for message in caplog.messages if text in message]


class Api(Fake):
    """An API with outages: a call that begins or would end in one fails after `late` seconds."""

    def __init__(
        self, virtual: VirtualTime, latency: float, *times: tuple[float, float], late: float = 0.0
    ) -> None:
        super().__init__(lambda argument: argument, virtual=virtual)
        self.outages = Outages(virtual, *times)
        self.span = latency
        self.late = late

    def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - items and tokens of any kind
        began, latency = self._now(), self.span
        falls_into = any(since <= began + latency < until for since, until in self.outages.times)
        fails = self.outages.is_down() or falls_into
        self.answer, self.latency = (self._fail, self.late) if fails else (self._give, latency)
        return super().__call__(argument)

    def _fail(self, argument: object) -> object:
        raise ConnectionRefusedError

    def _give(self, argument: object) -> object:
        return argument


# --- the figures


@pytest.mark.parametrize("seconds", [60, 250])
@pytest.mark.parametrize("late", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("both", [False, True], ids=["stage two", "both stages"])
def test_outage_in_the_middle_of_10_000_items_loses_nothing(
    virtual: VirtualTime, seconds: float, late: float, *, both: bool
) -> None:
    down = (SINCE, SINCE + seconds)
    tokens = Api(virtual, 0.5, *[down][: int(both)], late=late)
    results = Api(virtual, 0.1, down, late=late)
    answered = run_two_stage(range(10_000), stage(tokens, batch_size=100), results)
    assert answered == list(range(10_000))
    probing = SINCE + late + 0.6  # those that were handed over when it began have failed by then
    probes = [len(starts(fake, probing, down[1])) for fake in (tokens, results)]
    first = max(
        min(made.ended for made in fake.calls if made.ended >= down[1] and not made.failed)
        for fake in (tokens, results)
    )
    speed = answered_between(results, first + 5, first + 6) / (32 / 0.1)
    print(f"{seconds} s, {late} s to fail: {probes} calls, first answers after {first - down[1]:.1f} s")
    assert all(number < (16 if seconds == 60 else 45) for number in probes[not both :])
    assert first - down[1] <= late + 8 + 0.5  # the last probe in vain may end after the outage
    assert speed >= 0.97


def test_probes_of_an_outage_of_250_s_are_43_on_average() -> None:
    numbers = []
    for seed in range(20):
        with VirtualTime(seed=seed) as virtual:
            results = Api(virtual, 0.1, (SINCE, SINCE + 250))
            run_two_stage(range(2500), stage(list, batch_size=100), results)
            numbers.append(len(starts(results, SINCE + 0.1, SINCE + 250)))
    print(f"{mean(numbers):.1f} calls on average, {max(numbers)} at most")
    assert 41 < mean(numbers) < 45
    assert max(numbers) <= 48


@pytest.mark.parametrize(
    "share", [0.4, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.25, 0.3))]
)
@pytest.mark.parametrize("workers", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_calls_that_fail_at_a_steady_share_are_no_outage(
    share: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(60),
        wait=wait_random_exponential(multiplier=0.1, max=5),
    )

    def job(seed: int) -> float:
        with VirtualTime(seed=seed) as virtual:
            tokens: Any = SimulatedApi(list, latency=0.5, fail=share, seed=seed)
            results: Any = SimulatedApi(int, latency=0.1, fail=share, seed=seed + 100)
            run_two_stage(
                range(2500),
                stage(tokens, batch_size=100),
                stage(results, workers=workers),
                retry=policy,
            )
            return virtual.now

    with_rule = sum(map(job, range(4)))
    monkeypatch.setattr(outages, "LEAST_LOST", 10**9)
    without = sum(map(job, range(4)))
    print(f"{share:.0%} on {workers} workers: {with_rule / without:.3f} of the time without the rule")
    assert with_rule <= 1.05 * without


# --- what an outage is


LOST: dict[str, Callable[[], Exception]] = {
    "refused": ConnectionRefusedError,
    "reset": ConnectionResetError,
    "late": TimeoutError,
    "502": lambda: ApiError(502),
    "503": lambda: ApiError(503),
    "504": lambda: ApiError(504),
}


@pytest.mark.parametrize("error", LOST.values(), ids=LOST)
def test_failures_that_mean_an_outage(virtual: VirtualTime, error: Callable[[], Exception]) -> None:
    results = Fake(Outages(virtual, (SINCE, SINCE + 100), error=error), 0.1, virtual=virtual)
    answered = run_two_stage(range(3000), int, results, retry=quick())
    assert answered == list(range(3000))
    assert len(starts(results, SINCE + 0.2, SINCE + 100)) < 25


@pytest.mark.parametrize(
    "error", [lambda: ApiError(500), lambda: ApiError(408), lambda: ApiError(429)], ids=["500", "408", "429"]
)
def test_failures_that_mean_none(
    virtual: VirtualTime, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    results = Fake(Outages(virtual, (SINCE, SINCE + 20), error=error), 0.1, virtual=virtual)
    outcomes_of(range(3000), int, results, retry=quick())
    assert len(starts(results, SINCE + 0.2, SINCE + 20)) > 1000
    assert said(caplog, "down") == []


@pytest.mark.parametrize(("workers", "calls"), [(1, 8), (8, 8), (9, 9), (32, 32)])
def test_outage_is_as_many_lost_calls_as_the_limit_and_at_least_8(
    virtual: VirtualTime, workers: int, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    results = Fake(Outages(virtual, (SINCE, SINCE + 60)), 0.1, virtual=virtual)
    run_two_stage(range(100 * workers), int, stage(results, workers=workers))
    lost = f"stage two: the API seems to be down: {calls} calls were not answered since the last success"
    assert said(caplog, "down") == [lost]


@pytest.mark.parametrize("workers", [8, 32])
def test_outage_is_found_where_few_run_at_once_for_a_rate(virtual: VirtualTime, workers: int) -> None:
    api = Api(virtual, 0.1, (SINCE, SINCE + 100))
    results = run_two_stage(range(200), int, stage(api, workers=workers, rate=2))
    assert results == list(range(200))
    assert len([made for made in api.calls if SINCE <= made.began < SINCE + 100]) < 100  # of 200


def test_success_in_between_begins_the_count_anew(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    lost: dict[int, Iterable[Exception]] = {
        item: repeat(ConnectionResetError()) for item in range(300) if item % 8
    }
    results = Fake(failing(lost), 0.1, virtual=virtual)
    outcomes_of(range(300), int, stage(results, workers=1, retry=1))
    assert said(caplog, "down") == []  # seven, and then one that is answered


def test_poisoned_call_is_no_outage(virtual: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    results = Fake(failing({7: repeat(ApiError(504))}), 0.1, virtual=virtual)
    outcomes = outcomes_of(range(50), int, results, retry=quick(40))
    assert [outcome.index for outcome in outcomes if outcome.exception is not None] == [7]
    assert outcomes[7].result_attempts == 40  # each of them counts
    assert said(caplog, "down") == []


@pytest.mark.parametrize("get", [requests_get, httpx_get])
@pytest.mark.usefixtures("no_proxy")
def test_wrong_port_is_no_outage(get: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed, VirtualTime():
        closed.bind(("127.0.0.1", 0))  # ours, so nobody listens there
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        outcomes = outcomes_of(range(12), int, lambda _: get(url), retry=2)
    assert {outcome.result_attempts for outcome in outcomes} == {2}
    assert said(caplog, "down") == []


def test_other_answers_say_that_the_api_is_up(virtual: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    def answer(item: int) -> int:
        if item and item % 7 == 0:
            raise ApiError(404)
        if item:
            raise ConnectionResetError
        return item

    results = Fake(answer, 0.1, virtual=virtual)
    outcomes_of(range(100), int, stage(results, workers=1, retry=1))
    assert said(caplog, "down") == []


@pytest.mark.parametrize("patience", [300.0, None])
def test_answer_404_ends_an_outage(
    virtual: VirtualTime, patience: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    outages = Outages(virtual, (SINCE, SINCE + 60))

    def answer(item: int) -> int:
        if outages(item) and virtual.now > SINCE:
            raise ApiError(404)
        return item

    outcomes = outcomes_of(range(3000), int, stage(Fake(answer, 0.1, virtual=virtual), patience=patience))
    assert {getattr(outcome.exception, "status", None) for outcome in outcomes} == {None, 404}
    assert len(said(caplog, "answers again")) == 1


# --- probes


def test_probes_come_at_growing_intervals_one_at_a_time(virtual: VirtualTime) -> None:
    results = Api(virtual, 0.1, (SINCE, SINCE + 120), late=0.25)
    run_two_stage(range(3000), int, results)
    down = max(made.ended for made in results.calls if made.began < SINCE and made.failed)
    probes = [made for made in results.calls if down <= made.began and made.failed]
    assert probes[0].began == down  # at once
    waits = [later.began - sooner.ended for sooner, later in pairwise(probes)]
    for wait, longest in zip(waits, chain([1, 2, 4], repeat(8)), strict=False):
        assert longest / 2 <= wait <= longest
    assert len(waits) > 10
    assert len(set(waits)) == len(waits)
    assert most_at_once(probes) == 1


@pytest.mark.parametrize("batched", [False, True])
def test_probes_are_different_calls(virtual: VirtualTime, *, batched: bool) -> None:
    results = Api(virtual, 0.1, (SINCE, SINCE + 200))
    second = stage(results, batch_size=3) if batched else stage(results)
    run_two_stage(range(9000 if batched else 3000), stage(list, batch_size=100), second)
    probes = [first_of(made.argument) for made in results.calls if made.began >= SINCE + 0.1 and made.failed]
    assert len(probes) > 30
    assert len(set(probes)) >= 30
    assert all(one != next_one for one, next_one in pairwise(probes))


def test_call_that_always_fails_does_not_stand_for_the_api(virtual: VirtualTime) -> None:
    """It alone is enough to call stage one down while stage two is, and it is due before each next probe."""
    tokens = Fake(failing({300: repeat(ApiError(504))}), 0.5, virtual=virtual)
    results = Fake(Outages(virtual, (3, 63)), 0.1, virtual=virtual)
    answered = run_two_stage(
        range(5000),
        stage(tokens, batch_size=100, workers=1),
        results,
        retry=quick(8),
        return_exceptions=True,
    )
    assert [item for item in range(5000) if answered[item] != item] == list(range(300, 400))
    assert virtual.now < 100


def test_last_call_is_probed_again_and_again(virtual: VirtualTime) -> None:
    tokens = Api(virtual, 1, (3.5, 100))  # item 9 is the only one left at stage one when its API is down
    results = Api(virtual, 0.1, (3.5, 100))
    answered = run_two_stage(
        range(400), stage(tokens, batch_size=100, workers=1), stage(results, workers=4), retry=quick()
    )
    assert answered == list(range(400))


def test_nothing_but_probes_begins_until_the_first_answer(virtual: VirtualTime) -> None:
    results = Api(virtual, 0.1, (SINCE, SINCE + 60))
    run_two_stage(range(3000), int, stage(results, workers=16))
    first = min(made.ended for made in results.calls if made.ended >= SINCE + 60 and not made.failed)
    assert most_at_once(made for made in results.calls if SINCE + 1 <= made.began < first) == 1


def test_stage_opens_at_half_its_limit_and_doubles(virtual: VirtualTime) -> None:
    results = Api(virtual, 1, (SINCE, SINCE + 60))
    run_two_stage(range(3000), int, stage(results, workers=16))
    first = min(made.ended for made in results.calls if made.ended >= SINCE + 60 and not made.failed)
    assert len(starts(results, first, first + 1)) == 8
    assert len(starts(results, first + 1, first + 2)) == 16


def test_two_outages(virtual: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    times = [(5, 65), (80, 330)]
    results = Api(virtual, 0.1, *times)
    assert run_two_stage(range(10_000), int, results, retry=quick()) == list(range(10_000))
    assert [len(said(caplog, text)) for text in ("down", "answers again")] == [2, 2]
    for since, until in times:
        assert len(starts(results, since + 0.1, until)) < 48


# --- attempts, and patience


def test_probes_do_not_count_for_the_policy_s_stop(virtual: VirtualTime) -> None:
    results = Api(virtual, 0.1, (SINCE, SINCE + 290))
    outcomes = outcomes_of(range(1640), int, stage(results, workers=32), retry=quick(2, wait=0.1))
    assert all(outcome.exception is None for outcome in outcomes)
    assert max(outcome.result_attempts for outcome in outcomes) > 2
    assert sum(outcome.result_attempts for outcome in outcomes) == len(results.calls)


def test_after_patience_the_policy_decides(virtual: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    results = Api(virtual, 0.1, (SINCE, 1e9))
    outcomes = outcomes_of(range(2000), int, stage(results, patience=50.0), retry=quick(4))
    good = [outcome.exception is None for outcome in outcomes]
    assert 1500 < sum(good) < 1700
    assert len(starts(results, SINCE + 0.1, SINCE + 50)) < 15
    assert said(caplog)[-1] == "stage two: the API is not waited for any more, after 50 s"
    assert len(said(caplog)) == 2  # it is not called down again
    assert virtual.now < SINCE + 50 + 200


def test_success_after_patience_has_it_waited_for_again(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    results = Api(virtual, 0.1, (5, 70), (75, 115))
    outcomes = outcomes_of(
        range(1000), int, stage(results, workers=8, patience=50.0), retry=quick(100, wait=2)
    )
    assert all(outcome.exception is None for outcome in outcomes)
    texts = ("down", "not waited for", "answers again")
    assert [len(said(caplog, text)) for text in texts] == [2, 1, 1]


def test_patience_none_waits_for_ever(virtual: VirtualTime) -> None:
    results = Api(virtual, 0.1, (SINCE, SINCE + 8_000))
    answered = run_two_stage(range(3000), int, stage(results, patience=None), retry=quick(2))
    assert answered == list(range(3000))


def test_timeout_ends_the_wait_for_an_api(virtual: VirtualTime) -> None:
    results = Api(virtual, 0.1, (SINCE, 1e9))
    outcomes = outcomes_of(range(1700), int, stage(results, patience=None), timeout=100)
    assert 100 <= virtual.now < 101
    assert sum(outcome.exception is None for outcome in outcomes) > 1500
    assert RunTimeout in {type(outcome.exception) for outcome in outcomes}


def test_calls_without_retry_fail_and_few_are_made(virtual: VirtualTime) -> None:
    results = Api(virtual, 0.1, (SINCE, SINCE + 60))
    outcomes = outcomes_of(range(5000), int, stage(results, workers=16, retry=None))
    failed = sum(outcome.exception is not None for outcome in outcomes)
    assert failed == sum(made.failed for made in results.calls)
    assert 16 <= failed < 16 + 16


@pytest.mark.parametrize("asks", [False, True], ids=["", "with a pause in it"])
def test_start_of_a_delay_moves_on_by_an_outage(virtual: VirtualTime, *, asks: bool) -> None:
    """Item 0 fails before, in and after the outage; it has 10 s, and they pass while the stage is open."""
    outages = Outages(virtual, (SINCE, SINCE + 60))
    asked = [asking(20)] if asks else []

    def answer(item: int) -> int:
        if asked and virtual.now > SINCE + 10:
            raise asked.pop()
        outages(item)
        if item == 0:
            raise ApiError(500)
        return item

    results = Fake(answer, 0.1, virtual=virtual)
    policy = Retrying(retry=retry_if_exception(is_transient), stop=stop_after_delay(10), wait=wait_fixed(0.5))
    outcomes_of(range(5000), int, stage(results, workers=32, retry=policy))
    up = min(made.ended for made in results.calls if made.ended >= SINCE + 60 and not made.failed)
    last = max(made.ended for made in results.calls if made.argument == 0)
    assert up + 10 - SINCE - 1.5 <= last <= up + 10 - SINCE + 1.5


# --- the other stage


def test_lost_call_of_a_stage_counts_while_the_other_one_is_down(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    down = (SINCE, SINCE + 120)
    tokens = Api(virtual, 0.5, down, late=1)
    results = Api(virtual, 0.1, down)
    answered = run_two_stage(range(4000), stage(tokens, batch_size=200, workers=1), results, retry=quick())
    assert answered == list(range(4000))
    assert "stage one: the API seems to be down: 1 calls were not answered since the last success" in said(
        caplog
    )


def test_one_stage_down_does_not_hold_the_other_back(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Fake(list, 0.5, virtual=virtual)
    results = Api(virtual, 0.1, (SINCE, SINCE + 60))
    run_two_stage(range(20_000), stage(tokens, batch_size=100), results)
    assert said(caplog, "stage one") == []


# --- beside what else a job does


@each_way
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"batch_size": 10}, {}),
        ({"batch_size": 10}, {"batch_size": 5}),
        ({"many": True}, {}),
        ({"many": True, "batch_size": 10}, {"batch_size": 5}),
        ({"batch_size": 10, "adaptive": True}, {"adaptive": True}),
        ({"batch_size": 10, "rate": 30}, {"rate": 100}),
        ({"attempt_timeout": 5.0}, {"attempt_timeout": 5.0}),
    ],
    ids=[
        "one by one",
        "in batches",
        "both in batches",
        "many",
        "many in batches",
        "adaptive",
        "rate",
        "timed",
    ],
)
def test_in_any_form_of_a_job_nothing_is_lost(
    job: Run, first: dict[str, Any], second: dict[str, Any]
) -> None:
    with VirtualTime() as virtual:
        outages = Outages(virtual, (5, 65), (80, 330))

        def fetch(argument: Any, latency: float) -> Any:  # noqa: ANN401 - items and tokens of any kind
            outages(argument)
            sleep(latency)
            return outages(argument)

        def fetch_token(item: Any) -> Any:  # noqa: ANN401 - as above
            fetch(item, 0.5)
            if "many" not in first:
                return item
            return [[one, one] for one in item] if isinstance(item, list) else [item, item]

        results = job(
            range(4000),
            stage(fetch_token, workers=12, **first),
            stage(partial(fetch, latency=0.3), **second),
            retry=quick(4),
        )
    assert results == [[item, item] if "many" in first else item for item in range(4000)]
    assert virtual.now > 65


def test_refused_batch_is_split_in_an_outage(virtual: VirtualTime) -> None:
    outages = Outages(virtual, (SINCE, SINCE + 60))

    def answer(batch: list[int]) -> list[int]:
        outages(batch)
        if {555, 777}.intersection(batch):
            raise ApiError(400)
        return batch

    tokens = Fake(answer, 0.5, virtual=virtual)
    outcomes = outcomes_of(range(2000), stage(tokens, batch_size=16, workers=8), int, retry=quick())
    assert [outcome.index for outcome in outcomes if outcome.exception is not None] == [555, 777]


def test_halves_are_lost_and_come_back(virtual: VirtualTime) -> None:
    outages = Outages(virtual, (3, 63))

    def answer(batch: list[int]) -> list[int]:
        outages(batch)
        if 31 in batch and virtual.now > 2:
            raise ApiError(400)
        if 31 in batch:
            raise ApiError(500)
        return batch

    tokens = Fake(answer, 0.5, virtual=virtual)
    outcomes = outcomes_of(range(1000), stage(tokens, batch_size=16, workers=4), int, retry=quick(9))
    assert [outcome.index for outcome in outcomes if outcome.exception is not None] == [31]


def test_slot_that_is_lost_is_no_lost_call(virtual: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    lost: dict[int, Iterable[Exception]] = {
        item: repeat(ConnectionResetError(), 2) for item in range(0, 400, 2)
    }
    fetch = failing(lost)

    def slot(item: int) -> int | Exception:
        try:
            return int(fetch(item))
        except ConnectionResetError as error:
            return error

    results = Fake(each(slot), 0.1, virtual=virtual)
    assert run_two_stage(range(400), stage(list, batch_size=20), stage(results, batch_size=10)) == list(
        range(400)
    )
    assert said(caplog, "down") == []


def test_item_that_comes_back_for_a_new_token_in_an_outage_is_waited_for(virtual: VirtualTime) -> None:
    down = (SINCE, SINCE + 60)
    expired = set(range(0, 3000, 100))

    def result(item: int) -> int:
        if item in expired:
            expired.remove(item)
            raise ExpiredError
        return item

    tokens = Api(virtual, 0.5, down)
    results = Fake(result, 2.0, virtual=virtual)
    answered = run_two_stage(
        range(3000),
        stage(tokens, batch_size=10, workers=16),
        stage(results, workers=400),
        refresh_token_on=ExpiredError,
        retry=quick(),
    )
    assert answered == list(range(3000))
    assert not expired


def test_pause_in_an_outage_holds_the_probes_back(virtual: VirtualTime) -> None:
    outages = Outages(virtual, (SINCE, SINCE + 100))
    asked: list[float] = []

    def answer(item: int) -> int:
        if virtual.now > SINCE + 10 and not asked:
            asked.append(virtual.now)
            raise asking(40)
        return int(outages(item))

    results = Fake(answer, 0.1, virtual=virtual)
    assert run_two_stage(range(3000), int, results, retry=quick()) == list(range(3000))
    assert starts(results, asked[0], asked[0] + 40) == []
    assert starts(results, asked[0] + 40, SINCE + 100) != []


@in_virtual_time
def test_all_fail_from_the_first_call_on_and_attempts_are_used_up() -> None:
    outcomes = outcomes_of(
        range(100), int, stage(failing(dict.fromkeys(range(100), repeat(ConnectionError())))), retry=3
    )
    assert {outcome.result_attempts for outcome in outcomes} == {3}


# --- what is logged


def test_outage_is_logged_with_its_length_as_warnings(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "twostage")
    results = Api(virtual, 0.1, (SINCE, SINCE + 60))
    run_two_stage(range(3000), lambda item: f"secret {item}", lambda token: str(results(token)))
    up = min(made.ended for made in results.calls if made.ended >= SINCE + 60 and not made.failed)
    down = max(made.ended for made in results.calls if made.began < SINCE and made.failed)
    assert [(one.levelno, one.getMessage()) for one in caplog.records if "the API" in one.getMessage()] == [
        (
            logging.WARNING,
            "stage two: the API seems to be down: 32 calls were not answered since the last success",
        ),
        (logging.WARNING, f"stage two: the API answers again, after {up - down:.1f} s"),
    ]
    assert "secret" not in caplog.text


def test_stage_that_is_well_is_not_slowed_down() -> None:
    """A lost call now and then changes no start."""

    def begins(lost: Iterable[int]) -> list[float]:
        with VirtualTime() as time:
            results = Fake(failing({item: [ConnectionError()] for item in lost}), 1, virtual=time)
            run_two_stage(range(1000), int, stage(results, workers=10, retry=quick(wait=1000)))
        return starts(results)[:1000]

    assert begins([]) == begins(range(0, 1000, 25))


@pytest.mark.parametrize("error", [ApiError(500), ApiError(429)], ids=["500", "429"])
def test_failure_that_passes_ends_no_outage(
    virtual: VirtualTime, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    outages = Outages(virtual, (SINCE, SINCE + 200))

    def answer(item: int) -> int:
        if outages.is_down() and virtual.now > SINCE + 10 and item % 2:
            raise error
        return int(outages(item))

    results = Fake(answer, 0.1, virtual=virtual)
    assert run_two_stage(range(3000), int, results, retry=quick(9)) == list(range(3000))
    assert len(starts(results, SINCE + 0.2, SINCE + 200)) < 45
    assert len(said(caplog, "answers again")) == 1
