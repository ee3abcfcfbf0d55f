"""Attempts that take too long are given up, in virtual time: calls go on, and nothing waits for them."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import AT_ONCE, LeaveError, given_up_in
from fakes import Fake, each, in_virtual_time, notes, outcomes_of, stage
from forms import Run, each_way, run
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_fixed,
)

from twostage import (
    AttemptTimeout,
    RunTimeout,
    Stage,
    is_transient,
    iter_two_stage,
    run_two_stage,
)
from twostage.base.kinds import Kind
from twostage.base.runner import Runner
from twostage.core.coordinator import LEAST_IN_PROGRESS
from twostage.failing.transient import kind_of
from twostage.pace.rates import HungGate
from twostage.testing import VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Iterator

LATER: Final = Retrying(
    retry=retry_if_exception(is_transient), stop=stop_after_attempt(3), wait=wait_fixed(13)
)
EVER: Final = math.inf  # how long an attempt takes that never ends


class Attempts:
    """A function whose attempts for one argument take the times given, the last of them again and again.

    It answers with what it was asked and which attempt that was, and keeps when each began.
    """

    def __init__(self, virtual: VirtualTime, **durations: tuple[float, ...]) -> None:
        self.began: list[tuple[float, str]] = []
        self._virtual = virtual
        self._durations = durations

    def __call__(self, argument: str) -> str:
        self.began.append((self._virtual.now, argument))
        nth = sum(asked == argument for _, asked in self.began)
        durations = self._durations.get(argument, (1.0,))
        sleep(durations[min(nth, len(durations)) - 1])
        return f"{argument}{nth}"


# --- what it is


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, True, "30"])
def test_attempt_timeout_that_is_none(seconds: object) -> None:
    with pytest.raises((TypeError, ValueError), match="attempt_timeout is "):
        stage(str, attempt_timeout=seconds)


def test_attempt_timeout_is_refused_beside_an_executor() -> None:
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(TypeError, match="attempt_timeout is given beside an executor, whose threads are not"),
    ):
        Stage(str, attempt_timeout=30, executor=executor)


def test_its_failure_is_a_timeout_that_may_pass_and_counts_for_an_outage() -> None:
    error = AttemptTimeout()
    assert isinstance(error, TimeoutError)
    assert is_transient(error)
    assert kind_of(error) is Kind.OUTAGE


# --- giving up, in virtual time


@each_way
def test_attempt_that_takes_too_long_is_given_up_and_made_again(job: Run, virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(100, 5))
    assert job("ab", str, Stage(fetch, attempt_timeout=30, retry=AT_ONCE)) == ["a2", "b1"]
    assert fetch.began == [(0, "a"), (0, "b"), (30, "a")]
    assert virtual.now == 35  # the late answer comes at 100


@each_way
def test_stage_one_too(job: Run, virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(100, 5))
    assert job("ab", Stage(fetch, attempt_timeout=30, retry=AT_ONCE), str.upper) == ["A2", "B1"]
    assert virtual.now == 35


@each_way
@pytest.mark.parametrize("late", [7, 20, 100])
def test_late_answer_is_dropped_whatever_has_become_of_the_call(
    late: float, job: Run, virtual: VirtualTime
) -> None:
    """It comes while the call waits for its next attempt, while that runs, or after it."""
    fetch = Attempts(virtual, a=(late, 4), b=(200, 1))
    assert job("ab", str, Stage(fetch, attempt_timeout=5, retry=LATER)) == ["a2", "b2"]
    assert virtual.now == 22


@pytest.mark.parametrize("durations", [(100, 40, 5), (40, 100, 5), (40, 30, 5)])
def test_call_may_be_given_up_twice_and_the_late_ends_come_in_any_order(
    durations: tuple[float, ...], virtual: VirtualTime
) -> None:
    fetch = Attempts(virtual, a=durations, b=(1000,))
    settings = Stage(fetch, attempt_timeout=10, retry=AT_ONCE, workers=20)
    with iter_two_stage("ab", str, settings, return_exceptions=True) as outcomes:
        results = {outcome.item: outcome for outcome in outcomes}
    assert results["a"].result == "a3"
    assert results["a"].result_attempts == 3
    assert isinstance(results["b"].exception, AttemptTimeout)
    assert [began for began, item in fetch.began if item == "a"] == [0, 10, 20]


@each_way
def test_attempt_that_ends_exactly_at_its_time_has_ended(
    job: Run, virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Attempts(virtual, a=(30,))
    assert job("a", str, Stage(fetch, attempt_timeout=30)) == ["a1"]
    assert not given_up_in(caplog)
    fetch = Attempts(virtual, a=(30.001, 1))
    assert job("a", str, Stage(fetch, attempt_timeout=30, retry=AT_ONCE)) == ["a2"]
    assert len(given_up_in(caplog)) == 1


def test_time_counts_from_the_begin_not_from_the_hand_over(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual)
    assert run_two_stage("abcd", str, Stage(fetch, workers=1, attempt_timeout=1.5)) == [
        "a1",
        "b1",
        "c1",
        "d1",
    ]
    assert [began for began, _ in fetch.began] == [0, 1, 2, 3]


@each_way
def test_batches_of_stage_one(job: Run, virtual: VirtualTime) -> None:
    fetch = Fake(each(str.upper), lambda batch: 100 if "c" in batch and len(fetch.calls) < 3 else 1)
    assert job("abcde", stage(fetch, batch_size=2, attempt_timeout=30, retry=AT_ONCE), str) == list("ABCDE")
    assert fetch.asked == [["a", "b"], ["c", "d"], ["e"], ["c", "d"]]
    assert virtual.now == 31


@each_way
def test_batches_of_stage_two(job: Run, virtual: VirtualTime) -> None:
    fetch = Fake(each(str.upper), lambda batch: 100 if len(fetch.calls) == 1 else 1)
    assert job(
        "abcde", each(str), stage(fetch, batch_size=5, attempt_timeout=30, retry=AT_ONCE), batch_size=5
    ) == [*"ABCDE"]
    assert fetch.asked == [[*"abcde"], [*"abcde"]]
    assert virtual.now == 31


@each_way
def test_many_tokens(job: Run, virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, b=(100, 5), c=(100, 100, 5))
    settings = Stage(fetch, attempt_timeout=30, retry=AT_ONCE)
    assert job(["ab", "cd"], list, settings, many=True) == [["a1", "b2"], ["c3", "d1"]]
    assert virtual.now == 65


def test_batch_that_is_given_up_is_split_if_it_is_said_to_be(virtual: VirtualTime) -> None:
    fetch = Fake(each(str.upper), lambda batch: 1 if len(batch) == 1 else 50)
    settings = stage(fetch, batch_size=4, workers=9, attempt_timeout=30, bisect=AttemptTimeout, retry=1)
    assert run("abcd", settings, str) == list("ABCD")
    assert Counter(map(len, fetch.asked)) == {4: 1, 2: 2, 1: 4}
    assert virtual.now == 61


def test_token_may_be_refreshed_for_it(virtual: VirtualTime) -> None:
    tokens = itertools.count(1)
    fetch = Attempts(virtual, token1=(50,))
    result = run(
        ["a"],
        lambda _: f"token{next(tokens)}",
        Stage(fetch, attempt_timeout=30),
        refresh_token_on=AttemptTimeout,
    )
    assert result == ["token21"]
    assert virtual.now == 31


@each_way
def test_without_retries_it_is_the_failure(job: Run, virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, b=(EVER,))
    settings = Stage(fetch, attempt_timeout=30, retry=None)
    with pytest.raises(AttemptTimeout) as raised:
        job("abc", str, settings)
    assert str(raised.value) == "the attempt took longer than attempt_timeout=30 s"
    assert notes(raised.value) == ["twostage: stage two, 'b', 1 attempt"]
    assert virtual.now == 30
    given = job("abc", str, settings, return_exceptions=True)
    assert [given[0], type(given[1]), given[2]] == ["a2", AttemptTimeout, "c2"]


def test_policy_stops_after_its_attempts(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, b=(EVER,))
    settings = Stage(
        fetch, attempt_timeout=30, workers=9, retry=Retrying(stop=stop_after_attempt(3), wait=wait_fixed(2))
    )
    outcomes = outcomes_of("ab", str, settings)
    assert notes(outcomes[1].exception) == ["twostage: stage two, 'b', 3 attempts"]
    assert outcomes[1].result_attempts == 3
    assert [began for began, item in fetch.began if item == "b"] == [0, 32, 64]
    assert virtual.now == 94


def test_default_policy_tries_it_ten_times(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(EVER,))
    outcomes = outcomes_of("a", str, Stage(fetch, attempt_timeout=30, workers=20))
    assert outcomes[0].result_attempts == len(fetch.began) == 10


@in_virtual_time
def test_warning_names_the_item_and_neither_tokens_nor_results(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def fetch(argument: Any) -> Any:  # noqa: ANN401 - of both stages, in batches or not
        sleep(100)
        return ["secret"] * 3

    assert isinstance(
        outcomes_of([7], Stage(fetch, attempt_timeout=30, retry=None), str)[0].exception, TimeoutError
    )
    outcomes_of(["it"], lambda _: "secret", Stage(fetch, attempt_timeout=2.5, retry=None))
    outcomes_of("xyz", Stage(fetch, attempt_timeout=30, retry=None, batch_size=3), str)
    outcomes_of(
        "xyz",
        each(lambda _: "secret"),
        stage(fetch, attempt_timeout=30, retry=None, batch_size=3),
        batch_size=3,
    )
    outcomes_of(["m"], lambda _: ["secret"], Stage(fetch, attempt_timeout=30, retry=None), many=True)
    says = "the attempt takes longer than {} s and is given up"
    assert given_up_in(caplog) == [
        f"stage one, 7: {says.format(30)}",
        f"stage two, 'it': {says.format(2.5)}",
        f"stage one, 3 items from 'x': {says.format(30)}",
        f"stage two, 3 items from 'x': {says.format(30)}",
        f"stage two, 'm': {says.format(30)}",
    ]
    assert {record.name for record in caplog.records} == {"twostage"}
    assert "secret" not in caplog.text


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit, LeaveError])
def test_late_failure_is_dropped_whatever_it_is(error: type[BaseException], virtual: VirtualTime) -> None:
    def fetch(item: str) -> str:
        began.append(item)
        if len(began) == 1:
            sleep(40)
            raise error
        sleep(20)
        return item

    began: list[str] = []
    assert run("a", str, Stage(fetch, attempt_timeout=30, retry=AT_ONCE)) == ["a"]
    assert virtual.now == 50


# --- places, in virtual time


def test_place_of_one_that_is_given_up_is_taken_at_once(virtual: VirtualTime) -> None:
    """Two workers, the first of which hangs: from 10 on there are two again."""
    fetch = Attempts(virtual, a=(EVER,))
    items = "abcdefghijklmnopqrstuvwxyz"
    outcomes = outcomes_of(
        items, each(str), Stage(fetch, workers=2, attempt_timeout=10, retry=None), batch_size=26
    )
    assert [outcome.item for outcome in outcomes if outcome.exception] == ["a"]
    # b to k alone, one after the other, then l to z in pairs
    assert Counter(began for began, _ in fetch.began) == {
        0: 2,
        **dict.fromkeys(range(1, 10), 1),
        **dict.fromkeys(range(10, 17), 2),
        17: 1,
    }
    assert virtual.now == 18


def test_nothing_starts_while_as_many_as_there_are_workers_run_on(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(50, 1), b=(80, 1))
    settings = Stage(fetch, workers=2, attempt_timeout=10, retry=AT_ONCE)
    assert run("abc", each(str), settings, batch_size=3) == ["a2", "b2", "c1"]
    assert fetch.began == [(0, "a"), (0, "b"), (50, "a"), (50, "b"), (51, "c")]
    assert virtual.now == 52


def test_those_that_run_when_the_last_place_is_lost_are_not_held_back(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(50,), b=(9,), c=(50,), d=(6,))
    settings = Stage(fetch, workers=2, attempt_timeout=10, retry=None)
    outcomes = outcomes_of("abcde", each(str), settings, batch_size=5)
    # c begins at 9 and is given up at 19; d begins at 10 and e at 16, when one place is lost
    assert fetch.began == [(0, "a"), (0, "b"), (9, "c"), (10, "d"), (16, "e")]
    assert [outcome.item for outcome in outcomes if outcome.exception] == ["a", "c"]


@pytest.mark.parametrize("form", ["list", "stream", "ordered"])
@pytest.mark.parametrize("return_exceptions", [False, True])
def test_after_patience_the_job_ends_and_says_why(
    form: str, virtual: VirtualTime, *, return_exceptions: bool
) -> None:
    """They are lost at 10 and 11; what has come by then is handed over."""
    fetch = Attempts(virtual, b=(EVER,), c=(EVER,))
    settings = Stage(fetch, workers=2, attempt_timeout=10, patience=60, retry=LATER)
    taken: list[str] = []

    def job() -> None:
        both: dict[str, Any] = {"batch_size": 5, "return_exceptions": return_exceptions}
        if form == "list":
            run("abcde", each(str), settings, **both)
        with iter_two_stage("abcde", each(str), settings, ordered=form == "ordered", **both) as outcomes:
            taken.extend(outcome.result for outcome in outcomes)

    with pytest.raises(AttemptTimeout) as raised:
        job()
    assert str(raised.value) == (
        "stage two: 2 attempts were given up and have not ended for 60 s, so no worker is left; "
        "give the client a timeout of its own"
    )
    assert taken == ([] if form == "list" else ["a1", "d1"])
    assert fetch.began == [(0, "a"), (0, "b"), (1, "c"), (10, "d")]
    assert virtual.now == 11 + 60


def test_patience_begins_anew_when_a_place_is_free_again(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(50, EVER))
    settings = Stage(fetch, workers=1, attempt_timeout=10, patience=60, retry=AT_ONCE)
    with pytest.raises(AttemptTimeout, match="stage two: 1 attempts"):
        run("a", str, settings)
    assert fetch.began == [(0, "a"), (50, "a")]
    assert virtual.now == 50 + 10 + 60


def test_late_end_at_the_last_moment_of_patience_saves_the_job(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(70, 1))
    settings = Stage(fetch, workers=1, attempt_timeout=10, patience=60, retry=AT_ONCE)
    assert run("a", str, settings) == ["a2"]
    assert virtual.now == 71


def test_without_patience_for_ever(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(1e6, 1))
    assert run("a", str, Stage(fetch, workers=1, attempt_timeout=10, patience=None, retry=AT_ONCE)) == ["a2"]
    assert virtual.now == 1e6 + 1


def test_patience_is_asked_for_only_while_something_waits(virtual: VirtualTime) -> None:
    """All places are lost, and nobody wants one, while the other stage's call takes longer than that."""
    fetch = Attempts(virtual, a=(EVER,))
    settings = Stage(fetch, workers=1, attempt_timeout=10, patience=60, retry=None)
    outcomes = outcomes_of("ba", settings, Fake(str, 500))
    assert [outcome.exception and type(outcome.exception) for outcome in outcomes] == [None, AttemptTimeout]
    assert virtual.now == 501


