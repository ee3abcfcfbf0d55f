"""What observers hear of a job, in virtual time and in threads; and that none of them harms it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from forms import each_way, run
from pacing import asking
from tenacity import Retrying, retry_if_exception, retry_if_result, stop_after_attempt, wait_fixed

from twostage import (
    Observer,
    Outcome,
    Stage,
    Throttled,
    TooManyFailures,
    aiter_two_stage,
    arun_two_stage,
    iter_two_stage,
    run_two_stage,
)
from twostage.observing.events import Attempt, HeldBack, JobBegan, JobEnded, Listeners, RetryDue
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forms import Run

    from twostage import Progress


class Witness(Observer):
    """Keeps all that it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.threads: list[str] = []

    def _hear(self, event: object) -> None:
        self.heard.append(event)
        self.threads.append(threading.current_thread().name)

    job_began = attempt_ended = retry_due = held_back = outcome_done = job_ended = _hear  # type: ignore[assignment] # it takes any

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]

    def attempts(self, stage: int) -> list[Attempt]:
        return [attempt for attempt in self.of(Attempt) if attempt.stage == stage]


def timed(seconds: float, fails: Callable[[Any], bool] = lambda _: False) -> Callable[[Any], Any]:
    def fetch(argument: Any) -> Any:  # noqa: ANN401 - of both stages
        sleep(seconds)
        if fails(argument):
            raise ApiError(503)
        return argument

    return fetch


# --- the events


@each_way
def test_job_is_told_from_its_beginning_to_its_end(virtual: VirtualTime, job: Run) -> None:
    witness = Witness()
    before = time.time()
    job([*"abc"], timed(1), timed(2), observer=witness, token_workers=3, result_workers=1)
    kinds = [type(event) for event in witness.heard]
    assert kinds[0] is JobBegan
    assert kinds[-1] is JobEnded
    assert Counter(kinds) == {JobBegan: 1, Attempt: 6, Outcome: 3, JobEnded: 1}
    began, *_, ended = witness.heard
    assert before <= began.time <= time.time()
    assert (began.clock, began.total, began.many) == (0, 3, False)
    assert [(stage.workers, stage.batch_size) for stage in began.stages] == [(3, None), (1, None)]
    assert ended == JobEnded(at=7, seconds=7, done=3, failed=0, error=None)
    assert witness.attempts(1) == [Attempt(1, index, 1, 1, 0, 0, 1, 1, None) for index in range(3)]
    assert witness.attempts(2) == [
        Attempt(2, index, 1, 1, 1, 1 + 2 * index, 3 + 2 * index, 1, None) for index in range(3)
    ]


def test_attempts_of_batches_say_how_many_have_an_answer(virtual: VirtualTime) -> None:
    witness = Witness()
    bad = {"b": LookupError(), "d": ApiError(503)}

    def fetch_tokens(items: list[str]) -> list[Any]:
        sleep(1)
        return [bad.pop(item, item) for item in items]

    retry = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, ApiError)),
        wait=wait_fixed(5),
        stop=stop_after_attempt(3),
    )
    run(
        "abcd",
        Stage(fetch_tokens, batch_size=4, retry=retry),
        Stage(list, batch_size=2),
        return_exceptions=True,
        observer=witness,
    )
    first, second = witness.attempts(1)
    assert (first.size, first.number, first.answers, first.error) == (4, 1, 2, None)
    assert (second.item_index, second.size, second.number, second.answers) == (3, 1, 2, 1)
    assert (second.handed_over, second.began, second.ended) == (6, 6, 7)
    (due,) = witness.of(RetryDue)
    assert isinstance(due.error, ApiError)
    assert due[:5] == (1, "d", 3, 1, 1)
    assert due[6:] == (1, 6)
    assert witness.heard.index(due) < witness.heard.index(first)  # an attempt is told when all of it is known
    assert [attempt.size for attempt in witness.attempts(2)] == [2, 1]


def test_with_many_attempts_of_stage_one_answer_with_all_tokens(virtual: VirtualTime) -> None:
    witness = Witness()
    run([3, 0, 2], lambda item: ["token"] * item, str, many=True, observer=witness)
    assert [attempt.answers for attempt in witness.attempts(1)] == [3, 0, 2]
    assert [attempt.item_index for attempt in witness.attempts(2)] == [0, 0, 0, 2, 2]


