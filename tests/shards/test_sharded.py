"""Jobs in shards: the same results, order and errors, whatever runs the shards."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import sys
import threading
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from away import double, double_later, doubles
from common import AT_ONCE, until
from in_shards import iterate_in_shards, run_in_shards
from pools_of_processes import new_pool
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_none

from twostage import (
    AsyncExecutor,
    Journal,
    Observer,
    Progress,
    Rate,
    RunTimeout,
    Shards,
    Stage,
    TooManyFailures,
    Trace,
    aiter_two_stage,
    arun_two_stage,
    iter_two_stage,
    run_two_stage,
)
from twostage.shards.owner import ALONE, _share
from twostage.testing import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from twostage.observing import Attempt, HeldBack, JobBegan, JobEnded, RetryDue


class Away(Executor):
    """Threads that are told and tell by pickle, as another process is, and count what they were given."""

    def __init__(self, workers: int = 3) -> None:
        self.pool = ThreadPoolExecutor(workers)
        self.running = self.most = self.shards = 0
        self.lock = threading.Lock()

    def submit(self, call: Callable[..., Any], /, *_: object, **__: object) -> Future[Any]:
        with self.lock:
            self.running += 1
            self.shards += 1
            self.most = max(self.most, self.running)
        future = self.pool.submit(_there, pickle.dumps(call))
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[Any]) -> None:
        with self.lock:
            self.running -= 1

    def shutdown(self, *_: object, **__: object) -> None:
        raise AssertionError


def _there(call: bytes) -> object:
    return pickle.loads(pickle.dumps(pickle.loads(call)()))  # noqa: S301 - our own


@pytest.fixture(autouse=True)
def _asked() -> None:
    asked.clear()
    tries.clear()
    held.clear()


@pytest.fixture
def away() -> Iterator[Away]:
    executor = Away()
    yield executor
    executor.pool.shutdown()


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        pool.submit(int).result()  # its threads are none that a test leaves
        yield pool


asked: Counter[Any] = Counter()
tries: Counter[Any] = Counter()
held = threading.Event()


def tokens(items: list[int]) -> list[str]:
    asked.update(items)
    return [f"token {item}" for item in items]


def result(token: str) -> str:
    asked[token] += 1
    return token.removeprefix("token ")


def orders(items: list[int]) -> list[list[str]]:
    asked.update(items)
    return [[f"{item}/{place}" for place in range(item % 3)] for item in items]


def bad_orders(token: str) -> str:
    asked[token] += 1
    if token == "11/1":  # noqa: S105 - no secret
        raise LookupError(token)
    return token


def fails_at_37(token: str) -> str:
    if token == "token 37":  # noqa: S105 - as above
        raise LookupError(token)
    return result(token)


def fails_often(token: str) -> str:
    if int(token.removeprefix("token ")) % 2:
        raise LookupError(token)
    return result(token)


def fails_once(token: str) -> str:
    tries[token] += 1
    if tries[token] == 1:
        raise ConnectionResetError
    return result(token)


def waits(token: str) -> str:
    held.wait(5)
    return result(token)


def needs_fresh(token: str) -> str:
    tries[token] += 1
    if tries[token] == 1:
        raise ApiError(401)
    return token


async def atokens(items: list[int]) -> list[str]:
    await asyncio.sleep(0)
    return tokens(items)


async def aresult(token: str) -> str:
    await asyncio.sleep(0)
    return result(token)


def run(items: Any, *stages: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    return run_in_shards(items, *stages, **settings)


def iterate(items: Any, *stages: Any, ordered: bool = False, **settings: Any) -> list[Any]:  # noqa: ANN401 - as above
    with iterate_in_shards(items, *stages, ordered=ordered, **settings) as outcomes:
        found = {outcome.index: outcome for outcome in outcomes}
    indices = list(found)
    assert not ordered or indices == sorted(indices)
    assert all(outcome.item == items[index] for index, outcome in found.items() if isinstance(items, range))
    return [
        outcome.result if outcome.exception is None else outcome.exception
        for _, outcome in sorted(found.items())
    ]


each_way = pytest.mark.parametrize("job", [run, iterate, partial(iterate, ordered=True)])


@each_way
@pytest.mark.parametrize("number", [0, 1, 10, 101])
def test_results_are_those_of_one_machine(job: Callable[..., list[Any]], number: int, away: Away) -> None:
    settings: dict[str, Any] = {"batch_size": 7, "executor": away, "at_once": 3, "size": 10}
    assert job(range(number), tokens, result, **settings) == [str(item) for item in range(number)]
    assert asked == Counter([*range(number), *(f"token {item}" for item in range(number))])
    assert away.shards == -(-number // 10)
    assert away.most <= 3


@each_way
def test_many_tokens_and_their_failures(job: Callable[..., list[Any]], away: Away) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "many": True, "return_exceptions": True}
    found = job(range(20), orders, bad_orders, executor=away, size=6, **settings)
    (failure,) = (one for one in found[11] if isinstance(one, Exception))
    assert type(failure) is LookupError
    assert failure.__notes__ == ["twostage: stage two, 11, 1 attempt"]
    found[11] = ["11/0", "11/1"]
    assert found == orders(list(range(20)))


@each_way
def test_first_failure_of_many_tokens_is_raised(job: Callable[..., list[Any]], away: Away) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "many": True, "executor": away, "size": 6}
    with pytest.raises(LookupError, match="11/1") as raised:
        job(range(20), orders, bad_orders, **settings)
    assert raised.value.__notes__ == ["twostage: stage two, 11, 1 attempt"]


@each_way
def test_coroutines_and_a_pool_of_processes(job: Callable[..., list[Any]], pool: ProcessPoolExecutor) -> None:
    settings: dict[str, Any] = {"executor": pool, "at_once": 2, "size": 20, "batch_size": 5}
    assert job(range(50), atokens, aresult, **settings) == [str(item) for item in range(50)]
    assert job(range(50), tokens, result, **settings) == [str(item) for item in range(50)]


@each_way
def test_first_failure_is_raised_as_it_was(job: Callable[..., list[Any]], away: Away) -> None:
    with pytest.raises(LookupError, match="token 37") as raised:
        job(range(1000), tokens, fails_at_37, batch_size=5, executor=away, at_once=2, size=10)
    assert raised.value.__notes__ == ["twostage: stage two, 37, 1 attempt"]
    assert away.shards <= 8
    shards = away.shards
    until(lambda: away.running == 0)
    assert away.shards == shards


def test_outcomes_before_the_failure_are_handed_over(away: Away) -> None:
    got: list[int] = []
    settings: dict[str, Any] = {"executor": away, "at_once": 1, "size": 10, "result_workers": 1}
    with (
        pytest.raises(LookupError),
        iterate_in_shards(range(1000), str, fails_at, ordered=True, **settings) as outcomes,
    ):
        got += (outcome.item for outcome in outcomes)
    assert got == list(range(37))


def fails_at(token: str) -> str:
    if token == "37":  # noqa: S105 - as above
        raise LookupError(token)
    return token


@each_way
def test_failures_take_their_places(job: Callable[..., list[Any]], away: Away) -> None:
    found = job(range(50), tokens, fails_at_37, batch_size=5, executor=away, size=8, return_exceptions=True)
    assert type(found.pop(37)) is LookupError
    assert found == [str(item) for item in range(50) if item != 37]


@pytest.mark.parametrize("most", [9, 0.3])
def test_too_many_failures_of_the_whole(most: float, away: Away) -> None:
    settings: dict[str, Any] = {"batch_size": 5, "executor": away, "at_once": 2, "size": 10}
    with pytest.raises(TooManyFailures) as raised:
        run(range(1000), tokens, fails_often, return_exceptions=True, max_failures=most, **settings)
    assert type(raised.value.__cause__) is LookupError
    assert away.shards <= 8
    assert 10 <= len(raised.value.outcomes) <= 80
    assert all(outcome.token == f"token {outcome.item}" for outcome in raised.value.outcomes)


@pytest.mark.parametrize("most", [5, 0.1])
def test_shard_that_fails_all_over_ends_early(most: float, away: Away) -> None:
    settings: dict[str, Any] = {"executor": away, "size": 500, "token_workers": 1, "result_workers": 1}
    with pytest.raises(TooManyFailures) as raised:
        run(range(1000), str, fails_always, return_exceptions=True, max_failures=most, at_once=1, **settings)
    assert tries["calls"] < 100
    assert type(raised.value.__cause__) is LookupError


def test_share_of_failures_in_one_shard_ends_the_whole(away: Away) -> None:
    """Though there are few of them among the last outcomes of all."""
    settings: dict[str, Any] = {"executor": away, "size": 100, "at_once": 1, "result_workers": 1}
    with pytest.raises(TooManyFailures) as raised:
        run(range(200), str, fails_from_100_to_105, return_exceptions=True, max_failures=0.2, **settings)
    assert type(raised.value.__cause__) is LookupError
    assert len(raised.value.outcomes) > 100


def fails_from_100_to_105(token: str) -> str:
    if 100 <= int(token) < 106:
        raise LookupError(token)
    return token


def fails_always(token: str) -> NoReturn:
    tries["calls"] += 1
    raise LookupError(token)


def test_timeout_is_that_of_the_whole(away: Away) -> None:
    settings: dict[str, Any] = {"executor": away, "at_once": 2, "size": 10, "result_workers": 1}
    timer = threading.Timer(0.5, held.set)
    timer.start()
    found = run(range(60), str, waits, timeout=0.2, return_exceptions=True, **settings)
    timer.join()
    assert all(isinstance(one, RunTimeout) or one == str(item) for item, one in enumerate(found))
    done = [one for one in found if not isinstance(one, RunTimeout)]
    assert len(done) == 2  # one of each shard that was out
    assert {str(one) for one in found if isinstance(one, RunTimeout)} == {
        "the run's timeout of 0.2 s has passed"
    }
    assert len(found) == 60


def test_timeout_of_many_tokens_is_told_as_that_of_the_whole(away: Away) -> None:
    threading.Timer(0.5, held.set).start()
    settings: dict[str, Any] = {"executor": away, "size": 10, "result_workers": 1, "many": True}
    found = run(range(30), pair_of, waits, timeout=0.2, return_exceptions=True, at_once=2, **settings)
    texts = {
        str(one) for each in found if isinstance(each, list) for one in each if isinstance(one, Exception)
    }
    assert texts == {"the run's timeout of 0.2 s has passed"}


def pair_of(item: int) -> list[str]:
    return [f"{item}/0", f"{item}/1"]


def test_timeout_raises(away: Away) -> None:
    threading.Timer(0.3, held.set).start()
    with pytest.raises(RunTimeout, match=r"0\.1 s"):
        run(range(60), str, waits, timeout=0.1, executor=away, at_once=2, size=10, result_workers=1)


def test_equal_items_are_asked_for_once_over_all_shards(away: Away) -> None:
    items = [item % 12 for item in range(60)]
    found = run(items, tokens, result, batch_size=5, key=int, executor=away, at_once=3, size=4)
    assert found == [str(item) for item in items]
    assert set(asked.values()) == {1}


def test_expired_token_is_refreshed_where_it_is(away: Away) -> None:
    settings: dict[str, Any] = {"executor": away, "size": 5, "refresh_token_on": ApiError}
    assert run(range(10), str, needs_fresh, **settings) == [str(item) for item in range(10)]
    assert set(tries.values()) == {2}


def test_source_is_read_for_the_shards_that_are_out(away: Away) -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for item in range(1000):
            read += 1
            yield item

    taken = 0
    with iterate_in_shards(
        source(), tokens, result, batch_size=5, executor=away, at_once=3, size=10
    ) as outcomes:
        for _ in outcomes:
            taken += 1
            assert read - taken < 30
    assert taken == 1000


def test_source_s_failure_is_raised_after_what_is_done(away: Away) -> None:
    def source() -> Iterator[int]:
        yield from range(25)
        raise OSError

    got: list[int] = []
    with (
        pytest.raises(OSError, match=r"^$"),
        iterate_in_shards(source(), str, str, executor=away, at_once=1, size=10) as outcomes,
    ):
        got += (outcome.item for outcome in outcomes)
    assert got == list(range(20))  # a shard that is not whole yet was not sent


# --- options


def test_rates_are_shared() -> None:
    assert _share(80, 8) == 10
    assert _share([Rate(80), 4.0], 8) == [Rate(10), Rate(1, per=2)]
    assert _share(Rate(2, per=60), 8) == [Rate(1, per=240)]
    weighed = Rate(5, per=60, cost=len)
    assert _share(weighed, 10) == [Rate(0.5, per=60, cost=len)]


def test_each_shard_has_its_share_of_a_rate(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def note(call: Callable[..., Any]) -> Future[Any]:
        sent.append(vars(call)["_work"])
        return Away.submit(away, call)

    monkeypatch.setattr(away, "submit", note)
    stage = Stage(result, rate=400)
    run(range(80), str, stage, executor=away, at_once=2, size=40)
    assert [work.fetch.__self__.stages[1].stage.rate for work in sent] == [200, 200]
    assert stage.rate == 400


class Seen(Observer):
    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.retries: list[RetryDue] = []
        self.held: list[HeldBack] = []
        self.done = 0
        self.began: list[JobBegan] = []
        self.ended: list[JobEnded] = []
        self.progress: list[Progress] = []

    def job_began(self, job: JobBegan) -> None:
        self.began.append(job)

    def attempt_ended(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)

    def retry_due(self, retry: RetryDue) -> None:
        self.retries.append(retry)

    def held_back(self, held: HeldBack) -> None:
        self.held.append(held)

    def outcome_done(self, _: object) -> None:
        self.done += 1

    def progressed(self, progress: Progress) -> None:
        self.progress.append(progress)

    def job_ended(self, end: JobEnded) -> None:
        self.ended.append(end)


def test_observer_hears_of_all_shards(away: Away, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "twostage")
    seen = Seen()
    run(
        range(60),
        tokens,
        fails_once,
        batch_size=10,
        retry=AT_ONCE,
        executor=away,
        size=20,
        observer=seen,
    )
    first = [attempt for attempt in seen.attempts if attempt.stage == 1]
    assert sorted(attempt.item_index for attempt in first) == [0, 10, 20, 30, 40, 50]
    second = Counter(attempt.item_index for attempt in seen.attempts if attempt.stage == 2)
    assert second == dict.fromkeys(range(60), 2)
    assert sorted(retry.item_index for retry in seen.retries) == list(range(60))
    (began,), (ended,) = seen.began, seen.ended
    for attempt in seen.attempts:  # all on the whole job's clock
        assert began.clock <= attempt.handed_over <= attempt.began <= attempt.ended <= ended.at + 0.001
    assert (seen.done, ended.done, seen.progress[-1].done, began.total) == (60, 60, 60, 60)
    retries = [record for record in caplog.records if "attempt 1 failed" in record.getMessage()]
    assert len(retries) == 60  # told of here, and not once more where it was
    assert {record.levelname for record in retries} == {"INFO"}


def test_attempts_do_not_travel_if_nobody_asks(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    there = _there

    def note(call: bytes) -> object:
        answer: Any = there(call)
        answers.append(pickle.loads(answer.data)[0])  # noqa: S301 - our own
        return answer

    monkeypatch.setattr(sys.modules[__name__], "_there", note)
    run(range(20), tokens, fails_once, retry=AT_ONCE, batch_size=5, executor=away, size=20)
    assert [(len(answer.heard.attempts), len(answer.heard.retries)) for answer in answers] == [(0, 20)]


# --- journal


@each_way
def test_journal_is_kept_here(job: Callable[..., list[Any]], away: Away, path: Path) -> None:
    settings: dict[str, Any] = {
        "batch_size": 5,
        "executor": away,
        "at_once": 2,
        "size": 10,
        "journal": path,
    }
    job(range(50), tokens, fails_at_37, return_exceptions=True, **settings)
    assert Journal(path).recorded().results == 49
    assert [failure.type_name for failure in Journal(path).failures()] == ["LookupError"]
    asked.clear()
    journal = Journal(path, job="tokens, fails_at_37")
    found = job(range(60), tokens, result, **{**settings, "journal": journal})
    assert found == [str(item) for item in range(60)]
    assert asked.keys() == {37, "token 37", *range(50, 60), *(f"token {item}" for item in range(50, 60))}
    asked.clear()
    assert run_two_stage(range(60), tokens, result, batch_size=5, journal=journal) == found
    assert not asked


def test_journal_has_each_of_many_tokens(away: Away, path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "many": True, "return_exceptions": True, "journal": path}
    run(range(20), orders, bad_orders, executor=away, size=6, **settings)
    asked.clear()
    journal = Journal(path, job="orders, bad_orders")
    assert run(range(20), orders, result, executor=away, size=6, **{**settings, "journal": journal}) == [
        list(map(str, one)) for one in orders(list(range(20)))
    ]
    assert {key: asked[key] for key in ("11/0", "11/1")} == {"11/0": 1, "11/1": 1}
    assert sum(asked[token] for one in orders(list(range(20))) for token in one) == 2


def test_recorded_token_is_none_to_go_on_with(away: Away, path: Path) -> None:
    journal = Journal(path, job="any")
    with pytest.raises(LookupError):
        run_two_stage(range(37, 38), tokens, fails_at_37, batch_size=5, journal=journal)
    asked.clear()
    assert run(range(37, 38), tokens, result, batch_size=5, journal=journal, executor=away) == ["37"]
    assert asked == {37: 1, "token 37": 1}
    assert [(record.token, record.result) for record in Journal(path)] == [("token 37", "37")]


def test_word_of_a_policy_is_not_recorded(away: Away, path: Path) -> None:
    policy = Retrying(
        retry=retry_if_exception(always),
        stop=stop_after_attempt(2),
        wait=wait_none(),
        retry_error_callback=stand_in,
    )
    settings: dict[str, Any] = {"executor": away, "journal": path, "size": 20}
    found = run(range(40), tokens, Stage(fails_at_37, retry=policy), batch_size=5, **settings)
    assert found[37] == "stands in"
    assert Journal(path).recorded().results == 39


def always(_: BaseException) -> bool:
    return True


def stand_in(_: object) -> str:
    return "stands in"


def test_failure_that_the_policy_wanted_to_try_again_is_asked_for_again(away: Away, path: Path) -> None:
    policy = Retrying(retry=retry_if_exception(always), stop=stop_after_attempt(2), wait=wait_none())
    journal = Journal(path, job="any", retry_failed=False)
    settings: dict[str, Any] = {"journal": journal, "executor": away, "return_exceptions": True}
    run(range(40), tokens, Stage(fails_at_37, retry=policy), batch_size=5, **settings)
    assert run(range(40), tokens, result, batch_size=5, **settings)[37] == "37"


def test_value_that_json_would_change_is_an_error(away: Away, path: Path) -> None:
    with pytest.raises(TypeError, match=r"result of item [012] is or has a tuple"):  # whichever came first
        run(range(3), str, pair, executor=away, journal=path)


def pair(token: str) -> tuple[str, str]:
    return token, token


# --- lost workers


class KilledWorker(Exception):  # noqa: N818 - Dask's name
    __module__ = "distributed.scheduler"


class Mortal(Away):
    """Loses the worker of a shard that has a deadly item, and at times that of another one beside it."""

    def __init__(self, deadly: set[int], innocent: dict[int, int]) -> None:
        super().__init__()
        self.deadly = deadly
        self.innocent = innocent
        self.killed: list[list[int]] = []

    def submit(self, call: Callable[..., Any], /, *_: object, **__: object) -> Future[Any]:
        items = list(vars(call)["_argument"])
        unlucky = [item for item in items if self.innocent.get(item)]
        for item in unlucky:
            self.innocent[item] -= 1
        if unlucky or self.deadly & set(items):
            self.killed.append(items)
            future: Future[Any] = Future()
            future.set_exception(KilledWorker("the worker died"))
            return future
        return super().submit(call)


@each_way
def test_item_that_kills_fails_alone(job: Callable[..., list[Any]]) -> None:
    executor = Mortal({33}, {5: 6, 47: 2})  # 5 stands alone when it is unlucky for the last times
    settings: dict[str, Any] = {"executor": executor, "at_once": 3, "size": 10, "batch_size": 5}
    found = job(range(60), tokens, result, return_exceptions=True, **settings)
    assert type(found.pop(33)) is KilledWorker
    assert found == [str(item) for item in range(60) if item != 33]
    assert executor.killed.count([33]) == ALONE
    assert executor.killed.count([5]) == 2
    executor.pool.shutdown()


def test_killer_ends_the_job_when_failures_do() -> None:
    executor = Mortal({33}, {})
    with pytest.raises(KilledWorker):
        run(range(60), tokens, result, executor=executor, at_once=3, size=10, batch_size=5)
    executor.pool.shutdown()


def test_broken_pool_ends_the_job() -> None:
    with (
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
        pytest.raises(BrokenExecutor),
    ):
        run(range(60), str, dies, executor=pool, at_once=2, size=10, return_exceptions=True)


def dies(token: str) -> str:
    if token == "15":  # noqa: S105 - as above
        os._exit(1)
    return token


def test_item_that_cannot_be_sent_fails_alone(away: Away) -> None:
    items: list[Any] = [*range(20)]
    items[7] = threading.Lock()
    found = run(items, type_of, str, executor=away, size=10, return_exceptions=True)
    assert type(found[7]) is ValueError
    assert "a lock that can't be pickled" in str(found[7])
    assert [one for place, one in enumerate(found) if place != 7] == ["int"] * 19


def type_of(item: object) -> str:
    return type(item).__name__


def test_closing_early_awaits_the_shards_that_run(away: Away) -> None:
    with iterate_in_shards(
        range(1000), tokens, result, batch_size=5, executor=away, at_once=3, size=10
    ) as outcomes:
        next(outcomes)
    assert away.running == 0
    assert away.shards <= 8


# --- what is refused, before any call


@contextmanager
def refused(kind: type[Exception], match: str) -> Iterator[None]:
    with pytest.raises(kind, match=match):
        yield
    assert not asked


class ClientExecutor(Away):
    """Has Dask's name."""

    __module__ = "distributed.cfexecutor"