def test_patience_ends_while_the_consumer_has_too_much_in_hand(virtual: VirtualTime) -> None:
    """As many outcomes wait for it as may be in progress, so that nothing would start anyway."""
    fetch = Fake(str, lambda item: EVER if item == LEAST_IN_PROGRESS - 1 else 0)
    settings = stage(fetch, workers=1, attempt_timeout=10, patience=60, retry=None)
    with iter_two_stage(range(1000), settings, str, return_exceptions=True, window=1000) as outcomes:
        next(outcomes)
        sleep(5)
        assert len(fetch.calls) == LEAST_IN_PROGRESS
        sleep(1000)
        with pytest.raises(AttemptTimeout, match="stage one: 1 attempts were given up"):
            list(outcomes)


def test_patience_ends_while_items_linger_for_a_full_batch(virtual: VirtualTime) -> None:
    def source() -> Iterator[str]:
        yield from "abc"
        sleep(1000)

    settings = stage(Fake(list, EVER), workers=1, batch_size=2, attempt_timeout=10, patience=60, retry=None)
    outcomes = iter_two_stage(source(), settings, str, return_exceptions=True, linger=500)
    with pytest.raises(AttemptTimeout, match="stage one: 1 attempts were given up"):
        list(outcomes)
    assert virtual.now == 70


