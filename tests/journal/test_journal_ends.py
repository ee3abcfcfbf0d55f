"""A journal and the ends of a job: what is recorded then, what is not taken for an answer, what is let go."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from concurrent.futures import CancelledError, Executor, Future
from typing import TYPE_CHECKING, Any

import pytest
from common import AT_ONCE, goes_on, ours, until
from forms import each_way, run
from tenacity import (
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    wait_fixed,
)

from twostage import (
    Journal,
    JournalError,
    RecordedFailure,
    Stage,
    TooManyFailures,
    aiter_two_stage,
    iter_two_stage,
)
from twostage.core.coordinator import Coordinator
from twostage.journal.recorder import Recorder
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forms import Run

UNAUTHORIZED = 401

# --- what is recorded as a job ends


@pytest.mark.parametrize("batched", [False, True])
def test_answer_that_a_policy_has_let_pass_is_recorded_while_a_job_ends(path: Path, *, batched: bool) -> None:
    """Also if the policy looks at results; what it would have asked for again is not."""

    def fetch(tokens: Any) -> Any:  # noqa: ANN401 - of one or several
        sleep(1 if "bad" in tokens else 5)
        if "bad" in tokens:
            raise LookupError
        return [token.upper() for token in tokens] if batched else tokens.upper()

    retry = Retrying(retry=retry_if_result(lambda result: result == "B"), stop=stop_after_attempt(9))
    second: Any = Stage(fetch, batch_size=1) if batched else fetch
    with VirtualTime(), pytest.raises(LookupError):
        run([*"abc", "bad"], str, second, retry=retry, journal=path)
    assert {record.item for record in Journal(path) if record.is_done} == {"a", "c"}


def test_what_ends_in_threads_is_recorded_though_the_caller_s_loop_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes, closed = threading.Event(), threading.Event()
    monkeypatch.setattr(Coordinator, "close", lambda *_: closed.set())

    def fetch_result(token: str) -> str:
        goes.set()
        assert closed.wait(20)
        return token

    async def leave() -> Any:  # noqa: ANN401 - kept, or it would be closed
        outcomes = aiter_two_stage(["a"], str, fetch_result, journal=path)
        waiting = asyncio.ensure_future(anext(outcomes))
        await asyncio.to_thread(goes.wait, 20)
        return outcomes, waiting

    loop = asyncio.new_event_loop()
    kept = loop.run_until_complete(leave())
    loop.close()
    until(lambda: not goes_on())
    assert [record.is_done for record in Journal(path)] == [True]
    del kept


@pytest.mark.parametrize("stage", [1, 2])
def test_value_that_can_not_be_recorded_costs_no_other_of_its_batch(path: Path, stage: int) -> None:
    def give(arguments: list[str]) -> list[Any]:
        return [object() if argument == "b" else argument for argument in arguments]

    first = Stage[str, Any](give if stage == 1 else list, batch_size=5)
    second = Stage[Any, Any](list if stage == 1 else give, batch_size=5)
    with pytest.raises(
        TypeError, match=r"of item 'b' is or has what JSON can't say, and would not come back"
    ):
        run("abcde", first, second, journal=path)
    records = {record.item: record for record in Journal(path)}
    assert {item for item, one in records.items() if one.token is not None} >= set("acde")
    assert stage == 1 or {item for item, one in records.items() if one.is_done} == set("acde")


def test_list_that_can_not_be_recorded_costs_no_other_of_its_batch(path: Path) -> None:
    def give(items: list[str]) -> list[list[Any]]:
        return [[object()] if item == "b" else [item, item] for item in items]

    with pytest.raises(TypeError, match="the token of item 'b'"):
        run("abc", give, str, batch_size=3, many=True, journal=path)
    assert {record.item for record in Journal(path)} == {"a", "c"}


class Broken:
    """Makes the commits of journals fail from one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing = False
        commit = Recorder.commit

        def fail(recorder: Recorder) -> None:
            if self.failing:
                raise JournalError("the disk is full")
            commit(recorder)

        monkeypatch.setattr(Recorder, "commit", fail)