def test_failures_are_told_as_they_were_raised(virtual: VirtualTime) -> None:
    witness = Witness()
    error = LookupError()

    def fetch_result(token: str) -> str:
        if token == "b":  # noqa: S105 - none
            raise error
        return token

    with pytest.raises(LookupError):
        run("ab", str, fetch_result, observer=witness, token_workers=1, result_workers=1)
    assert [attempt.error for attempt in witness.attempts(2)] == [None, error]
    assert witness.heard[-1].error is error
    witness = Witness()
    run("ab", str, fetch_result, observer=witness, return_exceptions=True)
    assert witness.heard[-1][2:] == (2, 1, None)
    wrong: Callable[[Any], list[str]] = lambda _: ["a"]  # noqa: E731 - too few
    witness = Witness()
    with pytest.raises(ValueError, match="returned 1 token"):
        run("ab", wrong, str, batch_size=2, observer=witness)
    (attempt,) = witness.attempts(1)
    assert (type(attempt.error).__name__, attempt.answers) == ("BatchLengthError", 0)


def test_refused_result_is_a_retry_without_an_error(virtual: VirtualTime) -> None:
    witness = Witness()
    answers = iter(["not ready", "ready"])
    retry = Retrying(
        retry=retry_if_result(lambda one: one == "not ready"), wait=wait_fixed(3), stop=stop_after_attempt(2)
    )
    run("a", str, lambda _: next(answers), retry=retry, observer=witness)
    (due,) = witness.of(RetryDue)
    assert (due.error, due.at, due.due) == (None, 0, 3)
    assert [attempt.answers for attempt in witness.attempts(2)] == [0, 1]


def test_pauses_are_told_with_their_reason(virtual: VirtualTime) -> None:
    witness = Witness()
    raised: list[Exception] = [asking(12), Throttled(7)]

    def fetch_result(token: str) -> str:
        if raised:
            raise raised.pop(0)
        return token

    run("a", str, fetch_result, observer=witness)
    assert witness.of(HeldBack) == [
        HeldBack(2, "paused", 0, 12, 12),
        HeldBack(2, "limited", 12, 19, 7),
    ]


def test_outages_are_told_with_their_ends(virtual: VirtualTime) -> None:
    witness = Witness()

    def fetch_result(token: str) -> str:
        sleep(0.1)
        if 3 < virtual.now < 60:
            raise ConnectionError
        return token

    run(range(2000), str, fetch_result, result_workers=16, observer=witness)
    down, up = witness.of(HeldBack)
    assert down[:2] == (2, "down")
    assert down.lost == 16
    assert up[:2] == (2, "up")
    assert up.at - up.seconds == pytest.approx(down.at)
    assert up.at >= 60


# --- where and when


def test_observers_are_called_in_the_job_s_thread_and_at_its_begin_in_the_caller_s() -> None:
    witness = Witness()
    run("ab", str, str, observer=witness)
    assert witness.threads[0] == threading.current_thread().name
    assert set(witness.threads[1:]) == {"twostage-coordinator"}


@pytest.mark.parametrize("where", ["pool", "executor", "loop"])
def test_times_are_those_of_the_workers(where: str) -> None:
    """What one worker did does not overlap, though the job hears of it later."""
    workers: dict[int, set[str]] = {}

    def fetch_result(token: int) -> int:
        time.sleep(0.002)
        workers.setdefault(token, set()).add(threading.current_thread().name)
        return token

    async def coroutine(token: int) -> int:
        await asyncio.sleep(0.002)
        return token

    witness = Witness()
    with ThreadPoolExecutor(3) as executor:
        second: Any = (
            Stage(coroutine, workers=3)
            if where == "loop"
            else Stage(fetch_result, workers=3, executor=executor if where == "executor" else None)
        )
        run(range(90), str, second, observer=witness)
    attempts = witness.attempts(2)
    assert len(attempts) == 90
    assert all(one.handed_over <= one.began < one.ended for one in attempts)
    assert min(one.ended - one.began for one in attempts) >= 0.002
    changes = sorted([*((one.began, 1) for one in attempts), *((one.ended, -1) for one in attempts)])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    assert most <= 3


def test_jobs_on_an_event_loop_are_observed_too() -> None:
    async def fetch(argument: str) -> str:
        await asyncio.sleep(0)
        return argument

    async def main(witness: Witness) -> None:
        await arun_two_stage("ab", fetch, fetch, observer=witness)
        async with aiter_two_stage("ab", fetch, fetch, observer=witness) as outcomes:
            async for _ in outcomes:
                pass

    witness = Witness()
    asyncio.run(main(witness))
    assert Counter(map(type, witness.heard)) == {JobBegan: 2, Attempt: 8, Outcome: 4, JobEnded: 2}


