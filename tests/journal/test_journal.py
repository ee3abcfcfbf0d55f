"""What a journal records, and what a later run makes of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS, AT_ONCE, part
from forms import each_way, iterate, run
from journals import Api, results_of
from tenacity import RetryError, Retrying, retry_if_result, stop_after_attempt

from twostage import (
    Journal,
    RecordedFailure,
    RunTimeout,
    Stage,
    TooManyFailures,
    aiter_two_stage,
    arun_two_stage,
    iter_two_stage,
    run_two_stage,
)
from twostage.__main__ import main
from twostage.core.coordinator import LEAST_IN_PROGRESS
from twostage.journal import recorder as recorder_module
from twostage.journal.recording import Recording
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from forms import Run

NOT_FOUND = 404
UNAVAILABLE = 503
UNAUTHORIZED = 401


# --- what is recorded is not asked for again


@each_way
def test_second_run_makes_the_missing_calls_alone(path: Path, job: Run) -> None:
    first, second = Api(), Api()
    assert first.run(range(100), job, journal=path) == results_of(range(100))
    assert second.run(range(120), job, journal=path) == results_of(range(120))
    assert sorted(second.items) == list(range(100, 120))
    assert len(second.tokens) == 20


@each_way
def test_stage_two_goes_on_where_stage_one_was_done(path: Path, job: Run) -> None:
    broken = Api(token={f"token {item}": LookupError() for item in range(100)})
    broken.run(range(100), job, journal=path, return_exceptions=True)
    api = Api()
    assert api.run(range(100), job, journal=path) == results_of(range(100))
    assert (len(api.items), len(api.tokens)) == (0, 100)


def test_outcomes_from_the_journal_have_all_but_attempts(path: Path) -> None:
    for attempts in (1, 0):
        with iter_two_stage(
            "ab", Api().fetch_token, Api().fetch_result, journal=path, ordered=True
        ) as outcomes:
            found = [
                (one.index, one.item, one.token, one.result, one.token_attempts, one.result_attempts)
                for one in outcomes
            ]
        assert found == [
            (index, item, f"token {item}", {"of": f"token {item}"}, attempts, attempts)
            for index, item in enumerate("ab")
        ]


def test_recorded_items_take_no_place_in_a_batch(path: Path) -> None:
    done = [item for item in range(1000) if item % 5]
    journal = Journal(path, job="words")
    Api().run(done, journal=journal)
    api = Api()
    job = {"batch_size": 50, "token_workers": 2, "journal": journal}
    assert run(range(1000), api.fetch_tokens, api.fetch_result, **job) == results_of(range(1000))
    assert api.batches == [50] * 4


@pytest.mark.parametrize("settings", [{}, {"ordered": True}, {"batch_size": 10}], ids=str)
def test_items_that_go_on_are_bounded_by_the_window(path: Path, settings: dict[str, Any]) -> None:
    """A consumer that stands still does not have all of a journal read."""
    items = 1500
    broken = Api(token={f"token {item}": LookupError() for item in range(items)})
    journal = Journal(path, job="words")
    broken.run(range(items), journal=journal, return_exceptions=True)
    read = 0

    def source() -> Any:  # noqa: ANN401 - a generator
        nonlocal read
        for read in range(1, items + 1):
            yield read - 1

    api = Api()
    fetch = api.fetch_tokens if "batch_size" in settings else api.fetch_token
    with (
        VirtualTime() as virtual,
        iter_two_stage(source(), fetch, api.fetch_result, journal=journal, **settings) as outcomes,
    ):
        next(outcomes)
        virtual.sleep(100)
        assert read < 1000
        assert sum(1 for _ in outcomes) == items - 1


def test_job_goes_on_recording_while_the_consumer_is_away(path: Path) -> None:
    api = SimulatedApi(str, latency=1)
    with VirtualTime() as virtual, iter_two_stage(range(1000), str, api, journal=path) as outcomes:
        next(outcomes)
        virtual.sleep(60)
        recording = part(outcomes, Recording)
        assert recording is not None
        recorder = recording._recorder
        assert recorder._file is not None
        query = "SELECT count(*) FROM answers WHERE result IS NOT NULL"
        assert recorder._file.connection.execute(query).fetchone()[0] >= LEAST_IN_PROGRESS


def test_nothing_is_handed_over_before_it_is_committed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed: set[str] = set()
    commit = recorder_module.Recorder.commit

    def note(self: recorder_module.Recorder) -> None:
        keys = [row[0] for row in self.collected._rows.results]
        commit(self)
        committed.update(keys)

    monkeypatch.setattr(recorder_module.Recorder, "commit", note)
    with iter_two_stage(range(500), str, str, journal=path) as outcomes:
        for outcome in outcomes:
            assert str(outcome.item) in committed


def test_one_commit_for_all_events_of_a_wake_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = 0
    commit = recorder_module.Recorder.commit

    def note(self: recorder_module.Recorder) -> None:
        nonlocal commits
        commits += bool(self.collected._rows.results or self.collected._rows.tokens)
        commit(self)

    monkeypatch.setattr(recorder_module.Recorder, "commit", note)
    api = SimulatedApi(str, latency=1)
    with VirtualTime():
        run_two_stage(range(100), str, api, result_workers=20, journal=path)
    assert commits <= 12  # five times twenty end at once; and the tokens


# --- tokens


def test_token_lives_as_long_as_was_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    journal = Journal(path, token_ttl=60)
    broken = Api(token={"token a": LookupError()})
    broken.run("a", journal=journal, return_exceptions=True)
    now += 59.9
    broken.run("a", journal=journal, return_exceptions=True)
    assert (broken.items["a"], broken.tokens["token a"]) == (1, 2)
    now += 0.2
    broken.run("a", journal=journal, return_exceptions=True)
    assert (broken.items["a"], broken.tokens["token a"]) == (2, 3)
    now += 59.9
    assert broken.run("a", journal=journal, return_exceptions=True)
    assert broken.items["a"] == 2
    now += 1000
    Api().run("a", journal=journal)
    now += 1000
    api = Api()
    assert api.run("a", journal=journal) == results_of("a")
    assert not api.items  # a result is for ever


def test_no_token_gets_into_the_file_if_it_is_not_to(path: Path) -> None:
    journal = Journal(path, tokens=False)
    broken = Api(token={"token a": LookupError()})
    broken.run("ab", job=iterate, journal=journal, return_exceptions=True)
    assert [record.token for record in journal] == [None, None]
    # The results have them here.
    assert path.read_bytes().count(b"token a") == 0
    api = Api()
    assert api.run("ab", journal=journal) == results_of("ab")
    assert api.items == {"a": 1}


def test_refreshed_token_replaces_the_old_one(path: Path) -> None:
    tokens = iter(["old", "new", "newer"])
    asked: list[str] = []

    def fetch_result(token: str) -> str:
        asked.append(token)
        raise ApiError(UNAUTHORIZED if token == "old" else UNAVAILABLE)  # noqa: S105 - none

    for _ in range(2):
        run(
            "a",
            lambda _: next(tokens),
            fetch_result,
            journal=path,
            refresh_token_on=lambda error: error.status == UNAUTHORIZED,
            retry=Retrying(stop=stop_after_attempt(1)),
            return_exceptions=True,
        )
        (record,) = Journal(path)
        assert record.token == "new"  # noqa: S105 - as above
    assert asked == ["old", "new", "new"]


def test_token_that_is_not_let_in_is_not_used_again(path: Path) -> None:
    broken = Api(token={"token a": ApiError(UNAUTHORIZED), "token b": ApiError(NOT_FOUND)})
    broken.run("ab", journal=path, return_exceptions=True)
    api = Api()
    api.run("ab", journal=path)
    assert api.items == {"a": 1}


# --- failures


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("retry_failed", [True, False])
def test_failures_are_asked_for_again_but_lasting_ones_if_they_are_not_to(
    path: Path, stage: int, *, retry_failed: bool
) -> None:
    lasting, passing = ApiError(NOT_FOUND), ApiError(UNAVAILABLE)
    failing: dict[str, dict[Any, Exception]] = (
        {"item": {"a": lasting, "b": passing}}
        if stage == 1
        else {"token": {"token a": lasting, "token b": passing}}
    )
    journal = Journal(path, retry_failed=retry_failed)
    assert Api(**failing).run("abc", journal=journal, return_exceptions=True)[:2] == [lasting, passing]
    api = Api()
    results = api.run("abc", journal=journal, return_exceptions=True)
    asked = api.items if stage == 1 else api.tokens
    assert asked.total() == (2 if retry_failed else 1)
    assert results[1:] == results_of("bc")
    if retry_failed:
        assert results[:1] == results_of("a")
        assert journal.failures() == []
        return
    failure = results[0]
    assert isinstance(failure, RecordedFailure)
    assert (failure.item, failure.place, failure.stage) == ("a", None, stage)
    assert (failure.type_name, failure.status, failure.text) == ("ApiError", NOT_FOUND, None)
    (recorded,) = journal.failures()
    assert recorded.args == failure.args
    with pytest.raises(
        RecordedFailure, match=r"^stage \w+ failed at [-0-9]+ [:0-9]+ UTC: ApiError, status 404$"
    ):
        api.run("abc", journal=journal)


def test_text_of_a_failure_is_recorded_on_request_only(path: Path) -> None:
    secret = "https://api.example/?token=secret"  # noqa: S105 - none
    for texts in (False, True):
        journal = Journal(path, texts=texts)
        broken = Api(item={"a": LookupError(secret), "b": LookupError("\ud800")})
        broken.run("ab", journal=journal, return_exceptions=True)
        assert (secret.encode() in path.read_bytes()) == texts
        assert [one.text for one in journal.failures()] == ([secret, "\\ud800"] if texts else [None, None])
        assert secret not in "".join(map(repr, journal.failures()))


def test_failure_that_ends_the_job_is_recorded_too(path: Path) -> None:
    with pytest.raises(LookupError):
        Api(item={"a": LookupError()}).run("a", journal=path)
    (failure,) = Journal(path).failures()
    assert failure.type_name == "LookupError"


def test_what_only_the_run_has_is_never_an_answer(path: Path) -> None:
    journal = Journal(path, retry_failed=False)
    with VirtualTime():
        slow = SimulatedApi(str, latency=10)
        results = run(
            range(40), str, slow, result_workers=1, timeout=25, journal=journal, return_exceptions=True
        )
    assert [isinstance(result, RunTimeout) for result in results].count(True) == 37
    assert journal.failures() == []
    with pytest.raises(TooManyFailures):
        run(
            range(100, 200),
            str,
            lambda _: 1 / 0,
            journal=Journal(path, job="str, SimulatedApi"),
            max_failures=3,
            return_exceptions=True,
        )
    assert {failure.type_name for failure in journal.failures()} == {"ZeroDivisionError"}


def test_answer_that_a_policy_has_refused_is_asked_for_again(path: Path) -> None:
    journal = Journal(path, retry_failed=False, job="ready")
    retry = Retrying(retry=retry_if_result(lambda result: result == "not ready"), stop=stop_after_attempt(2))
    answers = iter(["not ready", "not ready", "ready"])
    for failed in (True, False):
        (result,) = run(
            "a", str, lambda _: next(answers), retry=retry, journal=journal, return_exceptions=True
        )
        assert isinstance(result, RetryError) == failed


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("failing", ["item", "token"])
def test_what_a_policy_gives_in_an_answer_s_place_is_not_recorded(
    path: Path, failing: str, *, many: bool
) -> None:
    wraps: Callable[[Any], Any] = (lambda value: [value]) if many else (lambda value: value)
    retry = Retrying(stop=stop_after_attempt(1), retry_error_callback=lambda _: wraps("instead"))
    journal = Journal(path, job="letters")
    broken = Api()
    broken.failing[failing] = {"token a" if failing == "token" else "a": LookupError()}
    run(
        "ab",
        lambda item: wraps(broken.fetch_token(item)),
        broken.fetch_result,
        retry=retry,
        many=many,
        journal=journal,
    )
    records = {record.item: record for record in journal}
    assert (records["a"].token is None) == (failing == "item")
    assert records["a"].is_done == (failing == "item")
    assert records["b"].is_done


def test_retries_are_one_call(path: Path) -> None:
    fails = iter([True, True, False])

    def fetch_result(token: str) -> str:
        if next(fails):
            raise ApiError(UNAVAILABLE)
        return token

    for _ in range(2):
        assert run("a", str.upper, fetch_result, retry=AT_ONCE, journal=path) == ["A"]


# --- many


class Orders:
    """Items have as many tokens as they are."""

    def __init__(self, *failing: str) -> None:
        self.items: Counter[int] = Counter()
        self.tokens: Counter[str] = Counter()
        self.failing = failing

    def fetch_token(self, item: int) -> list[str]:
        self.items[item] += 1
        return [f"{item}/{place}" for place in range(item)]

    def fetch_result(self, token: str) -> str:
        self.tokens[token] += 1
        if token in self.failing:
            raise ApiError(NOT_FOUND)
        return token

    def run(self, job: Run, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
        settings = {"retry": None, "many": True, "return_exceptions": True, **settings}
        return job(range(5), self.fetch_token, self.fetch_result, **settings)


@each_way
def test_with_many_rows_are_one_a_token(path: Path, job: Run) -> None:
    right = [[f"{item}/{place}" for place in range(item)] for item in range(5)]
    results = Orders("2/1", "4/0").run(job, journal=path)
    assert [type(result) for result in results[2]] == [str, ApiError]
    assert len(Journal(path).failures()) == 2
    assert {(one.item, one.place) for one in Journal(path).failures()} == {(2, 1), (4, 0)}
    kept = Journal(path, retry_failed=False)
    again = Orders().run(job, journal=kept)
    assert [type(result) for result in again[2]] == [str, RecordedFailure]
    assert [type(result) for result in again[4]] == [RecordedFailure, str, str, str]
    assert again[:2] == right[:2]
    with pytest.raises(RecordedFailure):
        Orders().run(job, journal=kept, return_exceptions=False)
    orders = Orders()
    assert orders.run(job, journal=path) == right
    assert (orders.items, orders.tokens) == ({}, {"2/1": 1, "4/0": 1})
    assert [(one.item, one.place) for one in Journal(path) if one.is_done] == [
        (item, place if item else 0) for item in range(5) for place in range(max(item, 1))
    ]
    orders = Orders()
    assert orders.run(job, journal=path) == right
    assert (orders.items, orders.tokens) == ({}, {})


@pytest.mark.parametrize("retry_failed", [True, False])
def test_with_many_a_failure_at_stage_one_is_its_item_s(path: Path, *, retry_failed: bool) -> None:
    journal = Journal(path, job="orders", retry_failed=retry_failed)
    answers = iter(["not a list", LookupError(), ["x", "y"], ["z"]])

    def fetch_token(_: str) -> Any:  # noqa: ANN401 - wrong ones too
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    settings = {
        "many": True,
        "retry": None,
        "return_exceptions": True,
        "journal": journal,
        "token_workers": 1,
    }
    first = run("ab", fetch_token, str.upper, **settings)
    assert [type(result) for result in first] == [TypeError, LookupError]
    assert {(one.item, one.place, one.stage) for one in journal.failures()} == {
        ("a", None, 1),
        ("b", None, 1),
    }
    results = run("ab", fetch_token, str.upper, **settings)
    if retry_failed:
        assert results == [["X", "Y"], ["Z"]]
        assert journal.failures() == []
    else:
        assert [type(result) for result in results] == [RecordedFailure] * 2


@pytest.mark.timeout(20)
def test_tokens_that_fill_the_window_do_not_keep_back_an_item_before_them(path: Path) -> None:
    """In order they wait for it, and it would wait for room."""

    def leave(_: str) -> str:
        raise SystemExit

    def fetch_tokens(items: list[int]) -> list[list[str]]:
        return [[f"{item}/{place}" for place in range(5)] for item in items]

    journal = Journal(path, job="orders")
    with pytest.raises(SystemExit):
        run(range(1, 10), fetch_tokens, leave, batch_size=9, many=True, journal=journal)
    assert journal.recorded().tokens == 45
    settings: dict[str, Any] = {"batch_size": 5, "many": True, "window": 10, "ordered": True}
    with iter_two_stage(range(10), fetch_tokens, str.upper, journal=journal, **settings) as outcomes:
        assert [outcome.item for outcome in outcomes] == list(range(10))


def test_part_of_a_list_is_worth_nothing_without_its_tokens(path: Path) -> None:
    journal = Journal(path, tokens=False)
    Orders("4/0").run(run, journal=journal)
    assert all(record.token in (None, []) for record in journal)
    orders = Orders()
    assert orders.run(run, journal=journal)[4] == ["4/0", "4/1", "4/2", "4/3"]
    assert orders.items == {4: 1}
    assert orders.tokens.total() == 4


def test_item_that_begins_again_forgets_its_tokens(path: Path) -> None:
    lists = iter([["old", "x", "y"], ["new"]])

    def fetch_result(token: str) -> str:
        if token == "old":  # noqa: S105 - none
            raise ApiError(UNAUTHORIZED)
        return token

    for _ in range(2):
        assert run(
            ["a"],
            lambda _: next(lists),
            fetch_result,
            many=True,
            refresh_token_on=ApiError,
            journal=path,
            result_workers=1,
            retry=AT_ONCE,
        ) == [["new"]]
    assert [(record.place, record.token, record.result) for record in Journal(path)] == [(0, "new", "new")]


# --- ends


@pytest.mark.parametrize("batch_size", [None, 4])
def test_what_finishes_while_a_job_ends_is_recorded(path: Path, batch_size: int | None) -> None:
    def fetch(argument: Any) -> Any:  # noqa: ANN401 - of both stages
        sleep(1 if "bad" in argument else 5)
        if argument == "bad":
            raise LookupError
        return argument

    with VirtualTime(), pytest.raises(LookupError):
        run(
            [*"abc", "bad"],
            Stage(str if batch_size is None else list, batch_size=batch_size),
            fetch,
            journal=path,
            retry=None,
        )
    assert Journal(path).recorded().results == 3
    with VirtualTime(), pytest.raises(LookupError):
        run(
            ["bad", *"de"], fetch, str, journal=Journal(other := path.with_name("other"), job="x"), retry=None
        )
    assert [record.token for record in Journal(other) if record.failure is None] == ["d", "e"]


def test_journal_can_be_given_to_one_job_after_the_other(path: Path) -> None:
    journal = Journal(path)
    for _ in range(3):
        assert run("ab", str.upper, str.lower, journal=journal) == ["a", "b"]
        with iter_two_stage("ab", str.upper, str.lower, journal=journal) as outcomes:
            next(outcomes)
    iter_two_stage("ab", str.upper, str.lower, journal=journal)  # never begun, and so never opened
    assert len(list(journal)) == 2


def test_secrets_are_shown_by_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run("a", lambda _: "S3CRET", lambda token: token, journal=path)
    (record,) = Journal(path)
    assert repr(record) == "<Record of item 'a': done>"
    assert "S3CRET" not in caplog.text + repr(Journal(path)) + repr(record)


@pytest.mark.parametrize("streamed", [False, True])
def test_job_on_an_event_loop_has_a_journal_too(path: Path, *, streamed: bool) -> None:
    calls = 0

    async def fetch(argument: object) -> str:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return str(argument)

    async def source() -> AsyncIterator[int]:
        for item in range(100):
            yield item

    async def main() -> list[str]:
        if not streamed:
            return await arun_two_stage(source(), fetch, fetch, journal=path)
        async with aiter_two_stage(range(100), fetch, fetch, journal=path, ordered=True) as outcomes:
            return [outcome.result async for outcome in outcomes]

    for _ in range(2):
        assert asyncio.run(main()) == list(map(str, range(100)))
        assert calls == 200


# --- looking in


def test_counts_are_by_stage_and_failure(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Api(
        item={"a": LookupError(), "b": ApiError(NOT_FOUND)}, token={"token c": ApiError(UNAVAILABLE)}
    )
    broken.run("abcde", journal=Journal(path, job="letters", version=2), return_exceptions=True)
    recorded = Journal(path).recorded()
    assert recorded.failures == {
        (1, "LookupError", None): 1,
        (1, "ApiError", 404): 1,
        (2, "ApiError", 503): 1,
    }
    assert (recorded.job, recorded.version, recorded.tokens, recorded.results) == ("letters", "2", 0, 2)
    assert recorded.first is not None
    assert recorded.last is not None
    assert recorded.first <= recorded.last
    assert main(["journal", os.fspath(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "job: letters, version 2",
        "           2  with their result",
        "           0  with their token, stage two is missing",
        "           3  failed, of which",
    ]
    assert "           1    at stage two: ApiError, status 503" in lines
    with pytest.raises(SystemExit, match="No such file"):
        main(["journal", f"{path}.not"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": None}, "path is None; expected the path of a file"),
        ({"path": ""}, "path is ''; expected the path of a file"),
        ({"path": b"a"}, "path is b'a'; expected the path of a file"),
        ({"job": 1}, "job is 1; expected a name"),
        ({"version": 1.5}, "version is 1.5; expected a str or an int"),
        ({"token_ttl": "1"}, "token_ttl is '1'; expected a number of seconds"),
        ({"tokens": 1}, "tokens is 1; expected True or False"),
        ({"retry_failed": None}, "retry_failed is None; expected True or False"),
        ({"encode": str}, "one of encode and decode is given; expected both, or none"),
        ({"encode": str, "decode": 1}, "decode is 1; expected a function"),
    ],
    ids=str,
)
def test_wrong_argument_is_a_type_error(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(TypeError) as caught:
        Journal(**{"path": "a", **arguments})
    assert str(caught.value) == error


def test_journal_is_a_path_or_a_journal() -> None:
    for wrong in (3, True, b"a"):
        with pytest.raises(TypeError, match="path of a file"):
            run("a", str, str, journal=wrong)


def test_policy_that_retries_all_is_no_matter(path: Path) -> None:
    fails = iter([True, False])

    def fetch_result(token: str) -> str:
        if next(fails):
            raise LookupError
        return token

    assert run("a", str, fetch_result, retry=ALWAYS, journal=path) == ["a"]
    assert Journal(path).failures() == []
