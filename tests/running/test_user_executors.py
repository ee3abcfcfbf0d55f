"""Stages on executors of the user's own: of any kind and size, also one for both, and never shut down."""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import threading
import time
import traceback
import weakref
from collections import Counter
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS, PATIENCE, LeaveError, until
from forms import Run, each_way, run

from twostage import Stage, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def text(number: int) -> str:
    """Returns the result of `number`; never falsy."""
    return f"result {number}"


def texts(numbers: range) -> list[str]:
    return [text(number) for number in numbers]


class Pool(ThreadPoolExecutor):
    """Remembers its futures, and how many calls were handed to it and not over, at most."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, "the user's")
        self.futures: list[Future[Any]] = []
        self.most_out = 0
        self._out = 0
        self._lock = threading.Lock()

    def submit(self, *call: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
        with self._lock:
            self._out += 1
            self.most_out = max(self.most_out, self._out)
        future = super().submit(*call, **named)
        future.add_done_callback(self._over)  # before the library's: this end is counted before it reacts
        self.futures.append(future)
        return future

    def _over(self, _: Future[Any]) -> None:
        with self._lock:
            self._out -= 1


class Inline(Executor):
    """Makes each call inside `submit`."""

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **named))
        except BaseException as error:  # noqa: BLE001 - it is for the one who submitted
            future.set_exception(error)
        return future


class Backwards(Inline):
    """Makes the calls as they come and lets their ends be known in the opposite order, so many at a time."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._held: list[tuple[Future[Any], Future[Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._held.append((future, super().submit(fn, *args, **named)))
        if len(self._held) == self._number:
            while self._held:
                known, made = self._held.pop()
                if (error := made.exception()) is not None:
                    known.set_exception(error)
                else:
                    known.set_result(made.result())
        return future


# --- how much of it is used


def test_limit_is_reached_and_never_exceeded_on_a_larger_executor_also_with_retries() -> None:
    """The barriers let nobody pass before as many attempts run as may: here a multiple of all there are."""
    three, five = threading.Barrier(3), threading.Barrier(5)
    attempts: Counter[tuple[str, int]] = Counter()

    def fetch_at(barrier: threading.Barrier, stage: str) -> Callable[[int], int]:
        def fetch(number: int) -> int:
            barrier.wait(PATIENCE)
            attempts[stage, number] += 1
            if attempts[stage, number] == 1:
                raise ConnectionError
            return number

        return fetch

    with Pool(20) as first, Pool(20) as second:
        results = run_two_stage(
            range(30),
            Stage(fetch_at(three, "one"), workers=3, executor=first, retry=ALWAYS),
            Stage(fetch_at(five, "two"), workers=5, executor=second, retry=ALWAYS),
        )
    assert results == list(range(30))
    assert set(attempts.values()) == {2}
    assert (first.most_out, second.most_out) == (3, 5)


def test_limit_is_never_read_from_the_executor() -> None:
    with Pool(1) as first, Pool(1) as second:
        results = run_two_stage(range(40), Stage(int, executor=first), Stage(text, executor=second))
        assert first.most_out == 4
        run_two_stage(range(40), list, Stage(text, executor=second), batch_size=40)
        assert second.most_out == 32
    assert results == texts(range(40))


@each_way
@pytest.mark.parametrize("batch_size", [None, 7])
def test_executor_smaller_than_the_limit_does_the_job(batch_size: int | None, job: Run) -> None:
    fetch: Any = int if batch_size is None else list
    with Pool(2) as pool:
        first = Stage(fetch, batch_size=batch_size, executor=pool, workers=8)
        assert job(range(50), first, Stage(text, executor=pool, workers=8)) == texts(range(50))


def test_calls_run_in_the_executor_of_their_stage_and_nowhere_else() -> None:
    where: dict[str, set[str]] = {"one": set(), "two": set()}

    def fetch_at(stage: str) -> Callable[[int], int]:
        def fetch(number: int) -> int:
            where[stage].add(threading.current_thread().name.rpartition("_")[0])
            return number

        return fetch

    with Pool(2) as pool:
        run_two_stage(range(9), Stage(fetch_at("one"), executor=pool), fetch_at("two"))
        assert where == {"one": {"the user's"}, "two": {"twostage"}}
        where["one"], where["two"] = set(), set()
        run_two_stage(range(9), fetch_at("one"), Stage(fetch_at("two"), executor=pool))
        assert where == {"one": {"twostage"}, "two": {"the user's"}}


# --- one for both stages


