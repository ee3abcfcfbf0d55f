"""Attempts that are given up on real threads: they hang until a test sets an event.

A clock that the test puts forward says for how long.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import signal
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
from alone import Alone, number_of, numbered
from common import (
    AT_ONCE,
    PATIENCE,
    Clock,
    LeaveError,
    books,
    given_up_in,
    nothing_collected,
    ours,
    switching,
    until,
)
from fakes import each, stage
from forms import iterate
from scripts import running
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_none,
)

from twostage import (
    AttemptTimeout,
    Outcome,
    Stage,
    iter_two_stage,
)
from twostage.running import pool as pools
from twostage.running.pool import PoolRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from subprocess import Popen


class Hanging:
    """A function whose attempts for some arguments hang until they are released, or fail then.

    Each other attempt answers at once, with what it was asked and which attempt that was.
    """

    def __init__(self, *hanging: tuple[Any, int]) -> None:
        self.began: Counter[Any] = Counter()
        self.ended: list[tuple[Any, int]] = []
        self.threads: set[threading.Thread] = set()  # of those that hang
        self.fails: type[BaseException] | None = None
        self._lock = threading.Lock()
        self._released = {one: threading.Event() for one in hanging}

    def __call__(self, argument: Any) -> str:  # noqa: ANN401 - any item or token
        with self._lock:
            self.began[argument] += 1
            this = argument, self.began[argument]
        if this in self._released:
            thread = threading.current_thread()
            self.threads.add(thread)
            assert self._released[this].wait(PATIENCE)
            self.threads.remove(thread)
            self.ended.append(this)
            if self.fails is not None:
                raise self.fails
        return f"{this[0]}{this[1]}"

    def hang(self, number: int) -> None:
        """Waits until so many hang."""
        until(lambda: len(self.threads) == number, f"{number} hanging")

    def release(self, *these: tuple[Any, int]) -> None:
        for this in these or self._released:
            self._released[this].set()


@contextmanager
def released(*functions: Hanging) -> Iterator[None]:
    """Has all go on that hangs still, so that no thread is left."""
    try:
        yield
    finally:
        for function in functions:
            function.release()
        until(lambda: not ours())


def runner_of(outcomes: Any, line: int = 1) -> PoolRunner:  # noqa: ANN401 - of anything
    runner = books(outcomes).lines[line].runner
    assert isinstance(runner, PoolRunner)
    return runner


def begun(outcomes: Any) -> dict[Any, Any]:  # noqa: ANN401 - of anything
    """Takes the first outcome, so that the job goes on by itself; returns the results, which may grow."""
    first = next(outcomes)
    return {first.item: first.result}


def rest(outcomes: Any) -> dict[Any, Any]:  # noqa: ANN401 - of anything
    return {outcome.item: outcome.exception or outcome.result for outcome in outcomes}


@pytest.mark.parametrize("place", ["stage one", "stage two"])
def test_thread_that_hangs_is_replaced(place: str, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fetch = Hanging(("b", 1))
    hanging = stage(fetch, attempt_timeout=30, retry=AT_ONCE)
    stages = (hanging, str) if place == "stage one" else (str, hanging)
    with released(fetch):
        with iter_two_stage("abc", *stages) as outcomes:
            results = begun(outcomes)
            fetch.hang(1)
            clock.advance(29)
            assert not given_up_in(caplog)
            clock.advance(1)
            results |= rest(outcomes)
        assert results == {"a": "a1", "b": "b2", "c": "c1"}
        assert len(given_up_in(caplog)) == 1
        until(lambda: {*ours()} == fetch.threads)  # it alone is left
        assert fetch.ended == []


def test_late_answer_is_not_that_of_the_attempt_which_runs(clock: Clock) -> None:
    fetch = Hanging(("b", 1), ("b", 2))
    settings = Stage(fetch, attempt_timeout=30, retry=AT_ONCE, workers=2)
    with released(fetch), iter_two_stage("ab", str, settings) as outcomes:
        results = begun(outcomes)
        fetch.hang(1)
        clock.advance(30)
        fetch.hang(2)
        runner = runner_of(outcomes)
        assert (runner.out, runner.given_up) == (1, 1)
        fetch.release(("b", 1))
        until(lambda: runner.given_up == 0)
        assert runner.out == 1
        fetch.release(("b", 2))
        assert results | rest(outcomes) == {"a": "a1", "b": "b2"}
    assert fetch.ended == [("b", 1), ("b", 2)]


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])))
def test_late_ends_of_one_call_come_in_any_order(order: tuple[int, ...], clock: Clock) -> None:
    fetch = Hanging(("b", 1), ("b", 2), ("b", 3))
    settings = Stage(fetch, attempt_timeout=30, retry=AT_ONCE, workers=3)
    with released(fetch), iter_two_stage("ab", str, settings) as outcomes:
        results = begun(outcomes)
        for number in (1, 2):
            fetch.hang(number)
            clock.advance(30)
        fetch.hang(3)
        for nth in order[: order.index(3) + 1]:
            fetch.release(("b", nth))
            until(partial(fetch.ended.__contains__, ("b", nth)))
        assert results | rest(outcomes) == {"a": "a1", "b": "b3"}


def test_places_are_taken_by_others_until_as_many_hang_as_there_are(clock: Clock) -> None:
    """Three workers; at once run no more than three that were not given up."""
    fetch = Hanging(*((item, 1) for item in range(1, 7)))
    settings = stage(fetch, attempt_timeout=30, retry=None, workers=3)
    with released(fetch):
        with iter_two_stage(
            range(20), each(int), settings, batch_size=20, return_exceptions=True
        ) as outcomes:
            results = begun(outcomes)
            runner = runner_of(outcomes)

            def assert_state(hanging: int, out: int, gone: int) -> None:
                fetch.hang(hanging)
                clock.wake_up()
                assert (runner.out, runner.given_up, len(fetch.threads)) == (out, gone, hanging)

            assert_state(3, 3, 0)  # 1, 2 and 3
            clock.advance(20)
            fetch.release((2, 1))
            until(lambda: fetch.began[4])
            clock.advance(10)  # 4 is younger than that
            assert_state(5, 3, 2)
            assert sorted(fetch.began) == [*range(7)]
            clock.advance(30)
            assert_state(5, 0, 5)
            fetch.release((1, 1))
            until(lambda: runner.given_up == 4)
            fetch.release((3, 1))
            until(lambda: runner.given_up == 3)
            assert_state(3, 0, 3)
            assert len(fetch.began) == 7
            fetch.release((5, 1))  # from here on there is a worker again
            results |= rest(outcomes)
        until(lambda: {*ours()} == fetch.threads)
        assert len(fetch.threads) == 2
    late = {1, 3, 4, 5, 6}
    assert {item for item, result in results.items() if isinstance(result, AttemptTimeout)} == late
    assert all(results[item] == f"{item}1" for item in range(20) if item not in late)
    assert fetch.began == Counter(range(20))


def test_after_patience_the_job_on_threads_ends_without_those_that_hang(clock: Clock) -> None:
    fetch = Hanging((1, 1), (2, 1))
    settings = stage(fetch, attempt_timeout=30, patience=60, retry=None, workers=2)
    with released(fetch):
        outcomes = iter_two_stage(range(9), each(int), settings, batch_size=9, return_exceptions=True)
        begun(outcomes)
        fetch.hang(2)
        clock.advance(30)
        clock.advance(59)
        assert not runner_of(outcomes)._stopped
        clock.advance(1)
        with pytest.raises(AttemptTimeout, match="stage two: 2 attempts were given up"):
            list(outcomes)
        assert len(fetch.threads) == 2
        until(lambda: {*ours()} == fetch.threads)


# --- ends, on threads


@contextmanager
def meanwhile(ending: threading.Event, act: Callable[[], object]) -> Iterator[None]:
    """Has `act` be called while the job ends."""

    def wait() -> None:
        assert ending.wait(PATIENCE)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_patience_ends_on_threads_while_an_item_lingers(clock: Clock) -> None:
    """It lingers for another one to fill its batch, so no start is tried."""
    fetch = Hanging(("a", 1))
    begins, over = threading.Event(), threading.Event()

    def source() -> Iterator[str]:
        yield from "abc"
        assert over.wait(PATIENCE)

    def fetch_tokens(batch: list[str]) -> list[str]:
        begins.set()
        return [fetch(item) for item in batch]

    settings = stage(fetch_tokens, workers=1, batch_size=2, attempt_timeout=10, patience=60, retry=None)
    outcomes = iter_two_stage(source(), settings, str, return_exceptions=True, linger=500)
    line = books(outcomes).lines[0]

    def let_time_pass() -> None:
        until(lambda: len(line.waiting) == 1)
        for seconds in (10, 60):
            clock.advance(seconds)

    with released(fetch):
        try:
            with (
                meanwhile(begins, let_time_pass),
                pytest.raises(AttemptTimeout, match="stage one: 1 attempts were given up"),
            ):
                list(outcomes)
        finally:
            over.set()


@pytest.mark.parametrize("way", ["close", "raise", "interrupt"])
def test_left_job_awaits_what_runs_and_not_what_was_given_up(
    way: str, clock: Clock, ending: threading.Event
) -> None:
    fetch = Hanging((1, 1), (2, 1), (3, 1))
    settings = stage(fetch, attempt_timeout=30, retry=None, workers=2)
    error = {"raise": LookupError, "interrupt": KeyboardInterrupt}.get(way)
    with released(fetch):
        outcomes = iter_two_stage(range(9), each(int), settings, batch_size=9, return_exceptions=True)
        begun(outcomes)
        fetch.hang(2)
        clock.advance(20)
        fetch.release((2, 1))
        until(lambda: fetch.began[3])
        clock.advance(10)  # 1 is given up, and another one takes its place; so 4 and the others are done
        with (
            meanwhile(ending, lambda: fetch.release((3, 1))),
            pytest.raises(error) if error is not None else nullcontext(),
            outcomes,
        ):
            if error is not None:
                raise error
        assert fetch.ended == [(2, 1), (3, 1)]
        until(lambda: {*ours()} == fetch.threads)
        assert len(fetch.threads) == 1


@pytest.mark.parametrize("leave", [False, True])
def test_job_that_ends_gives_up_what_hangs_in_its_time(
    clock: Clock, ending: threading.Event, *, leave: bool
) -> None:
    fetch = Hanging((1, 1), (2, 1))
    fetch.fails = ZeroDivisionError
    settings = stage(fetch, attempt_timeout=30, retry=None, workers=2)
    with released(fetch):
        outcomes = iter_two_stage(range(9), each(int), settings, batch_size=9)
        begun(outcomes)
        fetch.hang(2)
        with meanwhile(ending, lambda: clock.advance(30)):
            if leave:
                outcomes.close()
            else:
                fetch.release((2, 1))
                with pytest.raises(ZeroDivisionError):
                    list(outcomes)
        until(lambda: {*ours()} == fetch.threads)
        assert len(fetch.threads) == 1 + leave


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit, LeaveError])
@pytest.mark.parametrize("over", [False, True])
def test_late_failure_in_a_thread_is_dropped_whatever_it_is(
    error: type[BaseException], clock: Clock, caplog: pytest.LogCaptureFixture, *, over: bool
) -> None:
    """It comes while the job goes on, or when that is over."""
    fetch = Hanging((1, 1))
    fetch.fails = error
    settings = stage(fetch, attempt_timeout=30, retry=AT_ONCE, workers=2)
    with released(fetch):
        outcomes = iter_two_stage(range(9), each(int), settings, batch_size=9, window=9)
        results = begun(outcomes)
        fetch.hang(1)
        clock.advance(30)
        if not over:
            fetch.release()
            until(lambda: runner_of(outcomes).given_up == 0)
        results |= rest(outcomes)
        assert results == {item: f"{item}{1 + (item == 1)}" for item in range(9)}
    assert fetch.ended == [(1, 1)]
    assert all(record.levelno < logging.ERROR for record in caplog.records)


def test_handler_of_the_warning_that_raises_ends_the_job(clock: Clock) -> None:
    class Handler(logging.Handler):
        """Lets its failures out, as a user's may."""

        def emit(self, record: logging.LogRecord) -> None:
            raise LookupError(record.getMessage())

    fetch = Hanging((1, 1), (2, 1))
    handler = Handler(logging.WARNING)
    logging.getLogger("twostage").addHandler(handler)
    try:
        with released(fetch):
            settings = stage(fetch, attempt_timeout=30, retry=None)
            outcomes = iter_two_stage(range(3), each(int), settings, batch_size=3)
            begun(outcomes)
            fetch.hang(2)
            clock.advance(30)
            with pytest.raises(LookupError, match=r"stage two, [12]: the attempt takes longer than 30 s"):
                list(outcomes)
    finally:
        logging.getLogger("twostage").removeHandler(handler)


