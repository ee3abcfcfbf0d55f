"""What is tried again, how often, and how a job ends when it is not."""

from __future__ import annotations

import linecache
import logging
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import tenacity
import tenacity.asyncio
from common import books, frames, nothing_collected
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    Retrying,
    TryAgain,
    retry_any,
    retry_if_exception,
    retry_if_exception_type,
    retry_if_not_exception_message,
    retry_if_result,
    retry_never,
    retry_unless_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
    wait_none,
)

from twostage import BatchLengthError, Stage, iter_two_stage, run_two_stage
from twostage.base.records import Outcome
from twostage.failing.retry import End, Fail, Judge, Retry, default_policy

if TYPE_CHECKING:
    from collections.abc import Callable


class ApiError(Exception):
    """A failure that is transient, as its status says."""

    def __init__(self, text: str = "", status: int = 503) -> None:
        super().__init__(text)
        self.status = status


class Scripted:
    """A function whose calls end as told, one after the other; the last end stays."""

    def __init__(self, *ends: object) -> None:
        self.ends = ends
        self.calls = 0

    def __call__(self, argument: object) -> Any:  # noqa: ANN401 - whatever the test says
        end = self.ends[min(self.calls, len(self.ends) - 1)]
        self.calls += 1
        if isinstance(end, BaseException):
            raise end
        return end


def policy(**settings: Any) -> Retrying:  # noqa: ANN401 - tenacity's
    """Three attempts with no wait between them, for any exception, unless told otherwise."""
    return Retrying(**{"stop": stop_after_attempt(3), "wait": wait_none()} | settings)


def explode(*_: object, **__: object) -> Any:  # noqa: ANN401 - stands for any callback
    raise LookupError("a policy's own mistake")


def refuse_results(**settings: Any) -> Retrying:  # noqa: ANN401 - tenacity's
    return policy(retry=retry_if_result(lambda result: result == "refused"), **settings)


def raise_outcome(state: RetryCallState) -> None:
    assert state.outcome is not None
    state.outcome.result()


@pytest.fixture
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostage.failing.retry.FIRST_WAIT", 0.0)


# --- how often


@pytest.mark.usefixtures("_no_wait")
@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_int_is_the_number_of_attempts_in_all(attempts: int) -> None:
    for fails_first in (True, False):
        fails = Scripted(ApiError())
        stages = (fails, str) if fails_first else (str, fails)
        with pytest.raises(ApiError):
            run_two_stage(["item"], *stages, retry=attempts)
        assert fails.calls == attempts


@pytest.mark.usefixtures("_no_wait")
def test_default_is_ten_attempts_for_transient_failures() -> None:
    transient, lasting = Scripted(ApiError()), Scripted(ApiError(status=404))
    for fetch in (transient, lasting):
        with pytest.raises(ApiError):
            run_two_stage(["item"], str, fetch)
    assert (transient.calls, lasting.calls) == (10, 1)


def test_default_waits_grow_up_to_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)  # full jitter, at its longest
    judge, call, waits = Judge(default_policy()), Outcome[str, str, str](0, "item"), []
    for call.attempts in range(1, 10):
        verdict = judge.judge(call, End(None, ApiError(), 100.0))
        assert isinstance(verdict, Retry)
        waits.append(round(verdict.due - 100.0, 3))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0]


def test_none_is_one_attempt() -> None:
    fetch = Scripted(ApiError())
    with pytest.raises(ApiError):
        run_two_stage(["item"], str, fetch, retry=None)
    assert fetch.calls == 1


def test_policy_of_a_stage_goes_before_the_job_s() -> None:
    first, second = Scripted(ApiError(), "token"), Scripted(ApiError())
    with pytest.raises(ApiError):
        run_two_stage(["item"], first, Stage(second, retry=None), retry=policy())
    assert (first.calls, second.calls) == (2, 1)


def test_outcome_counts_the_attempts_of_each_stage() -> None:
    first, second = Scripted(ApiError(), "token"), Scripted(ApiError(), ApiError(), "result")
    with iter_two_stage(["item"], first, second, retry=policy()) as outcomes:
        outcome = next(outcomes)
    assert (outcome.result, outcome.token_attempts, outcome.result_attempts) == ("result", 2, 3)