@pytest.mark.parametrize("iterates", [False, True])
def test_bad_arguments_are_refused(away: Away, *, iterates: bool) -> None:
    def job(*stages: Any, **settings: Any) -> object:  # noqa: ANN401 - any job
        settings = {"executor": away, **settings}
        return (iterate_in_shards if iterates else run_in_shards)(
            range(3), *(stages or (tokens, result)), **settings
        )

    for bad in (None, 3, ThreadPoolExecutor, AsyncExecutor()):
        with refused(TypeError, r"executor is .*; expected what shards are sent to"):
            job(executor=bad)
    with refused(ValueError, "at_once is 0; expected an integer of at least 1"):
        job(at_once=0)
    with refused(TypeError, r"size is 1\.5; expected an integer"):
        job(size=1.5)
    with refused(ValueError, "window is 5; expected at least the size of a shard, 10"):
        job(window=5, size=10)
    plain: Any = iter_two_stage if iterates else run_two_stage
    for no_shards in (2, away):
        with refused(TypeError, r"shards is .*; expected Shards\(executor\), or None"):
            plain(range(3), tokens, result, shards=no_shards)
    with refused(TypeError, "trace is given, and a Trace is one machine's"):
        job(trace=Trace())
    with refused(TypeError, "fetch_result's Stage has an executor, which stays in this process"):
        job(tokens, Stage(result, executor=ThreadPoolExecutor()))
    with refused(ValueError, "max_refreshes is 0"):
        job(refresh_token_on=ApiError, max_refreshes=0)
    with refused(TypeError, "refresh_token_on is 5"):
        job(refresh_token_on=5)
    with refused(TypeError, "max_failures is given without return_exceptions=True"):
        job(max_failures=3)
    with refused(TypeError, r"batch_size \(3\) and batch_size of fetch_token's Stage \(4\) are both given"):
        job(Stage(tokens, batch_size=4), result, batch_size=3)