def test_running_calls_are_awaited_when_patience_is_over(virtual: VirtualTime) -> None:
    first = Fake(str, lambda item: 100 if item == "z" else 0)
    fetch = Attempts(virtual, a=(EVER,))
    with pytest.raises(AttemptTimeout, match="stage two: 1 attempts were given up"):
        run(
            "abz",
            first,
            Stage(fetch, workers=1, attempt_timeout=10, patience=60, retry=None),
            return_exceptions=True,
        )
    assert virtual.now == 100  # z's token, which goes no further
    assert len(fetch.began) == 1


# --- ends, in virtual time


@pytest.mark.parametrize("way", ["close", "raise", "break"])
def test_what_hangs_is_given_up_when_the_job_is_left_too(way: str, virtual: VirtualTime) -> None:
    """Two were given up at 10; of the three that run then one hangs, until its time has come too."""
    fetch = Attempts(virtual, a=(EVER,), b=(2,), c=(EVER,), d=(3,), e=(EVER,))
    settings = Stage(fetch, workers=3, attempt_timeout=10, retry=None)
    outcomes = iter_two_stage("abcdefgh", each(str), settings, batch_size=8, return_exceptions=True)

    def consume() -> None:
        with outcomes:
            for outcome in outcomes:
                if outcome.item == "a":
                    assert virtual.now == 10
                    if way == "raise":
                        raise LookupError
                    if way == "close":
                        outcomes.close()
                    break

    with pytest.raises(LookupError) if way == "raise" else nullcontext():
        consume()
    assert fetch.began[-3:] == [(5, "e"), (10, "f"), (10, "g")]
    assert virtual.now == 15