def test_outcomes_of_too_many_failures_are_recorded_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the last commit fails there is another error already, so a warning tells of it."""
    broken = Broken(monkeypatch)

    def fetch_results(tokens: list[str]) -> list[Any]:
        broken.failing = "e" in tokens
        return [LookupError() if token in "de" else token for token in tokens]  # noqa: S105 - none

    with pytest.raises(TooManyFailures) as caught, caplog.at_level(logging.WARNING, "twostage"):
        run(
            "abcfde",
            list,
            Stage(fetch_results, batch_size=3, workers=1),
            batch_size=6,
            retry=None,
            return_exceptions=True,
            max_failures=1,
            journal=path,
        )
    assert [outcome.item for outcome in caught.value.outcomes] == ["a", "b", "c"]
    assert "what the job's last calls gave is not recorded: the disk is full" in caplog.text


# --- what is no answer, and is asked for again even if lasting failures are not


class Cancelling(Executor):
    """Begins nothing, as one that is shut down with `cancel_futures`."""

    def submit(self, *_: object, **__: object) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def kept(path: Path) -> Journal:
    return Journal(path, job="letters", retry_failed=False)


def test_cancellation_is_no_answer(path: Path) -> None:
    settings: dict[str, Any] = {"journal": kept(path), "retry": None, "return_exceptions": True}
    (first,) = run("a", str, Stage(str.upper, executor=Cancelling()), **settings)
    assert isinstance(first, CancelledError)
    assert run("a", str, str.upper, **settings) == ["A"]


@pytest.mark.parametrize("cut", ["by the timeout", "by the policy's stop"])
def test_failure_that_was_to_be_tried_again_is_no_answer(path: Path, cut: str) -> None:
    policy = Retrying(
        retry=retry_if_exception_type(LookupError),
        stop=stop_after_attempt(3 if cut == "by the policy's stop" else 99),
        wait=wait_fixed(10),
    )
    failing = {"a": LookupError(), "b": ValueError()}

    def fetch_result(token: str) -> str:
        if failing:
            raise failing[token]
        return token

    settings: dict[str, Any] = {"journal": kept(path), "retry": policy, "return_exceptions": True}
    with VirtualTime():
        results = run("ab", str, fetch_result, timeout=25 if cut == "by the timeout" else None, **settings)
        assert [type(result) for result in results] == [LookupError, ValueError]
        failing.clear()
        results = run("ab", str, fetch_result, **settings)
    assert results[0] == "a"
    assert isinstance(results[1], RecordedFailure)


def test_token_is_no_good_any_more_once_a_new_one_was_asked_for(path: Path) -> None:
    calls: Counter[str] = Counter()

    def fetch_token(item: str) -> str:
        calls[item] += 1
        if calls[item] == 2:
            raise LookupError
        return f"token {calls[item]}"

    def fetch_result(token: str) -> str:
        if token == "token 1":  # noqa: S105 - none
            raise ApiError(UNAUTHORIZED)
        return token

    settings: dict[str, Any] = {"refresh_token_on": ApiError, "retry": AT_ONCE, "journal": path}
    with pytest.raises(LookupError):
        run("a", fetch_token, fetch_result, **settings)
    assert [record.token for record in Journal(path)] == [None]
    assert run("a", fetch_token, fetch_result, **settings) == ["token 3"]


def test_failure_at_stage_one_leaves_no_row_of_an_older_list(path: Path) -> None:
    journal = Journal(path, job="orders", token_ttl=1e-9)
    answers: dict[str, Callable[[], list[str]]] = {"a": lambda: ["x", "y", "bad"]}

    def fetch_result(token: str) -> str:
        if token == "bad":  # noqa: S105 - none
            raise LookupError
        return token

    def once() -> Any:  # noqa: ANN401 - the one result
        return run(
            "a",
            lambda item: answers[item](),
            fetch_result,
            many=True,
            retry=None,
            return_exceptions=True,
            journal=journal,
        )[0]

    once()
    answers.clear()
    assert isinstance(once(), KeyError)
    ((place, stage),) = ((one.place, one.stage) for one in journal.failures())
    assert (place, stage) == (None, 1)
    assert len(list(journal)) == 1
    answers["a"] = lambda: ["x", "y"]
    assert once() == ["x", "y"]


# --- equal items


@pytest.mark.parametrize("lacking", ["a failure in a list", "a policy's answer"])
def test_equal_items_are_one_call_though_the_journal_lacks_some_of_it(path: Path, lacking: str) -> None:
    asked: Counter[str] = Counter()
    instead = Retrying(stop=stop_after_attempt(1), retry_error_callback=lambda _: "instead")

    def fetch_result(token: str) -> str:
        asked[token] += 1
        if token == "bad":  # noqa: S105 - none
            raise LookupError
        return token

    many = lacking == "a failure in a list"
    results = run(
        ["bad", *map(str, range(2000)), "bad"],
        (lambda item: [item]) if many else str,
        fetch_result,
        many=many,
        retry=None if many else instead,
        return_exceptions=True,
        journal=path,
    )
    assert asked["bad"] == 1
    assert results[0] == results[-1]


# --- what is let go


@each_way
def test_interrupt_between_opening_and_beginning_leaves_the_journal_free(
    path: Path, job: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Recorder.open

    def interrupt(recorder: Recorder) -> None:
        opening(recorder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "open", interrupt)
        with pytest.raises(KeyboardInterrupt) as held:
            job("ab", str, str.upper, journal=path)
    assert job("ab", str, str.upper, journal=path) == ["A", "B"]
    del held


def test_interrupt_while_the_thread_starts_takes_the_journal_from_no_job(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, close = threading.Thread.start, Recorder.close
    closed_under_it: list[bool] = []

    def look(recorder: Recorder) -> None:
        closed_under_it.append(goes_on() and threading.current_thread() is threading.main_thread())
        close(recorder)

    def interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "twostage-coordinator":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupt)
        patch.setattr(Recorder, "close", look)
        with pytest.raises(KeyboardInterrupt), iter_two_stage("ab", str, str.upper, journal=path) as outcomes:
            next(outcomes)
    assert not ours()
    assert closed_under_it
    assert not any(closed_under_it)
    assert run("ab", str, str.upper, journal=path) == ["A", "B"]