def test_stop_after_delay_counts_from_the_start_of_the_first_attempt() -> None:
    judge = Judge(Retrying(stop=stop_after_delay(5), wait=wait_fixed(1)))
    call, error = Outcome[str, str, str](0, "item"), ApiError()
    ends = []
    for call.attempts, (call.began, end) in enumerate([(100.0, 103.0), (104.0, 104.9), (105.9, 106.0)], 1):
        ends.append(judge.judge(call, End(None, error, end)))
    assert ends == [Retry(104.0), Retry(105.9), Fail(error)]


def test_disabled_policy_neither_tries_again_nor_judges_results() -> None:
    fetch = Scripted(ApiError())
    with pytest.raises(ApiError):
        run_two_stage(["item"], str, fetch, retry=policy(enabled=False))
    assert fetch.calls == 1
    assert run_two_stage(["item"], str, Scripted("refused"), retry=refuse_results(enabled=False)) == [
        "refused"
    ]


# --- policies that judge results


def test_refused_result_is_asked_for_again() -> None:
    fetch = Scripted("refused", "refused", "result")
    assert run_two_stage(["item"], str, fetch, retry=refuse_results()) == ["result"]
    assert fetch.calls == 3


@pytest.mark.parametrize("reraise", [False, True])
def test_result_refused_for_good_is_a_retry_error(*, reraise: bool) -> None:
    fetch = Scripted("refused")
    with pytest.raises(RetryError) as raised:
        run_two_stage(["item"], str, fetch, retry=refuse_results(reraise=reraise))
    assert raised.value.last_attempt.result() == "refused"
    assert fetch.calls == 3
    [error] = run_two_stage(["item"], str, fetch, retry=refuse_results(), return_exceptions=True)
    assert isinstance(error, RetryError)


def test_policy_s_own_retry_error_class_is_raised_for_results_only() -> None:
    class GivenUpError(RetryError):
        pass

    with pytest.raises(GivenUpError):
        run_two_stage(["item"], str, Scripted("refused"), retry=refuse_results(retry_error_cls=GivenUpError))
    with pytest.raises(ApiError):
        run_two_stage(["item"], str, Scripted(ApiError()), retry=policy(retry_error_cls=GivenUpError))


@pytest.mark.parametrize(
    "retry",
    [
        retry_unless_exception_type(KeyError),
        retry_if_not_exception_message(message="never"),
        retry_any(retry_if_exception_type(KeyError), retry_if_result(lambda _: True)),
        lambda _: True,
    ],
)
def test_policy_that_may_refuse_a_success_sees_each(retry: Callable[[RetryCallState], bool]) -> None:
    fetch = Scripted("result")
    with pytest.raises(RetryError):
        run_two_stage(["item"], str, Stage(fetch, retry=policy(retry=retry)))
    assert fetch.calls == 3


@pytest.mark.parametrize(
    "retry",
    [
        retry_never,
        retry_if_exception(lambda _: True),
        retry_any(retry_if_exception_type(KeyError), retry_if_exception(lambda _: True)),
        None,
    ],
)
def test_success_does_not_meet_a_policy_for_exceptions(
    retry: tenacity.retry_base | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retrying, "iter", explode)
    chosen = 10 if retry is None else policy(retry=retry)
    assert run_two_stage(["a", "b"], str.upper, str.lower, retry=chosen) == ["a", "b"]
    with pytest.raises(LookupError):  # but a failure does
        run_two_stage(["item"], str, Scripted(ApiError()), retry=chosen)


def test_result_policy_of_stage_one_sees_each_token_of_a_batch() -> None:
    seen: list[str] = []

    def refuse(token: str) -> bool:
        seen.append(token)
        return len(seen) == 1

    fetch_tokens: Stage[str, str] = Stage(list, batch_size=2, retry=policy(retry=retry_if_result(refuse)))
    assert run_two_stage("ab", fetch_tokens, str.upper) == ["A", "B"]
    assert seen == ["a", "b", "a"]


# --- what a policy calls


@pytest.mark.parametrize("value", ["a value", None])
def test_callback_s_value_is_the_result_or_the_token(value: object) -> None:
    gives = policy(retry_error_callback=lambda _: value)
    assert run_two_stage(["item"], str, Scripted(ApiError()), retry=gives) == [value]
    assert run_two_stage(["item"], Scripted(ApiError()), lambda token: token, retry=gives) == [value]
    refused = refuse_results(retry_error_callback=lambda _: value)
    assert run_two_stage(["item"], str, Scripted("refused"), retry=refused) == [value]