def test_thread_that_cannot_be_started_for_another_ends_the_job(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Hanging((1, 1))
    error = RuntimeError("can't start new thread")

    def fail(*_: object) -> None:
        raise error

    with released(fetch):
        outcomes = iter_two_stage(
            range(2), each(int), stage(fetch, attempt_timeout=30, workers=1), batch_size=2
        )
        begun(outcomes)
        fetch.hang(1)
        with monkeypatch.context() as patch:
            patch.setattr(ThreadPoolExecutor, "submit", fail)
            clock.advance(30)
            fetch.release()
            with pytest.raises(RuntimeError) as raised:
                list(outcomes)
        assert raised.value is error


# --- inside the pool


@contextmanager
def alone(fetch: Hanging, *, workers: int, attempt_timeout: float = 30) -> Iterator[Alone]:
    alone = Alone(
        PoolRunner, lambda call: fetch(number_of(call)), workers=workers, attempt_timeout=attempt_timeout
    )
    with released(fetch):
        try:
            yield alone
        finally:
            alone.close()


def test_runner_gives_the_place_to_what_was_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    """One worker, two calls: the second begins though the first never ends."""
    fetch = Hanging((1, 1))
    with alone(fetch, workers=1) as one:
        one.runner.start([numbered(1), numbered(2)])
        fetch.hang(1)
        one.now += 30
        one.runner.give_up(one.now)
        assert (one.runner.out, one.runner.given_up) == (1, 1)
        one.take(2)
        (first, _, error), (second, answer, _) = one.ends
        assert (number_of(first), type(error)) == (1, AttemptTimeout)
        assert (number_of(second), answer) == (2, "21")
        one.runner.stop()
        one.runner.join()
        assert {*ours()} == fetch.threads  # at once: it alone is not waited for
    assert len(given_up_in(caplog)) == 1


def test_runner_gives_up_when_it_said_that_it_would() -> None:
    """Not a moment later, or the coordinator would be woken again and again until then."""
    rng = random.Random(0)
    for _ in range(200):
        fetch = Hanging((1, 1))
        with alone(fetch, workers=1, attempt_timeout=rng.uniform(0, 2)) as one:
            one.now = rng.uniform(0, 1e6)
            assert one.runner.next_overdue(one.now) == math.inf
            one.runner.start([numbered(1)])
            fetch.hang(1)
            due = one.runner.next_overdue(one.now + 1)
            assert due == one.runner.next_overdue(one.now + 2) <= one.now + 2
            one.runner.give_up(math.nextafter(due, 0))
            assert one.runner.given_up == 0
            one.runner.give_up(due)
            assert one.runner.given_up == 1
            assert one.runner.next_overdue(due) == math.inf


def test_thread_that_the_pool_takes_for_idle_holds_nothing_back(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on, a submit at the wrong moment makes a pool count one idle thread too many.

    It then starts none for the next task, which waits for one that hangs.
    """

    class Mistaken(ThreadPoolExecutor):
        """Counts one too many from its first task on."""

        def submit(self, *call: Any, **named: Any) -> Future[Any]:  # noqa: ANN401 - any call
            future = super().submit(*call, **named)
            if len(self._threads) == 1:
                self._idle_semaphore.release()
            return future

    monkeypatch.setattr(pools, "ThreadPoolExecutor", Mistaken)
    fetch = Hanging((1, 1), (1, 2), (1, 3))
    settings = stage(fetch, attempt_timeout=30, workers=5, retry=AT_ONCE)
    with released(fetch), iter_two_stage(range(2), each(int), settings, batch_size=2) as outcomes:
        results = begun(outcomes)
        for number in (1, 2, 3):
            fetch.hang(number)
            clock.advance(30)
        assert results | rest(outcomes) == {0: "01", 1: "14"}


def test_function_is_never_called_with_what_the_call_has_become(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread stops where it is about to call, for so long that the item is back at stage one."""
    stops = itertools.count()

    def token_of(outcome: Outcome[str, str, str]) -> object:
        if outcome.item == "b" and next(stops) == 0:
            clock.advance(30)
        return outcome.token

    monkeypatch.setattr("twostage.job.stages._token", token_of)
    asked: list[str] = []
    made = itertools.count()

    def fetch_token(item: str) -> str:
        return f"{item}{next(made)}"

    def fetch_result(token: str) -> str:
        asked.append(token)
        return token

    with iter_two_stage(
        "ab", fetch_token, Stage(fetch_result, attempt_timeout=20), refresh_token_on=AttemptTimeout
    ) as outcomes:
        results = rest(outcomes)
    until(lambda: not ours())
    assert None not in asked
    assert results["b"] in asked


@pytest.mark.parametrize("failure_is_kept", [False, True])
def test_nothing_is_kept_of_an_attempt_that_has_ended_late(clock: Clock, *, failure_is_kept: bool) -> None:
    """If the user keeps its failure, then what the function's own frames hold, and no more."""

    class Kept(str):
        """Can be referred to weakly."""

        __slots__ = ("__weakref__",)

    class KeptError(Exception):
        pass

    fetch = Hanging(("b", 1))
    kept: list[weakref.ref[Any]] = []
    failures: list[KeptError] = []

    def keep(one: Any) -> Any:  # noqa: ANN401 - of anything
        kept.append(weakref.ref(one))
        return one

    def fetch_token(item: Kept) -> str:
        return item.upper()

    def fetch_result(token: str) -> Kept:
        answer: Kept = keep(Kept(fetch(token.lower())))
        if not fetch.ended:
            return answer
        del answer
        if not failure_is_kept:
            raise keep(KeptError())
        failures.append(KeptError())
        raise failures[0]

    with released(fetch), nothing_collected():
        settings = stage(fetch_result, attempt_timeout=30, retry=AT_ONCE, workers=2)
        with iter_two_stage((keep(Kept(item)) for item in "ab"), fetch_token, settings) as outcomes:
            assert len(begun(outcomes)) == 1
            fetch.hang(1)
            clock.advance(30)
            assert len(rest(outcomes)) == 1
        fetch.release()
        until(lambda: not ours())
        assert len(failures) == failure_is_kept
        assert len(kept) == 6 - failure_is_kept
        assert [one() for one in kept if one() is not None] == []


def test_coordinator_sleeps_while_attempts_hang(clock: Clock) -> None:
    """It is woken by what happens, and when the next one is to be given up; never again and again."""
    fetch = Hanging((1, 1), (2, 1))
    settings = stage(fetch, attempt_timeout=30, patience=None, retry=None, workers=2)
    with (
        released(fetch),
        iter_two_stage(range(9), each(int), settings, batch_size=9, return_exceptions=True) as outcomes,
    ):
        begun(outcomes)
        fetch.hang(2)
        clock.wake_up()
        waits = len(clock.waits)
        clock.wake_up()
        assert len(clock.waits) in (waits + 1, waits + 2)
        assert all(wait is not None and 20 < wait <= 30 for wait in clock.waits[waits - 1 :])
        clock.advance(30)
        waits = len(clock.waits)
        clock.wake_up()
        assert len(clock.waits) in (waits + 1, waits + 2)
        assert {*clock.waits[waits - 1 :]} == {math.inf}
        fetch.release()
        rest(outcomes)
    assert len(clock.waits) < 60


def test_stage_without_it_is_as_ever(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fetch = Hanging((1, 1))
    with (
        released(fetch),
        iter_two_stage(range(3), stage(each(int), attempt_timeout=30, batch_size=3), fetch) as outcomes,
    ):
        results = begun(outcomes)
        line = books(outcomes).lines[1]
        fetch.hang(1)
        clock.advance(1e6)
        assert not line.gates
        assert (line.limit, line.timed) == (math.inf, False)
        assert runner_of(outcomes)._running is None
        assert clock.waits[-1] in (None, math.inf)
        fetch.release()
        assert results | rest(outcomes) == {0: "01", 1: "11", 2: "21"}
    assert not caplog.records


@pytest.mark.parametrize("seed", range(6))
def test_end_and_giving_up_race_and_one_of_them_wins(seed: int) -> None:
    """Attempts take about as long as they may; each item has one outcome, and its own."""
    rng = random.Random(seed)
    timeout = rng.choice((0.0002, 0.001, 0.002))
    durations = [timeout * rng.uniform(0.5, 1.5) for _ in range(300)]
    numbers = itertools.count()

    def fetch(argument: int) -> int:
        time.sleep(durations[next(numbers) % len(durations)])  # the attempt itself, no waiting for others
        return argument + 1

    settings: dict[str, Any] = {
        "attempt_timeout": timeout,
        "retry": Retrying(
            retry=retry_if_exception_type(AttemptTimeout), stop=stop_after_attempt(5), wait=wait_none()
        ),
    }
    logging.disable()
    try:
        with switching():
            for _ in range(2):
                results = iterate(
                    range(100),
                    Stage(fetch, workers=3, **settings),
                    Stage(fetch, workers=5, **settings),
                    return_exceptions=True,
                )
                assert len(results) == 100
                for item, result in enumerate(results):
                    assert isinstance(result, AttemptTimeout) or result == item + 2
    finally:
        logging.disable(logging.NOTSET)
    until(lambda: not ours())


# --- processes

SCRIPT: Final = """
    import atexit, threading, time
    from concurrent.futures import thread
    from twostage import Stage, iter_two_stage, run_two_stage

    atexit.register(lambda: print("exit"))
    release, ready = threading.Event(), threading.Event()

    def hang():
        HANG
        print("late", flush=True)

"""


def script(body: str, hang: str) -> AbstractContextManager[Popen[str]]:
    return running(SCRIPT.replace("HANG", hang), body)


def test_interpreter_s_exit_waits_for_those_that_were_given_up() -> None:
    """Such a one ends when pools have heard of the exit; hooks run when no thread of a pool is left."""
    body = """
        results = run_two_stage(
            "a", str, Stage(lambda token: hang(), attempt_timeout=0.01, retry=None), return_exceptions=True
        )
        print(*map(repr, results), flush=True)
    """
    with script(body, hang="while not thread._shutdown: time.sleep(0.001)") as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "AttemptTimeout('the attempt took longer than attempt_timeout=0.01 s')\nlate\nexit\n"
    assert errors == "stage two, 'a': the attempt takes longer than 0.01 s and is given up\n"
    assert process.returncode == 0


@pytest.mark.parametrize("given_up", [False, True])
def test_sigint_does_not_wait_for_what_hangs(*, given_up: bool) -> None:
    """One runs when the signal comes and is awaited; another one hangs, and was given up or will be."""
    body = """
        import twostage.job.driver
        from twostage.core.coordinator import Coordinator

        class Clock:
            ahead = 0.0

            @classmethod
            def monotonic(cls):
                return time.monotonic() + cls.ahead

        twostage.job.driver.time = Clock
        ending, hangs = threading.Event(), threading.Event()
        end = Coordinator.end

        def end_and_tell(coordinator, error):
            end(coordinator, error)
            ending.set()

        Coordinator.end = end_and_tell

        def let_time_pass():
            Clock.ahead += 30
            outcomes._job._driver.send((lambda *_: None, None, None, None))

        def wait_for(**state):
            runner = outcomes._job._coordinator.lines[1].runner
            while any(getattr(runner, name) != number for name, number in state.items()):
                time.sleep(0.001)

        def give_up_at_the_end():
            ending.wait(20)
            wait_for(out=1)
            let_time_pass()

        def source():
            yield "a"
            hangs.wait(20)
            if GIVEN_UP:
                let_time_pass()
                wait_for(out=0, given_up=1)
            else:
                threading.Thread(target=give_up_at_the_end).start()
            yield "b"

        def fetch_result(token):
            if token == "a":
                hangs.set()
                hang()
            else:
                print("ready", flush=True)
                ending.wait(20)
                print("awaited", flush=True)

        try:
            with iter_two_stage(
                source(),
                str,
                Stage(fetch_result, attempt_timeout=30, retry=None),
                return_exceptions=True,
            ) as outcomes:
                for _ in outcomes:
                    pass
        except KeyboardInterrupt:
            print("over", flush=True)
            release.set()
    """
    with script(body.replace("GIVEN_UP", str(given_up)), hang="release.wait(20)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "awaited\nover\nlate\nexit\n"
    assert errors == "stage two, 'a': the attempt takes longer than 30 s and is given up\n"
    assert process.returncode == 0