def test_ready_tokens_go_before_ready_batches_on_one_executor() -> None:
    made: list[tuple[str, str]] = []
    all_read = threading.Event()

    def source() -> Iterator[str]:
        yield from "abc"
        all_read.set()

    def fetch_token(item: str) -> str:
        assert all_read.wait(PATIENCE)  # from here on there is a batch to be had beside each token
        made.append(("token", item))
        return item

    def fetch_result(token: str) -> str:
        made.append(("result", token))
        return token

    with ThreadPoolExecutor(1) as pool:
        run_two_stage(
            source(),
            Stage(fetch_token, workers=1, executor=pool),
            Stage(fetch_result, workers=1, executor=pool),
        )
    assert made == [(stage, item) for item in "abc" for stage in ("token", "result")]


@each_way
@pytest.mark.parametrize("threads", [1, 2])
def test_one_small_executor_for_both_stages_is_no_deadlock(threads: int, job: Run) -> None:
    attempts: Counter[int] = Counter()

    def fetch_result(number: int) -> str:
        attempts[number] += 1
        if attempts[number] == 1 and number % 3 == 0:
            raise ConnectionError
        return text(number)

    with Pool(threads) as pool:
        stages: Any = Stage(list, batch_size=5, executor=pool), Stage(fetch_result, executor=pool)
        assert job(range(300), *stages, retry=ALWAYS, window=20) == texts(range(300))


def test_two_jobs_at_once_share_an_executor() -> None:
    with Pool(2) as pool, ThreadPoolExecutor(2) as callers:
        stages: Any = Stage(int, executor=pool), Stage(text, executor=pool)
        jobs = [callers.submit(run, numbers, *stages) for numbers in (range(100), range(100, 200))]
        assert [one.result() for one in jobs] == [texts(range(100)), texts(range(100, 200))]


# --- other kinds


@each_way
@pytest.mark.parametrize("ordered_ends", [True, False])
def test_hand_written_executor_does_the_job(job: Run, *, ordered_ends: bool) -> None:
    first, second = (Inline(), Inline()) if ordered_ends else (Backwards(3), Backwards(6))
    stages: Any = (
        Stage(list, batch_size=2, workers=3, executor=first),
        Stage(text, workers=6, executor=second),
    )
    assert job(range(12), *stages) == texts(range(12))


def test_outcomes_come_as_the_executor_completes_them_unless_in_order() -> None:
    def indexes(*, ordered: bool) -> list[int]:
        stage = Stage(text, workers=6, executor=Backwards(6))
        with iter_two_stage(range(6), list, stage, batch_size=6, ordered=ordered) as outcomes:
            return [outcome.index for outcome in outcomes]

    assert indexes(ordered=False) == [4, 3, 2, 1, 0, 5]  # the last one's `submit` had to return first
    assert indexes(ordered=True) == [0, 1, 2, 3, 4, 5]


@each_way
@pytest.mark.parametrize("backwards", [False, True])
def test_failures_take_their_items_places_whatever_the_executor(job: Run, *, backwards: bool) -> None:
    error = KeyError("the fourth")

    def fetch(number: int) -> str:
        if number == 3:
            raise error
        return text(number)

    stage = Stage(fetch, workers=6, executor=Backwards(6) if backwards else Inline())
    results = job(range(6), list, stage, batch_size=6, return_exceptions=True)
    assert results == [*texts(range(3)), error, *texts(range(4, 6))]
    assert error.__notes__ == ["twostage: stage two, 3, 1 attempt"]


def test_in_order_what_completes_before_the_failed_one_is_handed_over_first() -> None:
    def fetch(number: int) -> str:
        if number == 3:
            raise KeyError(number)
        return text(number)

    stage = Stage(fetch, workers=6, executor=Backwards(6))
    outcomes = iter_two_stage(range(6), list, stage, batch_size=6, ordered=True)
    assert [next(outcomes).result for _ in range(3)] == texts(range(3))
    with pytest.raises(KeyError):
        next(outcomes)


@pytest.fixture
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@each_way
def test_stages_may_run_in_processes(job: Run, processes: ProcessPoolExecutor) -> None:
    numbers = range(20)
    sort: Any = sorted
    stages: Any = Stage(sort, batch_size=8, executor=processes), Stage(math.factorial, executor=processes)
    assert job(numbers, *stages) == [math.factorial(number) for number in numbers]


@each_way
def test_failure_in_a_process_is_raised_as_the_function_raised_it(
    job: Run, processes: ProcessPoolExecutor
) -> None:
    stages: Any = Stage(int, executor=processes), Stage(math.factorial, executor=processes)
    with pytest.raises(ValueError, match="invalid literal") as raised:
        job(["1", "2", "three"], *stages)
    assert raised.value.__notes__ == ["twostage: stage one, 'three', 1 attempt"]
    results = job(["1", "-2", "three", "4"], *stages, return_exceptions=True)
    assert [type(one) for one in results] == [int, ValueError, ValueError, int]


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_process_that_dies_is_an_error_and_no_hang(*, return_exceptions: bool) -> None:
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(BrokenExecutor),
    ):
        run_two_stage(
            itertools.count(3), Stage(os._exit, executor=pool), str, return_exceptions=return_exceptions
        )


