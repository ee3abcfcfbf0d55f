"""How a job ends before its time, and what it leaves: no thread, no open source, nothing that goes on."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import (
    ALWAYS,
    PATIENCE,
    LeaveError,
    WeakItems,
    books,
    frames,
    nothing_collected,
    ours,
    source_of,
    until,
)
from forms import Run, each_way, iterate_in_order
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_fixed,
)

from twostage import Outcome, Stage, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS: Final = 3


def taken_before(kind: type[Exception], outcomes: Iterator[Outcome[Any, Any, Any]]) -> list[Any]:
    """Returns the results that are handed over before an exception is raised."""
    results = []
    try:
        for outcome in outcomes:
            results.append(outcome.result)  # noqa: PERF401 - they are wanted in spite of the exception
    except kind:
        return results
    raise AssertionError("it was not raised")


class Middle:
    """A function whose first call returns, or raises when all workers are busy; the others run to the end."""

    def __init__(self, ending: threading.Event, error: BaseException | None = None) -> None:
        self.begun: list[int] = []
        self.done: list[int] = []
        self._ending = ending
        self._error = error

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        if number > 0:
            assert self._ending.wait(PATIENCE)
        elif self._error is not None:
            until(lambda: len(self.begun) == WORKERS)
            raise self._error
        self.done.append(number)
        return number

    def wait_until_busy(self) -> None:
        """Waits until the first call is done and each worker runs one."""
        until(lambda: len(self.begun) == 1 + WORKERS)

    def assert_nothing_began(self) -> None:
        """Asserts that the calls which ran are over, and that there were no others."""
        assert sorted(self.begun) == sorted(self.done) == list(range(1 + WORKERS))


# --- close


def test_close_starts_nothing_more_and_waits_for_what_runs(ending: threading.Event) -> None:
    closed: list[str] = []
    calls = Middle(ending)
    outcomes = iter_two_stage(
        source_of(itertools.count(), closed), list, calls, batch_size=100, result_workers=WORKERS
    )
    assert next(outcomes).result == 0
    calls.wait_until_busy()
    assert not closed
    outcomes.close()
    calls.assert_nothing_began()
    assert closed == [threading.current_thread().name]
    assert not ours()


def test_close_waits_for_calls_of_stage_one_and_sends_nothing_on(ending: threading.Event) -> None:
    calls = Middle(ending)
    results: list[int] = []
    outcomes = iter_two_stage(itertools.count(), calls, results.append, token_workers=WORKERS)
    next(outcomes)
    calls.wait_until_busy()
    outcomes.close()
    calls.assert_nothing_began()
    assert results == [0]


def test_close_drops_what_waits_for_its_next_attempt() -> None:
    class Token:
        """Can be referred to weakly."""

        def __init__(self, item: str) -> None:
            self.item = item

    tokens: list[weakref.ref[Token]] = []
    waits = threading.Event()
    hour = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(3600), before_sleep=lambda _: waits.set())

    def fetch_token(item: str) -> Token:
        token = Token(item)
        tokens.append(weakref.ref(token))
        return token

    def fetch_result(token: Token) -> None:
        if token.item == "b":
            raise KeyError

    outcomes = iter_two_stage("ab", fetch_token, fetch_result, retry=hour)
    next(outcomes)
    assert waits.wait(PATIENCE)
    with nothing_collected():
        outcomes.close()
        assert not ours()
        assert [token() for token in tokens] == [None, None]


def test_after_close_there_is_nothing_and_closing_again_is_harmless() -> None:
    closed: list[str] = []
    outcomes = iter_two_stage(source_of(range(1000), closed), str, str)
    next(outcomes)
    for _ in range(3):
        outcomes.close()
        assert list(outcomes) == []
    assert len(closed) == 1


def test_close_before_the_first_next_starts_nothing() -> None:
    calls: list[object] = []

    def fetch(argument: object) -> object:
        calls.append(argument)
        return argument

    source = (item for item in range(3))
    outcomes = iter_two_stage(source, fetch, fetch)
    assert not ours()
    outcomes.close()
    assert list(outcomes) == []
    assert list(source) == []  # closed: it would yield three
    assert not calls
    assert not ours()


def test_job_at_its_end_has_closed_itself() -> None:
    outcomes = iter_two_stage("abc", str, str.upper)
    assert sorted(outcome.result for outcome in outcomes) == ["A", "B", "C"]
    assert not ours()
    assert next(outcomes, None) is None
    outcomes.close()


def test_close_does_not_close_what_the_items_come_from() -> None:
    class Items:
        """An iterable, which others may iterate as well."""

        closed = False

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

        def close(self) -> None:
            self.closed = True

    items = Items()
    assert run_two_stage(items, str, str) == ["0", "1", "2"]
    assert not items.closed


@pytest.mark.parametrize("way", ["raise", "break", "return"])
def test_leaving_the_with_block_closes(way: str, ending: threading.Event) -> None:
    closed: list[str] = []
    calls = Middle(ending)
    error = LookupError("the consumer's")

    def consume() -> None:
        with iter_two_stage(
            source_of(itertools.count(), closed), list, calls, batch_size=100, result_workers=WORKERS
        ) as outcomes:
            for _ in outcomes:
                calls.wait_until_busy()
                if way == "break":
                    break
                if way == "return":
                    return
                raise error

    if way == "raise":
        with pytest.raises(LookupError) as raised:
            consume()
        assert raised.value is error
        assert frames(error)[1:] == ["consume"]
    else:
        consume()
    calls.assert_nothing_began()
    assert len(closed) == 1
    assert not ours()


@pytest.mark.parametrize("linger", [None, 1.0])
@pytest.mark.parametrize("used", [False, True])
def test_iterator_of_any_kind_is_closed_once(linger: float | None, *, used: bool) -> None:
    class Items:
        closed = 0

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            return next(numbers)

        def close(self) -> None:
            self.closed += 1

    items, numbers = Items(), iter(range(3))
    with iter_two_stage(items, str, str, linger=linger) as outcomes:
        if used:
            assert len(list(outcomes)) == 3
    outcomes.close()
    assert items.closed == 1


def test_exception_of_the_source_s_own_closing_comes_out_when_all_is_over() -> None:
    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            raise LookupError("can't close")

    outcomes = iter_two_stage(source(), str, str)
    next(outcomes)
    with pytest.raises(LookupError, match="can't close"):
        outcomes.close()
    assert not ours()
    outcomes.close()


@each_way
def test_failure_is_not_lost_when_the_source_cannot_be_closed(job: Run) -> None:
    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            raise LookupError("can't close")

    def fetch(_: int) -> int:
        raise ValueError("the failure")

    with pytest.raises((ValueError, LookupError)) as raised:
        job(source(), fetch, str)
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, ValueError):
        error = error.__context__
    assert error is not None


# --- the source's exceptions


@each_way
def test_exception_of_the_source_ends_the_job(job: Run, ending: threading.Event) -> None:
    closed: list[str] = []
    error = LookupError("the source's")
    calls = Middle(ending)

    def source() -> Iterator[int]:
        yield from range(100)
        calls.wait_until_busy()
        raise error

    with pytest.raises(LookupError) as raised:
        job(source_of(source(), closed), list, calls, batch_size=50, result_workers=WORKERS)
    assert raised.value is error
    calls.assert_nothing_began()
    assert len(closed) == 1
    assert not ours()


@pytest.mark.parametrize("ordered", [False, True])
def test_exception_of_the_source_comes_after_the_outcomes_that_are_done(*, ordered: bool) -> None:
    finished = threading.Semaphore(0)

    def fetch(number: int) -> int:
        finished.release()
        return number

    def source() -> Iterator[int]:
        for number in range(5):
            yield number
            assert finished.acquire(timeout=PATIENCE)  # one call after the other, so each is heard of
        raise LookupError

    with iter_two_stage(source(), int, fetch, ordered=ordered) as outcomes:
        results = taken_before(LookupError, outcomes)
        assert sorted(results) == [0, 1, 2, 3, 4]
        assert next(outcomes, None) is None


# --- failures of calls


@each_way
def test_failure_in_stage_two_starts_nothing_more_and_waits_for_what_runs(
    job: Run, ending: threading.Event
) -> None:
    closed: list[str] = []
    error = ValueError()
    calls = Middle(ending, error)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - it is compared
        job(source_of(itertools.count(), closed), list, calls, batch_size=100, result_workers=WORKERS)
    assert raised.value is error
    assert sorted(calls.begun) == list(range(WORKERS))
    assert sorted(calls.done) == list(range(1, WORKERS))
    assert len(closed) == 1
    assert not ours()


@each_way
def test_failure_in_stage_one_starts_nothing_more_and_waits_for_what_runs(
    job: Run, ending: threading.Event
) -> None:
    calls = Middle(ending, ValueError())
    results: list[int] = []
    with pytest.raises(ValueError):  # noqa: PT011 - there is no other
        job(itertools.count(), calls, results.append, token_workers=WORKERS)
    assert sorted(calls.begun) == list(range(WORKERS))
    assert sorted(calls.done) == list(range(1, WORKERS))
    assert results == []  # what stage one returned meanwhile goes no further
    assert not ours()


@pytest.mark.parametrize("ordered", [False, True])
def test_failure_is_raised_after_the_outcomes_that_were_there_before_it(*, ordered: bool) -> None:
    def fetch(number: int) -> int:
        if number == 5:
            raise ValueError
        return number

    with iter_two_stage(range(10), list, fetch, batch_size=10, result_workers=1, ordered=ordered) as outcomes:
        results = [next(outcomes).result]
        until(lambda: not ours())  # the job has failed, and the consumer was away
        results += taken_before(ValueError, outcomes)
        assert results == [0, 1, 2, 3, 4]
        assert next(outcomes, None) is None


def test_in_order_what_runs_before_the_failed_one_is_awaited_and_handed_over(ending: threading.Event) -> None:
    last_is_done = threading.Event()

    def fetch(number: int) -> int:
        if number == 0:
            assert ending.wait(PATIENCE)
        if number == 1:
            assert last_is_done.wait(PATIENCE)
            raise ValueError
        if number == 2:
            last_is_done.set()
        return number

    with iter_two_stage(range(3), int, fetch, ordered=True) as outcomes:
        assert taken_before(ValueError, outcomes) == [0]


def test_in_order_what_is_done_before_the_failed_one_is_not_kept_back_by_what_never_will_be() -> None:
    def fetch(number: int) -> int:
        if number == 0:
            raise ConnectionError  # and waits for its next attempt when the job ends
        if number == 3:
            raise ValueError
        return number

    hour = Retrying(
        retry=retry_if_exception_type(ConnectionError), stop=stop_after_attempt(2), wait=wait_fixed(3600)
    )
    stage = Stage(fetch, workers=1, retry=hour)
    with iter_two_stage(range(5), list, stage, batch_size=5, ordered=True) as outcomes:
        assert taken_before(ValueError, outcomes) == [1, 2]


# --- what is no Exception


@each_way
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("place", ["fetch_token", "fetch_result", "source"])
def test_what_is_no_exception_ends_the_job_and_is_raised_as_it_is(
    place: str, job: Run, *, return_exceptions: bool
) -> None:
    for kind in (SystemExit, KeyboardInterrupt, LeaveError):
        ends_by(kind("as it is"), place, job, return_exceptions=return_exceptions)


def ends_by(error: BaseException, place: str, job: Run, *, return_exceptions: bool) -> None:
    closed: list[str] = []
    raisers = 0

    def fail_at(here: str) -> Callable[[int], int]:
        def fetch(number: int) -> int:
            nonlocal raisers
            if place == here and number == 3:
                raisers += 1
                raise error
            return number

        return fetch

    items = range(10) if place == "source" else itertools.count()
    source = source_of(items, closed, error if place == "source" else None)
    with pytest.raises(type(error)) as raised:
        job(
            source,
            fail_at("fetch_token"),
            fail_at("fetch_result"),
            retry=ALWAYS,
            return_exceptions=return_exceptions,
        )
    assert raised.value is error
    assert not hasattr(error, "__notes__")
    assert raisers == (place != "source")
    assert len(closed) == 1
    assert not ours()


@pytest.mark.parametrize("stage_one", [False, True])
def test_stop_iteration_of_a_function_does_not_end_a_loop_as_if_complete(*, stage_one: bool) -> None:
    def fetch(number: int) -> int:
        if number == 2:
            raise StopIteration("of the user's")
        return number

    functions = (fetch, int) if stage_one else (int, fetch)
    outcomes = iter_two_stage(range(4), *functions)
    with pytest.raises(RuntimeError, match="raised StopIteration") as raised:
        list(outcomes)
    assert isinstance(raised.value.__cause__, StopIteration)
    assert raised.value.__cause__.value == "of the user's"
    assert not ours()
    assert list(outcomes) == []
    with pytest.raises(StopIteration, match="of the user's"):  # nobody iterates here
        run_two_stage(range(4), *functions)
    kept = run_two_stage(range(4), *functions, return_exceptions=True)
    assert [type(one) for one in kept] == [int, int, StopIteration, int]
    with iter_two_stage(range(4), *functions, return_exceptions=True) as outcomes:
        exceptions = {outcome.index: type(outcome.exception) for outcome in outcomes if outcome.exception}
    assert exceptions == {2: StopIteration}


# --- nobody closes


def test_iterator_that_is_dropped_is_cleaned_up_without_waiting() -> None:
    closed: list[str] = []
    release = threading.Event()  # set only when dropping has returned
    calls = Middle(release)
    outcomes = iter_two_stage(
        source_of(itertools.count(), closed), list, calls, batch_size=100, result_workers=WORKERS
    )
    assert next(outcomes).result == 0
    calls.wait_until_busy()
    runner = books(outcomes).lines[1].runner
    del outcomes
    assert closed == [threading.current_thread().name]
    until(lambda: runner.out == WORKERS)  # what waited has been dropped
    release.set()
    until(lambda: not ours())
    calls.assert_nothing_began()


def test_iterator_that_is_dropped_unused_leaves_nothing() -> None:
    closed: list[str] = []
    iter_two_stage(source_of(range(3), closed), str, str)
    assert not ours()


def test_iterator_in_a_reference_cycle_may_be_collected_by_a_worker() -> None:
    closed: list[str] = []
    dropped = threading.Event()
    collectors: list[str] = []

    def fetch(number: int) -> int:
        if number == 1:
            assert dropped.wait(PATIENCE)
            collectors.append(threading.current_thread().name)
            gc.collect()
        return number

    def consume() -> None:
        outcomes = iter_two_stage(
            source_of(itertools.count(), closed), list, fetch, batch_size=100, result_workers=1
        )
        cycle: list[object] = [outcomes]
        cycle.append(cycle)
        assert next(outcomes).result == 0

    gc.disable()  # so that nobody else collects
    try:
        consume()
        assert not closed
        dropped.set()
        until(lambda: not ours())
    finally:
        gc.enable()
    assert closed == collectors
    assert closed[0].startswith("twostage")


# --- from other threads


def test_each_next_may_come_from_another_thread() -> None:
    closed: list[str] = []
    outcomes = iter_two_stage(source_of(range(20), closed), list, str, batch_size=3, ordered=True, window=6)
    taken: list[Outcome[int, int, str] | None] = []
    while not taken or taken[-1] is not None:
        thread = threading.Thread(target=lambda: taken.append(next(outcomes, None)))
        thread.start()
        thread.join()
    assert [outcome.result for outcome in taken if outcome] == [str(number) for number in range(20)]
    assert len(closed) == 1
    assert not ours()


def test_each_next_may_be_awaited_in_a_thread() -> None:
    async def consume() -> list[int]:
        results: list[int] = []
        with iter_two_stage(range(20), str, int, batch_size=None) as outcomes:
            # A coroutine can't be given the StopIteration of `next(outcomes)`.
            while (outcome := await asyncio.to_thread(next, outcomes, None)) is not None:
                results.append(outcome.result)
        return results

    assert sorted(asyncio.run(consume())) == list(range(20))
    assert not ours()


def test_exception_reaches_the_thread_of_the_next_that_meets_it() -> None:
    def fetch(number: int) -> int:
        raise ValueError(number)

    async def consume() -> None:
        with iter_two_stage(range(3), int, fetch) as outcomes:
            await asyncio.to_thread(next, outcomes)

    with pytest.raises(ValueError, match=r"[012]"):
        asyncio.run(consume())
    assert not ours()


def test_job_may_be_closed_by_another_thread_than_the_one_that_read() -> None:
    closed: list[str] = []
    outcomes = iter_two_stage(source_of(itertools.count(), closed), str, str)
    next(outcomes)
    thread = threading.Thread(target=outcomes.close, name="the closing one")
    thread.start()
    thread.join()
    assert closed == ["the closing one"]
    assert not ours()


# --- what an exception keeps


@each_way
def test_traceback_of_the_source_s_exception_has_one_frame_of_ours(job: Run) -> None:
    def source() -> Iterator[int]:
        yield 0
        raise LookupError

    with pytest.raises(LookupError) as raised:
        job(source(), str, str)
    ours_in_it = [
        frame
        for frame, _ in traceback.walk_tb(raised.value.__traceback__)
        if "twostage" in frame_module(frame)
    ]
    assert len(ours_in_it) == 1
    assert frames(raised.value)[-1] == "source"


def frame_module(frame: Any) -> str:  # noqa: ANN401 - a frame
    return str(frame.f_globals["__name__"]).partition(".")[0]


@each_way
@pytest.mark.parametrize("kind", [LookupError, LeaveError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["fetch_result", "source", "consumer"])
def test_exception_is_no_reference_cycle(kind: type[BaseException], place: str, job: Run) -> None:
    class Kept(kind):  # type: ignore[misc, valid-type] # a class of Python, so that it can be referred to
        pass

    def source() -> Iterator[int]:
        yield 0
        if place == "source":
            raise Kept
        yield 1

    def fetch(number: str) -> str:
        if place == "fetch_result":
            raise Kept
        return number

    def fail() -> weakref.ref[BaseException]:
        try:
            if place == "consumer":
                with iter_two_stage(source(), str, fetch, ordered=job is iterate_in_order) as outcomes:
                    for _ in outcomes:
                        raise Kept  # noqa: TRY301 - this is the consumer
            job(source(), str, fetch)
        except Kept as error:
            return weakref.ref(error)
        raise AssertionError

    with nothing_collected():
        assert fail()() is None


def test_closed_job_keeps_neither_items_nor_outcomes(ending: threading.Event) -> None:
    source = WeakItems()
    calls = Middle(ending)
    numbers = itertools.count()
    outcomes = iter_two_stage(
        iter(source),
        lambda batch: [next(numbers) for _ in batch],
        calls,
        batch_size=100,
        result_workers=WORKERS,
    )
    assert next(outcomes).result == 0
    calls.wait_until_busy()
    with nothing_collected():
        outcomes.close()
        assert len(source.read) > 100
        assert source.kept() == []