def test_callback_s_value_is_checked_like_a_batch_s_answer() -> None:
    batch: Stage[str, str] = Stage(
        Scripted(ApiError()), batch_size=2, retry=policy(retry_error_callback=lambda _: ["x", "y"])
    )
    assert run_two_stage("ab", batch, str.upper) == ["X", "Y"]
    with pytest.raises(BatchLengthError):
        run_two_stage("a", batch, str)


def test_callback_that_raises_the_failure_again_fails_the_item() -> None:
    error = ApiError()
    again = policy(retry_error_callback=raise_outcome)
    assert run_two_stage(["item"], str, Scripted(error), retry=again, return_exceptions=True) == [error]
    assert error.__notes__ == ["twostage: stage two, 'item', 3 attempts"]


def test_before_sleep_and_after_are_called_with_the_attempt_s_number() -> None:
    slept: list[tuple[int, float | None]] = []
    after: list[int] = []
    retry = policy(
        before_sleep=lambda state: slept.append((state.attempt_number, state.upcoming_sleep)),
        after=lambda state: after.append(state.attempt_number),
    )
    with pytest.raises(ApiError):
        run_two_stage(["item"], str, Scripted(ApiError()), retry=retry)
    assert slept == [(1, 0.0), (2, 0.0)]
    assert after == [1, 2, 3]


def test_neither_sleep_nor_before_is_called() -> None:
    retry = policy(sleep=explode, before=explode)
    assert run_two_stage(["item"], str, Scripted(ApiError(), "result"), retry=retry) == ["result"]


def test_try_again_goes_before_the_predicate() -> None:
    fetch = Scripted(TryAgain(), "result")
    assert run_two_stage(["item"], str, fetch, retry=policy(retry=retry_never)) == ["result"]


@pytest.mark.parametrize("reraise", [False, True])
def test_what_is_behind_a_try_again_is_the_failure(*, reraise: bool) -> None:
    cause = ApiError()

    def fetch(_: str) -> str:
        try:
            raise cause
        except ApiError as error:
            raise TryAgain from error

    retry = policy(reraise=reraise)
    assert run_two_stage(["item"], str, fetch, retry=retry, return_exceptions=True) == [cause]
    assert cause.__notes__ == ["twostage: stage two, 'item', 3 attempts"]
    with pytest.raises(TryAgain):  # with nothing behind it
        run_two_stage(["item"], str, Scripted(TryAgain()), retry=retry)


# --- a broken policy ends the job


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("part", ["retry", "stop", "wait", "after", "before_sleep"])
def test_policy_that_raises_ends_the_job_as_that_error(part: str, *, return_exceptions: bool) -> None:
    fetch = Scripted(ApiError())
    stage = Stage(fetch, retry=policy(**{part: explode}))
    with pytest.raises(LookupError, match="own mistake"):
        run_two_stage(["item"], str, stage, return_exceptions=return_exceptions)
    assert fetch.calls == 1


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_callback_that_raises_another_error_ends_the_job_as_that(*, return_exceptions: bool) -> None:
    retry = policy(retry_error_callback=explode)
    with pytest.raises(LookupError, match="own mistake"):
        run_two_stage(["item"], str, Scripted(ApiError()), retry=retry, return_exceptions=return_exceptions)


def test_exit_by_a_policy_ends_the_job() -> None:
    def leave(_: RetryCallState) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_two_stage(
            ["item"], str, Scripted(ApiError()), retry=policy(before_sleep=leave), return_exceptions=True
        )


@pytest.mark.parametrize(
    "wait", [None, "soon", timedelta(seconds=1), object(), float("nan")], ids=lambda wait: type(wait).__name__
)
@pytest.mark.parametrize("return_exceptions", [False, True])
def test_wait_that_is_no_number_ends_the_job(wait: object, *, return_exceptions: bool) -> None:
    fetch = Scripted(ApiError())
    with pytest.raises((TypeError, ValueError)):
        run_two_stage(
            ["item"], str, fetch, retry=policy(wait=lambda _: wait), return_exceptions=return_exceptions
        )
    assert fetch.calls == 1