@pytest.mark.filterwarnings("ignore:Python 3:RuntimeWarning")
def test_calls_that_must_not_be_repeated_are_not_for_dask() -> None:
    executor = ClientExecutor()
    with refused(TypeError, r"fetch_result's calls must not be repeated \(retry=None\), and Dask"):
        run(range(3), tokens, Stage(result, retry=None), executor=executor)
    executor.pool.shutdown()


@pytest.mark.parametrize(
    ("stages", "settings", "match"),
    [
        ((tokens, lambda token: token), {}, "fetch_result is .*<lambda>, which can't be pickled"),
        ((lambda items: items, result), {}, "fetch_token is .*<lambda>, which can't be pickled"),
        (
            (tokens, Stage(result, retry=Retrying(stop=lambda _: True))),
            {},
            r"retry of fetch_result is Retrying, which .*policies can from tenacity 9\.2 on \(this is 9",
        ),
        ((tokens, result), {"refresh_token_on": lambda _: True}, "refresh_token_on is .*<lambda>"),
        ((tokens, Stage(result, bisect=lambda _: True)), {}, "bisect of fetch_result's Stage is .*<lambda>"),
        (
            (tokens, result),
            {"journal": Journal("never.sqlite", encode=lambda _: b"", decode=lambda _: 0)},
            "encode of the Journal is .*<lambda>",
        ),
    ],
)
def test_what_cannot_travel_is_named(
    stages: tuple[Any, ...], settings: dict[str, Any], match: str, pool: ProcessPoolExecutor
) -> None:
    with refused(TypeError, match):
        run(range(3), *stages, executor=pool, batch_size=2, **settings)