def test_executor_whose_threads_cannot_begin_is_an_error_and_no_hang() -> None:
    def initializer() -> None:
        raise OSError("no connection")

    with ThreadPoolExecutor(2, initializer=initializer) as pool, pytest.raises(BrokenExecutor):
        run_two_stage(itertools.count(), Stage(int, executor=pool), str)


# --- what becomes of it at an end


@pytest.mark.parametrize("end", ["all done", "failure", "closed", "source fails", "exit"])
def test_executor_is_never_shut_down(end: str) -> None:
    def fetch(number: int) -> int:
        if number == 5 and end == "failure":
            raise ValueError
        if number == 5 and end == "exit":
            raise LeaveError
        return number

    def source() -> Iterator[int]:
        yield from range(10)
        if end == "source fails":
            raise LookupError

    class Kept(ThreadPoolExecutor):
        def shutdown(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - as it has them
            raise AssertionError

    pool = Kept(2)
    try:
        with iter_two_stage(source(), Stage(fetch, executor=pool), Stage(fetch, executor=pool)) as outcomes:
            assert next(outcomes) is not None
            if end != "closed":
                list(outcomes)
    except (ValueError, LookupError, LeaveError):
        assert end in {"failure", "source fails", "exit"}
    assert pool.submit(int).result(PATIENCE) == 0
    ThreadPoolExecutor.shutdown(pool)


class Busy:
    """A function for a pool of two threads: its calls run until something that waited was cancelled."""

    def __init__(self, pool: Pool, error: Exception | None) -> None:
        self.begun: list[int] = []
        self.done: list[int] = []
        self._pool = pool
        self._error = error

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        if number == 0:
            until(lambda: len(self.begun) == 2)
            if self._error is not None:
                raise self._error
        else:
            until(lambda: any(future.cancelled() for future in self._pool.futures))
        self.done.append(number)
        return number


@pytest.mark.parametrize("stage_one", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_at_an_end_what_waits_in_the_executor_is_cancelled_and_what_runs_awaited(
    *, fails: bool, stage_one: bool
) -> None:
    with Pool(2) as pool:
        error = ValueError() if fails else None
        busy = Busy(pool, error)
        stage = Stage(busy, workers=6, executor=pool)
        if stage_one:
            outcomes = iter_two_stage(range(10), stage, int)
        else:
            outcomes = iter_two_stage(range(10), list, stage, batch_size=10)
        if fails:
            with pytest.raises(ValueError) as raised:  # noqa: PT011 - it is compared
                list(outcomes)
            assert raised.value is error
        else:
            assert next(outcomes).index == 0
            until(lambda: len(busy.begun) == 3)
        outcomes.close()
        begun, done, futures = list(busy.begun), list(busy.done), list(pool.futures)
        assert set(begun) <= {0, 1, 2}  # the two, and the one that followed the first
        assert set(begun) - set(done) == ({0} if fails else set())
        assert all(future.done() for future in futures)
        assert sum(future.cancelled() for future in futures) == len(futures) - len(begun)
        assert len(futures) == (6 if fails else 7)
    assert busy.begun == begun


@each_way
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("executor", [ThreadPoolExecutor, Inline])
def test_what_is_no_exception_ends_the_job_and_is_raised_as_it_is(
    executor: Callable[[], Executor], job: Run, *, return_exceptions: bool
) -> None:
    for kind in (SystemExit, KeyboardInterrupt, LeaveError):
        ends_by(kind("as it is"), executor, job, return_exceptions=return_exceptions)


def ends_by(
    error: BaseException, executor: Callable[[], Executor], job: Run, *, return_exceptions: bool
) -> None:
    raised_so_far = []

    def fetch(number: int) -> int:
        if number == 3:
            raised_so_far.append(number)
            raise error
        return number

    with executor() as pool, pytest.raises(type(error)) as raised:
        job(
            itertools.count(),
            Stage(int, executor=pool),
            Stage(fetch, executor=pool, retry=ALWAYS),
            return_exceptions=return_exceptions,
        )
    assert raised.value is error
    assert raised_so_far == [3]


def test_failure_on_a_thread_pool_is_no_reference_cycle_and_has_two_frames_of_ours() -> None:
    class KeptError(Exception):
        """Can be referred to weakly."""

    def fetch(_: int) -> int:
        raise KeptError

    def fail() -> weakref.ref[BaseException]:
        try:
            with ThreadPoolExecutor(1) as pool:  # its thread may be the last to know the exception
                run_two_stage([1], int, Stage(fetch, executor=pool))
        except KeptError as error:
            frames = traceback.extract_tb(error.__traceback__)
            names = [frame.name for frame in frames if "concurrent" not in Path(frame.filename).parts]
            assert names == ["fail", "run_two_stage", "__call__", "fetch"]
            return weakref.ref(error)
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


# --- what an executor may do to a job


class Refusing(Pool):
    """Refuses the nth call."""

    def __init__(self, nth: int, error: BaseException) -> None:
        super().__init__(2)
        self._refused = nth
        self._error = error

    def submit(self, *call: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
        if len(self.futures) + 1 == self._refused:
            self._refused = 0
            raise self._error
        return super().submit(*call, **named)


@each_way
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("stage_one", [False, True])
def test_submit_that_raises_ends_the_job_as_that_error_and_repeats_no_call(
    job: Run, *, stage_one: bool, return_exceptions: bool
) -> None:
    for nth in (1, 2, 5):
        for error in (RuntimeError("can't start new thread"), LeaveError("gone")):
            ends_at_submit(nth, error, job, stage_one=stage_one, return_exceptions=return_exceptions)


def ends_at_submit(
    nth: int, error: BaseException, job: Run, *, stage_one: bool, return_exceptions: bool
) -> None:
    begun: list[int] = []
    done: list[int] = []

    def fetch(number: int) -> int:
        begun.append(number)
        time.sleep(0.001)  # so that some run when it happens
        done.append(number)
        return number

    with Refusing(nth, error) as pool:
        stages = (Stage(fetch, executor=pool), int) if stage_one else (int, Stage(fetch, executor=pool))
        with pytest.raises(type(error)) as raised:
            job(itertools.count(), *stages, retry=ALWAYS, return_exceptions=return_exceptions)
        assert raised.value is error
        assert sorted(done) == sorted(begun)
        over = list(begun)
        assert len(set(over)) == len(over) < nth
        assert all(future.done() for future in pool.futures)
    assert begun == over


@pytest.mark.parametrize("stage_one", [False, True])
def test_executor_that_is_shut_down_already_is_a_clear_error(*, stage_one: bool) -> None:
    calls: list[int] = []
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    source = iter_of(3)
    stages: Any = (Stage(int, executor=pool), calls.append) if stage_one else (int, Stage(int, executor=pool))
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        run_two_stage(source, *stages)
    assert calls == []
    assert list(source) == []  # closed


def iter_of(number: int) -> Iterator[int]:
    yield from range(number)


def test_executor_that_is_shut_down_meanwhile_is_an_error_and_no_hang() -> None:
    pool = Pool(1)

    def fetch(number: int) -> int:
        until(lambda: len(pool.futures) == 6)
        pool.shutdown(wait=False, cancel_futures=True)
        return number

    with pytest.raises((RuntimeError, CancelledError), match=r"cancelled the call|after shutdown"):
        run_two_stage(range(50), list, Stage(fetch, workers=6, executor=pool), batch_size=50)
    pool.shutdown()


class Cancelling(Pool):
    """Cancels the second call before it runs, and the fourth."""

    def __init__(self) -> None:
        super().__init__(2)
        self._calls = itertools.count(1)

    def submit(self, *call: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
        if next(self._calls) in {2, 4}:
            future: Future[Any] = Future()
            future.cancel()
            return future
        return super().submit(*call, **named)


@each_way
@pytest.mark.parametrize("stage_one", [False, True])
def test_call_that_the_executor_cancels_has_failed(job: Run, *, stage_one: bool) -> None:
    def on(pool: Executor, **settings: Any) -> tuple[Any, Any]:  # noqa: ANN401 - a stage's
        if stage_one:
            return Stage(int, executor=pool, workers=1, **settings), text
        return int, Stage(text, executor=pool, workers=1, **settings)

    with Cancelling() as pool, pytest.raises(CancelledError, match="cancelled the call before it ran"):
        job(range(5), *on(pool))
    with Cancelling() as pool:
        results = job(range(5), *on(pool), return_exceptions=True)
    assert Counter(map(type, results)) == {str: 3, CancelledError: 2}
    with Cancelling() as pool:
        assert job(range(5), *on(pool, retry=ALWAYS)) == texts(range(5))


def test_futures_are_let_go_when_they_have_ended() -> None:
    """And not by the collector: Dask keeps an answer, and computes a lost one again, while there is one."""
    futures: list[weakref.ref[Future[Any]]] = []

    class Weak(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
            future = super().submit(fn, *args, **named)
            futures.append(weakref.ref(future))
            return future

    gc.collect()
    gc.disable()
    try:
        with Weak(3) as pool:
            assert run_two_stage(range(100), str, Stage(len, executor=pool, workers=3)) == [1] * 10 + [2] * 90
            until(lambda: not any(future() for future in futures))
    finally:
        gc.enable()
    assert len(futures) == 100