def test_failure_that_ends_the_job_does_not_wait_for_what_hangs(virtual: VirtualTime) -> None:
    def fetch(item: str) -> None:
        sleep({"a": EVER, "b": 3.0}[item])
        raise LookupError

    with pytest.raises(LookupError):
        run("ab", str, Stage(fetch, attempt_timeout=10))
    assert virtual.now == 10


def test_job_ends_though_attempts_hang_that_were_given_up(virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, a=(EVER, 1))
    stages = Stage(fetch, attempt_timeout=10, retry=AT_ONCE), Stage(fetch, attempt_timeout=10, retry=AT_ONCE)
    assert run("a", *stages) == ["a21"]
    assert virtual.now == 12
    assert run("b", *stages) == ["b11"]  # the next job's workers are its own
    assert virtual.now == 14


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_time_of_the_whole_run(virtual: VirtualTime, *, return_exceptions: bool) -> None:
    """What runs when it has passed is given up in its own time, and not made again."""
    fetch = Attempts(virtual, a=(EVER,))
    first = Fake(str, lambda item: 16 if item == "c" else 0)
    stages = first, Stage(fetch, attempt_timeout=10, retry=AT_ONCE)
    if return_exceptions:
        results = run("abc", *stages, timeout=15, return_exceptions=True)
        assert [type(result) for result in results] == [AttemptTimeout, str, RunTimeout]
        assert notes(results[0]) == ["twostage: stage two, 'a', 2 attempts"]
    else:
        with pytest.raises(RunTimeout):
            run("abc", *stages, timeout=15)
    assert [began for began, item in fetch.began if item == "a"] == [0, 10]
    assert virtual.now == 20