def test_end_is_told_whichever_way_a_job_ends() -> None:
    witness = Witness()
    with iter_two_stage(range(100), str, str, observer=witness, window=10) as outcomes:
        next(outcomes)
    with pytest.raises(TooManyFailures):
        run(range(100), str, lambda _: 1 // 0, observer=witness, return_exceptions=True, max_failures=3)
    with pytest.raises(SystemExit):
        run("a", str, leave, observer=witness)
    assert [type(end.error) for end in witness.of(JobEnded)] == [type(None), TooManyFailures, SystemExit]


def leave(_: object) -> None:
    raise SystemExit


# --- observers that do not behave


class Raising(Witness):
    """Raises at its second event of a kind."""

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__()
        self._name = name
        self._error = error
        setattr(type(self), name, Raising.hear)

    def hear(self, event: object) -> None:
        self.heard.append(event)
        raise self._error


@pytest.mark.parametrize(
    "name", ["job_began", "attempt_ended", "retry_due", "outcome_done", "progressed", "job_ended"]
)
def test_observer_that_raises_is_left_out_and_harms_nothing(
    virtual: VirtualTime, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    raising = type("Mine", (Raising,), {})(name, LookupError("a secret result"))
    others = Witness(), Witness()
    failing = SimulatedApi(str, latency=1, fail=0.2, seed=3)
    results = run(range(20), failing, str, observer=[others[0], raising, others[1]])
    assert results == list(map(str, range(20)))
    assert others[0].heard == others[1].heard
    assert len(others[0].of(Attempt)) > 40
    if name != "job_ended":
        assert raising.of(JobEnded) == []
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "the observer Mine has raised LookupError at " in warning.getMessage()
    assert f"{__file__}:" in warning.getMessage()
    assert "secret" not in caplog.text


def test_observer_whose_method_is_a_static_one_is_left_out_as_well(caplog: pytest.LogCaptureFixture) -> None:
    class Static(Observer):
        @staticmethod
        def attempt_ended(attempt: Attempt) -> None:
            raise LookupError

    assert run("ab", str, str, observer=Static()) == ["a", "b"]
    assert len([record for record in caplog.records if "is left out" in record.getMessage()]) == 1


def test_length_is_not_asked_for_nothing() -> None:
    class Query(list[int]):
        def __len__(self) -> int:
            raise AssertionError

    witness = Witness()
    assert len(run(Query([1, 2]), str, str, observer=witness)) == 2
    assert witness.of(JobBegan)[0].total is None


def test_exception_that_is_none_ends_the_job_from_an_observer_too() -> None:
    class Leaving(Observer):
        def attempt_ended(self, attempt: Attempt) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("ab", str, str, observer=Leaving())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"observer": 3}, "observer is 3; expected an Observer, or several"),
        ({"observer": [Witness(), "x"]}, r"observer is \[.*\]; expected an Observer, or several"),
        ({"observer": Witness}, "observer is <class .*; expected an Observer, or several"),
        ({"trace": True}, "trace is True; expected a Trace, or None"),
        ({"total": "3"}, "total is '3'; expected an integer"),
        ({"progress": 3}, 'progress is 3; expected True, False, "always", or a function'),
        ({"progress": "yes"}, "progress is 'yes'; expected True, False, \"always\", or a function"),
    ],
)
def test_wrong_arguments_are_errors_before_any_call(arguments: dict[str, Any], error: str) -> None:
    for job in (run_two_stage, iter_two_stage):
        with pytest.raises(TypeError, match=f"^{error}"):
            job("a", lambda _: 1 // 0, str, **arguments)


def test_nothing_is_there_of_what_nobody_hears() -> None:
    class Ends(Observer):
        def job_ended(self, end: JobEnded) -> None:
            pass

    listeners = Listeners([Ends(), Observer()])
    assert len(listeners.job_ended) == 1
    assert not listeners.attempt_ended
    assert not listeners.progressed


# --- the log


def test_log_has_the_ends_of_a_job_and_each_retry(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "twostage")
    refused = asking(12)
    raised: list[Exception] = [ApiError(503), refused]

    def fetch_result(token: str) -> str:
        sleep(1)
        if raised:
            raise raised.pop(0)
        return f"secret {token}"

    retry = Retrying(retry=retry_if_exception(lambda _: True), wait=wait_fixed(2), stop=stop_after_attempt(5))
    run(["an item"], lambda _: "secret", fetch_result, retry=retry)
    where = "test_log_has_the_ends_of_a_job_and_each_retry.<locals>."
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"a job begins: {where}<lambda> on 4 workers, then {where}fetch_result on 32, for 1 items"),
        (
            "INFO",
            "stage two, 'an item': attempt 1 failed with ApiError, status 503; the next one in 2.00 s",
        ),
        ("WARNING", "stage two: paused for 12.0 s, as the API asks"),
        (
            "INFO",
            "stage two, 'an item': attempt 2 failed with AnsweredError, status 429; the next one in 2.00 s",
        ),
        ("INFO", "the job has ended after 17.0 s: 1 items done, 0 of them failed"),
    ]
    assert "secret" not in caplog.text