# --- policies belong to the user


def test_two_jobs_share_a_policy_and_no_state() -> None:
    retry = policy()
    together = threading.Barrier(2)

    def job(name: str) -> list[tuple[int, Exception]]:
        attempts = 0

        def fetch(_: str) -> str:
            nonlocal attempts
            attempts += 1
            together.wait(10)  # the other job's attempt of the same number
            raise ApiError(name)

        [error] = run_two_stage([name], str, fetch, retry=retry, return_exceptions=True)
        assert isinstance(error, Exception)
        return [(attempts, error)]

    with ThreadPoolExecutor(2) as threads:
        [(first, first_error)], [(second, second_error)] = threads.map(job, ["a", "b"])
    assert (first, second) == (3, 3)
    assert [str(first_error), str(second_error)] == ["a", "b"]


def test_policy_given_is_left_as_it_was() -> None:
    retry = policy()
    before = dict(vars(retry))
    call = Outcome[str, str, str](0, "item")
    call.attempts = 1
    assert isinstance(Judge(retry).judge(call, End(None, ApiError(), 0.0)), Retry)
    assert vars(retry) == before
    assert vars(retry._local) == {}


# --- what is logged


def test_each_retry_is_logged_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "twostage")
    first = Scripted(ApiError("secret text"), ApiError("secret text", 429), "secret token")
    second = Scripted(ValueError("secret text"), "secret result", "result")
    retry = policy(
        retry=retry_if_exception(lambda _: True) | retry_if_result(lambda one: one == "secret result")
    )
    assert run_two_stage(["item"], first, second, retry=retry) == ["result"]
    assert {(record.name, record.levelname) for record in caplog.records} == {("twostage", "INFO")}
    expected = [
        "stage one, 'item': attempt 1 failed with ApiError, status 503;",
        "stage one, 'item': attempt 2 failed with ApiError, status 429;",
        "stage two, 'item': attempt 1 failed with ValueError;",
        "stage two, 'item': attempt 2 was refused by the retry policy;",
    ]
    for message, start in zip(caplog.messages[1:-1], expected, strict=True):  # not the job's begin and end
        assert message.startswith(start)
    assert "secret" not in caplog.text


def test_job_without_retries_logs_its_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run_two_stage(["item"], str, Scripted(ApiError()), retry=None, return_exceptions=True)
    assert [message.partition(" ")[0] for message in caplog.messages] == ["a", "the"]
    assert caplog.messages[1].endswith("1 items done, 1 of them failed")


# --- the exception that reaches the user


@pytest.mark.parametrize(
    ("items", "stages", "note"),
    [
        ("a", (Scripted(KeyError()), str), "twostage: stage one, 'a', 1 attempt"),
        ("a", (str, Scripted(KeyError())), "twostage: stage two, 'a', 1 attempt"),
        (
            "abc",
            (Stage(Scripted(KeyError()), batch_size=9), str),
            "twostage: stage one, 3 items from 'a', 1 attempt",
        ),
        ("a", (Stage(Scripted(KeyError()), retry=policy()), str), "twostage: stage one, 'a', 3 attempts"),
    ],
)
def test_failure_has_one_note_of_stage_item_and_attempts(
    items: str, stages: tuple[Any, Any], note: str
) -> None:
    for _ in range(2):  # the second time the function raises the same object
        with pytest.raises(KeyError) as raised:
            run_two_stage(items, *stages)
        assert raised.value.__notes__ == [note]


def test_failure_of_a_batch_is_one_object_with_one_note() -> None:
    errors = run_two_stage("abc", Scripted(ApiError()), str, batch_size=3, retry=None, return_exceptions=True)
    assert len(errors) == 3
    assert len(set(map(id, errors))) == 1
    assert isinstance(errors[0], ApiError)
    assert errors[0].__notes__ == ["twostage: stage one, 3 items from 'a', 1 attempt"]


def test_note_is_short_and_holds_neither_token_nor_result() -> None:
    error = KeyError()
    error.add_note("the user's")
    with pytest.raises(KeyError):
        run_two_stage(["x" * 1000], Scripted("secret"), Scripted(error), retry=None)
    user_s, ours = error.__notes__
    assert user_s == "the user's"
    assert len(ours) < 100
    assert "secret" not in ours


@dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses attributes, a note and a traceback's assignment among them."""

    reason: str


@pytest.mark.parametrize("retry", [None, 1, policy(retry=retry_never), policy()])
def test_exception_that_refuses_notes_is_raised_without(retry: Retrying | int | None) -> None:
    error = FrozenError("frozen")
    with pytest.raises(FrozenError) as raised:
        run_two_stage(["item"], str, Scripted(error), retry=retry)
    assert raised.value is error
    assert not hasattr(error, "__notes__")
    assert run_two_stage(["item"], str, Scripted(error), retry=retry, return_exceptions=True) == [error]


each_end = pytest.mark.parametrize(
    "retry",
    [
        None,
        1,
        policy(retry=retry_never),
        policy(),
        policy(reraise=True),
        policy(retry_error_callback=raise_outcome),
    ],
    ids=["no policy", "default", "never", "gives up", "reraise", "callback"],
)


@each_end
def test_traceback_is_the_user_s_with_one_frame_of_ours(retry: Retrying | int | None) -> None:
    def fetch(_: str) -> str:
        raise ValueError

    def job() -> None:
        run_two_stage(["item"], str, fetch, retry=retry)

    with pytest.raises(ValueError) as raised:  # noqa: PT011 - its frames are looked at
        job()
    assert frames(raised.value)[1:] == ["job", "run_two_stage", "fetch"]
    with iter_two_stage(["item"], str, fetch, retry=retry) as outcomes, pytest.raises(ValueError) as raised:  # noqa: PT011
        next(outcomes)
    assert frames(raised.value)[1:] == ["__next__", "fetch"]


@each_end
def test_retry_error_of_the_user_s_own_keeps_its_traceback(retry: Retrying | int | None) -> None:
    def fetch(_: str) -> str:
        raise RetryError(tenacity.Future(1))  # as a client does that uses tenacity inside

    [error] = run_two_stage(["item"], str, fetch, retry=retry, return_exceptions=True)
    assert isinstance(error, RetryError)
    assert frames(error) == ["fetch"]


class Refused:
    """A result that a policy refuses."""


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize(
    "retry",
    [None, policy(), policy(reraise=True), policy(retry=retry_if_result(lambda _: True))],
    ids=["no policy", "gives up", "reraise", "refused result"],
)
def test_failure_is_no_reference_cycle(retry: Retrying | None, *, return_exceptions: bool) -> None:
    objects: list[weakref.ref[object]] = []

    def fetch(_: str) -> Refused:
        if retry is None or not isinstance(retry.retry, retry_if_result):
            raise ApiError
        result = Refused()
        objects.append(weakref.ref(result))
        return result

    def job() -> None:
        try:
            stage = Stage(fetch, retry=retry)
            [error] = run_two_stage(["item"], str, stage, return_exceptions=return_exceptions)
            assert isinstance(error, ApiError | RetryError)
            objects.append(weakref.ref(error))
        except (ApiError, RetryError) as error:
            objects.append(weakref.ref(error))

    with nothing_collected():
        job()
        assert objects
        assert [one() for one in objects] == [None] * len(objects)


# --- policies that can't work, or hardly


async def coroutine_function(_: object) -> bool:
    return True


decide: Any = coroutine_function  # mypy would refuse it as well


class Decider:
    """Decides in a coroutine, which a look at the object alone would not show."""

    async def __call__(self, _: object) -> bool:
        return True


decider: Any = Decider()