def test_time_of_the_whole_run_ends_the_patience(virtual: VirtualTime) -> None:
    """What waited for a place has failed by then, so nothing is held back any more."""
    first = Fake(str, lambda item: {"c": 80, "d": 100}.get(item, 0))
    settings = stage(Fake(str, EVER), workers=1, attempt_timeout=10, patience=60, retry=None)
    results = run("abcd", first, settings, timeout=30, return_exceptions=True)
    assert [type(result) for result in results] == [AttemptTimeout, RunTimeout, RunTimeout, RunTimeout]
    assert virtual.now == 100


def test_gate_stays_shut_when_its_patience_is_over() -> None:
    gate, runner = HungGate("stage one", 2, 60), Runner()
    runner.given_up = 1
    assert gate.when_may_start(5, runner) == 5
    runner.given_up = 2
    assert gate.when_may_start(5, runner) == gate.when_may_start(64, runner) == 65
    gate.check_patience(64.9, runner)
    assert gate.when_may_start(65, runner) == math.inf
    with pytest.raises(AttemptTimeout, match="stage one: 2 attempts"):
        gate.check_patience(65, runner)
    runner.given_up = 1
    gate.check_patience(70, runner)
    runner.given_up = 2
    gate.check_patience(200, runner)
    assert gate.when_may_start(200, runner) == 260