def test_policies_travel(pool: ProcessPoolExecutor) -> None:
    found = run(range(30), str, Stage(fails_once, retry=AT_ONCE_THERE), executor=pool, size=10, at_once=2)
    assert found == [str(item) for item in range(30)]


AT_ONCE_THERE = Retrying(retry=retry_if_exception(always), stop=stop_after_attempt(3), wait=wait_none())


def test_executor_whose_worker_the_caller_holds_is_refused() -> None:
    with ThreadPoolExecutor(2) as executor:

        def nested(item: int) -> Any:  # noqa: ANN401 - what is raised
            return run_in_shards([item], str, str, executor=executor)

        (found,) = run_two_stage([1], Stage(nested, executor=executor), str, return_exceptions=True)
        assert "executor runs the attempt that starts this job" in str(found)


def test_both_functions_are_like_their_namesakes(away: Away) -> None:
    """A job of one shard is handed over as the job itself is."""
    settings: dict[str, Any] = {"batch_size": 3, "retry": AT_ONCE, "ordered": True}
    with iter_two_stage(range(10), tokens, result, **settings) as plain:
        expected = [(one.index, one.item, one.token, one.result, one.token_attempts) for one in plain]
    with iterate_in_shards(range(10), tokens, result, executor=away, **settings) as outcomes:
        found = [(one.index, one.item, one.token, one.result, one.token_attempts) for one in outcomes]
    assert found == expected