@pytest.mark.parametrize(
    ("retry", "message"),
    [
        (AsyncRetrying(stop=stop_after_attempt(3)), "AsyncRetrying.* pass a Retrying instead"),
        (policy(retry=decide), "coroutine function as its retry"),
        (policy(retry=decider), "coroutine function as its retry"),
        (policy(retry=retry_if_exception(decide)), "coroutine function as its retry"),
        (policy(retry=retry_any(retry_never, decider)), "coroutine function as its retry"),
        (policy(retry=retry_never | retry_if_result(decide)), "coroutine function as its retry"),
        (policy(retry=tenacity.asyncio.retry_if_exception(decide)), "coroutine function as its retry"),
        (policy(stop=decide), "coroutine function as its stop"),
        (policy(wait=decide), "coroutine function as its wait"),
        (policy(after=decide), "coroutine function as its after"),
        (policy(before_sleep=decide), "coroutine function as its before_sleep"),
        (policy(retry_error_callback=decide), "coroutine function as its retry_error_callback"),
        (stop_after_attempt(3), "expected a tenacity Retrying, a number of attempts, or None"),
        ("3", "expected a tenacity Retrying"),
        (2.0, "expected a tenacity Retrying"),
        (True, "retry is True; expected a tenacity Retrying"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policy_of_the_wrong_kind_is_a_type_error_before_any_call(retry: Any, message: str) -> None:  # noqa: ANN401
    fetch = Scripted("token")
    with pytest.raises(TypeError, match=message):
        run_two_stage(["item"], fetch, fetch, retry=retry)
    with pytest.raises(TypeError, match=message):
        iter_two_stage(["item"], fetch, fetch, retry=retry)
    with pytest.raises(TypeError, match=message):
        Stage(fetch, retry=retry)
    assert fetch.calls == 0


@pytest.mark.parametrize("attempts", [0, -1])
def test_number_of_attempts_below_one_is_a_value_error(attempts: int) -> None:
    with pytest.raises(ValueError, match=f"retry is {attempts}; expected at least 1 attempt"):
        run_two_stage(["item"], explode, explode, retry=attempts)


def the_line_warned_at(caught: pytest.WarningsRecorder) -> str:
    [warning] = caught
    return linecache.getline(warning.filename, warning.lineno).strip()


def test_policy_without_a_stop_is_warned_of_at_the_caller_s_line() -> None:
    endless = Retrying()
    with pytest.warns(UserWarning, match="retry has no stop") as caught:
        run_two_stage([], str, str, retry=endless)
    assert the_line_warned_at(caught) == "run_two_stage([], str, str, retry=endless)"
    with pytest.warns(UserWarning, match="retry has no stop") as caught:
        iter_two_stage([], str, str, retry=endless).close()
    assert the_line_warned_at(caught) == "iter_two_stage([], str, str, retry=endless).close()"
    with pytest.warns(UserWarning, match="retry has no stop") as caught:
        Stage(str, retry=endless)
    assert the_line_warned_at(caught) == "Stage(str, retry=endless)"


def test_function_already_under_retry_is_warned_of_at_the_caller_s_line() -> None:
    fetch = tenacity.retry(stop=stop_after_attempt(2))(Scripted("result"))
    with pytest.warns(UserWarning, match="is already under tenacity's @retry") as caught:
        assert run_two_stage(["item"], str, fetch) == ["result"]
    assert the_line_warned_at(caught) == 'assert run_two_stage(["item"], str, fetch) == ["result"]'
    with pytest.warns(UserWarning, match="is already under tenacity's @retry") as caught:
        Stage(fetch)
    assert the_line_warned_at(caught) == "Stage(fetch)"


def test_result_that_the_policy_would_refuse_is_no_outcome_while_the_job_ends() -> None:
    begun, ending = threading.Event(), threading.Event()

    def fetch(item: str) -> str:
        if item == "fails":
            assert begun.wait(10)
            raise ValueError
        begun.set()
        assert ending.wait(10)
        return "refused"

    stage = Stage(fetch, retry=refuse_results())
    with iter_two_stage(["waits", "fails"], str, stage, ordered=True) as outcomes:
        coordinator = books(outcomes)
        end = coordinator.end

        def end_and_tell(error: BaseException | None) -> None:
            end(error)
            ending.set()

        coordinator.end = end_and_tell  # type: ignore[method-assign]
        with pytest.raises(ValueError):  # noqa: PT011 - it has no text
            next(outcomes)


class Unprintable:
    def __repr__(self) -> str:
        raise AttributeError("no name")


@pytest.mark.parametrize(
    ("item", "name"), [(Unprintable(), "<Unprintable"), (10**5000, "<int")], ids=["class", "int"]
)
def test_item_whose_repr_fails_does_not_hide_the_failure(item: object, name: str) -> None:
    [error] = run_two_stage([item], str_of_type, Scripted(KeyError()), return_exceptions=True)
    assert isinstance(error, KeyError)
    assert name in error.__notes__[0]


def str_of_type(item: object) -> str:
    return type(item).__name__