# --- with what else holds starts back


def test_outage_is_seen_by_attempts_that_are_given_up(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    """All that run at once hang from then on: one probe at a time is made, until the API answers again."""
    down = 1.5, 100.0

    def fetch(item: int) -> int:
        began.append(virtual.now)
        sleep(20 if down[0] < virtual.now < down[1] else 1)
        return item

    began: list[float] = []
    settings = Stage(fetch, workers=9, attempt_timeout=10, retry=3)
    assert run(range(40), each(int), settings, batch_size=40) == [*range(40)]
    said = [record.getMessage() for record in caplog.records]
    assert "stage two: the API seems to be down: 9 calls were not answered since the last success" in said
    assert any(line.startswith("stage two: the API answers again") for line in said)
    probes = [time for time in began if down[0] < time < down[1]]
    assert probes[:9] == [2.0] * 9
    assert probes[9:] == sorted(set(probes[9:]))  # one at a time


@pytest.mark.parametrize("rate", [0.5, 2])
def test_rate_counts_each_begin_once(rate: float, virtual: VirtualTime) -> None:
    fetch = Attempts(virtual, b=(25, 1), d=(EVER, 25, 1))
    settings = Stage(fetch, attempt_timeout=10, rate=rate, retry=AT_ONCE)
    assert run("abcdef", each(str), settings, batch_size=6) == ["a1", "b2", "c1", "d3", "e1", "f1"]
    began = [time for time, _ in fetch.began]
    assert len(began) == 9
    limit, per = max(rate, 1), max(1 / rate, 1)
    for first, after in zip(began, began[int(limit) :], strict=False):
        assert after - first >= per


def test_adaptive_limit_comes_down_and_counts_those_that_are_not_given_up(virtual: VirtualTime) -> None:
    running: list[tuple[float, float]] = []

    def fetch(item: int) -> int:
        hangs = item in (3, 4, 5)
        now = virtual.now
        running.append((now, now + (10 if hangs else 4)))
        sleep(EVER if hangs else 4)
        return item

    settings = Stage(fetch, workers=8, adaptive=True, attempt_timeout=10, retry=None)
    results = run(range(100), each(int), settings, batch_size=100, return_exceptions=True)
    assert [index for index, result in enumerate(results) if isinstance(result, AttemptTimeout)] == [3, 4, 5]
    at_once = [sum(began <= now < end for began, end in running) for now, _ in running]
    assert max(at_once) == 8
    assert min(at_once[20:40]) < 8