def test_what_travels_shows_nothing_of_what_is_in_it(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    there = _there

    def note(call: bytes) -> object:
        answer: Any = there(call)
        shown.extend(map(repr, (pickle.loads(call), answer, *pickle.loads(answer.data))))  # noqa: S301 - our own
        shown.extend(map(repr, pickle.loads(answer.data)[0].ends))  # noqa: S301 - as above
        return answer

    monkeypatch.setattr(sys.modules[__name__], "_there", note)
    keyed = partial(with_key, "s3cret")
    run([1], keyed, result, executor=away)
    assert len(shown) == 5
    assert not [text for text in shown if "s3cret" in text or "token" in text.replace("fetch_token", "")]


def with_key(_: str, item: int) -> str:
    return f"token {item}"


def test_shards_are_refused_in_async_code(away: Away) -> None:
    shards = Shards(away)
    with refused(TypeError, "shards is given, and can't be awaited; expected run_two_stage"):
        asyncio.run(arun_two_stage(range(3), str, str, shards=shards))
    with refused(TypeError, "shards is given, and can't be awaited; expected run_two_stage"):
        aiter_two_stage(range(3), str, str, shards=shards)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="InterpreterPoolExecutor is new in Python 3.14")
def test_shards_run_in_other_interpreters() -> None:
    with new_pool("interpreters") as executor:
        for fetch_tokens, fetch_result in ((doubles, double), (doubles, double_later)):
            shards = Shards(executor, at_once=2, size=7)
            found = run_two_stage(range(30), fetch_tokens, fetch_result, batch_size=5, shards=shards)
            assert found == [4 * number for number in range(30)]