# --- progress


def collected(items: Any, *stages: Any, **settings: Any) -> list[Progress]:  # noqa: ANN401 - any job
    seen: list[Progress] = []
    run(items, *stages, progress=seen.append, **settings)
    return seen


def test_progress_is_told_ten_times_a_second_at_most_and_once_at_least(virtual: VirtualTime) -> None:
    seen = collected(range(1000), timed(0.01), timed(0.03), result_workers=4)
    gaps = gaps_of(seen)
    assert min(gaps[:-1]) >= 0.1 - 1e-9
    assert max(gaps) <= 0.2
    gaps = gaps_of(collected(range(3), timed(10), timed(20)))
    assert max(gaps) <= 1 + 1e-9


def gaps_of(seen: Sequence[Progress]) -> list[float]:
    return [after.seconds - before.seconds for before, after in pairwise(seen)]


def test_progress_counts_what_is_where(virtual: VirtualTime) -> None:
    seen = collected(
        range(20),
        timed(1),
        timed(10, lambda token: token in (3, 4)),
        token_workers=20,
        result_workers=5,
        return_exceptions=True,
        retry=Retrying(
            retry=retry_if_exception(lambda _: True), wait=wait_fixed(500), stop=stop_after_attempt(2)
        ),
    )
    by_time = {round(one.seconds, 1): one[1:] for one in seen}
    assert by_time[0.1] == (0, 0, 20, 0, 20, 0, 0, "")
    assert by_time[1.0] == (0, 0, 20, 15, 0, 5, 0, "")
    assert by_time[11.0] == (3, 0, 20, 10, 0, 5, 2, "")
    assert seen[-1][1:] == (20, 2, 20, 0, 0, 0, 0, "")
    assert seen[-1].seconds == virtual.now


def test_progress_says_why_it_stands_still(virtual: VirtualTime) -> None:
    raised: list[Exception] = [asking(12)]

    def fetch_result(token: str) -> str:
        sleep(1)
        if raised:
            raise raised.pop()
        return token

    seen = collected("ab", str, fetch_result)
    why = [one.why for one in seen]
    assert "stage two paused 12 s by Retry-After" in why
    assert "stage two paused 2 s by Retry-After" in why
    assert why[-1] == ""


def test_progress_says_that_the_api_is_down(virtual: VirtualTime) -> None:
    def fetch_result(token: str) -> str:
        sleep(0.1)
        if 3 < virtual.now < 60:
            raise ConnectionError
        return token

    why = {one.why for one in collected(range(2000), str, fetch_result, result_workers=16)}
    assert why == {"", "API down, probing"}


def test_progress_is_told_while_the_consumer_is_away(virtual: VirtualTime) -> None:
    seen: list[Progress] = []
    with iter_two_stage(range(1000), timed(0.1), timed(0.1), progress=seen.append) as outcomes:
        next(outcomes)
        sleep(100)
        away = [one for one in seen if one.seconds > 1]
        assert away[-1].done > 100
        assert away[-1].why == "the consumer is away"


@pytest.mark.parametrize(
    ("items", "total", "expected"),
    [([1, 2], None, 2), (iter([1, 2]), None, None), (iter([1, 2]), 7, 7), ([1, 2], 7, 7), (iter(()), 0, 0)],
)
def test_total_is_what_was_said_or_the_length(items: Any, total: int | None, expected: int | None) -> None:  # noqa: ANN401 - any iterable
    assert collected(items, str, str, total=total)[-1].total == expected
