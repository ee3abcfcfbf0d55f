"""The pools of our own, threads and tasks, as runners: what is handed over is made once, or comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
import weakref
from collections import Counter, deque
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from alone import Alone, number_of, numbered
from common import PATIENCE, WeakItem, frames, nothing_collected, ours, until
from loops import ENDS, LOOPS, assert_lives

from twostage import AsyncExecutor, AttemptTimeout, Outcome
from twostage.running import pool as pools
from twostage.running import tasks
from twostage.running.async_executor import LOT
from twostage.running.pool import PoolRunner
from twostage.running.tasks import CALLS_A_TASK, TaskRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twostage.base.records import Call
    from twostage.base.runner import Runner


class Held:
    """A function whose calls wait until the test lets them go on; as a plain and as a coroutine function."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.running = self.most = 0
        self._lock = threading.Lock()
        self._gates: dict[int, Future[Any]] = {}

    def gate(self, number: int) -> Future[Any]:
        with self._lock:
            return self._gates.setdefault(number, Future())

    def open(self, *numbers: int, error: BaseException | None = None) -> None:
        for number in numbers:
            if error is None:
                self.gate(number).set_result(f"answer {number}")
            else:
                self.gate(number).set_exception(error)

    def open_all(self) -> None:
        for number in {*self.began}:
            if not self.gate(number).done():
                self.open(number)

    @contextlib.contextmanager
    def _runs(self, number: int) -> Iterator[None]:
        with self._lock:
            self.began.append(number)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def plain(self, call: Call) -> Any:  # noqa: ANN401 - whatever the test says
        with self._runs(number_of(call)):
            return self.gate(number_of(call)).result(PATIENCE)

    async def awaited(self, call: Call) -> Any:  # noqa: ANN401 - whatever the test says
        with self._runs(number_of(call)):
            return await asyncio.shield(asyncio.wrap_future(self.gate(number_of(call))))

    def hold(self, *numbers: int) -> None:
        until(lambda: sorted(self.began) == sorted(numbers), f"{numbers} to begin")


class Pool(NamedTuple):
    """One of our own: its runner, and which of two functions it runs."""

    make: Callable[..., Runner]
    awaits: bool

    @contextlib.contextmanager
    def alone(self, plain: Any, awaited: Any, **settings: Any) -> Iterator[Alone]:  # noqa: ANN401 - of any
        one = Alone(self.make, awaited if self.awaits else plain, **settings)
        try:
            yield one
        finally:
            one.close()

    @contextlib.contextmanager
    def held(self, held: Held | None = None, **settings: Any) -> Iterator[tuple[Alone, Held]]:  # noqa: ANN401
        held = held or Held()
        with self.alone(held.plain, held.awaited, **settings) as one:
            try:
                yield one, held
            finally:
                held.open_all()


def made_by(executor: AsyncExecutor) -> Pool:
    return Pool(partial(_task_runner, executor), awaits=True)


def _task_runner(executor: AsyncExecutor, work: Any, *others: Any) -> Runner:  # noqa: ANN401 - of any
    return TaskRunner(work, executor.submit, *others)


@pytest.fixture(params=["threads", *LOOPS])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    if request.param == "threads":
        yield Pool(PoolRunner, awaits=False)
    else:
        with AsyncExecutor(loop_factory=LOOPS[request.param]) as executor:
            yield made_by(executor)
    assert not ours()


def calls(numbers: range) -> list[Call]:
    return [numbered(number) for number in numbers]


def ended(one: Alone) -> dict[int, Any]:
    """Returns how the calls have ended, none of them twice."""
    ends = {number_of(call): error or answer for call, answer, error in one.ends}
    assert len(ends) == len(one.ends)
    return ends


# --- start


def test_answers_and_failures_are_events(pool: Pool) -> None:
    error = LookupError()
    with pool.held(workers=5) as (one, held):
        held.open(0, 1)
        held.open(2, error=error)
        one.runner.start(calls(range(2)))
        one.runner.start(calls(range(2, 3)))
        assert one.runner.out == 3
        one.take(3)
        assert one.runner.out == 0
    assert ended(one) == {0: "answer 0", 1: "answer 1", 2: error}
    assert frames(error)[0] in ("plain", "awaited")


def test_as_many_run_as_there_are_workers_and_never_more(pool: Pool) -> None:
    with pool.held(workers=3) as (one, held):
        one.runner.start(calls(range(10)))
        held.hold(0, 1, 2)
        for number in range(10):
            held.open(number)
            held.hold(*range(min(number + 4, 10)))
        one.take(10)
        one.runner.start(calls(range(10, 12)))
        one.runner.start(calls(range(12, 20)))
        held.hold(*range(13))
        held.open(*range(10, 20))
        one.take(20)
    assert held.most == 3
    assert ended(one) == {number: f"answer {number}" for number in range(20)}


def test_calls_begin_in_their_order_but_first_ones_before_all_that_wait(pool: Pool) -> None:
    with pool.held(workers=1) as (one, held):
        one.runner.start(calls(range(1)))
        held.hold(0)
        one.runner.start(calls(range(1, 4)))
        one.runner.start(calls(range(4, 6)), first=True)
        one.runner.start(calls(range(6, 7)))
        one.runner.start(calls(range(7, 8)), first=True)
        held.open(*range(8))
        one.take(8)
    assert held.began == [0, 4, 5, 7, 1, 2, 3, 6]


def test_nothing_follows_a_failure_before_the_coordinator_has_heard_of_it(pool: Pool) -> None:
    with pool.held(workers=2) as (one, held):
        one.runner.start(calls(range(6)))
        held.hold(0, 1)
        held.open(2, 3, 4, 5)
        held.open(0, 1, error=LookupError())
        until(lambda: held.running == 0)
        until(lambda: one.completions._queue.qsize() >= 2)
        assert held.began == [0, 1]
        assert sorted(map(number_of, one.runner.take_back())) == [2, 3, 4, 5]
        one.take(2)
        one.runner.start(calls(range(2, 4)))
        one.take(4)
    assert sorted(held.began) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", ENDS, ids=repr)
def test_error_that_is_no_exception_is_the_failure_of_its_call_alone(
    error: BaseException, pool: Pool
) -> None:
    with pool.held(workers=2) as (one, held):
        one.runner.start(calls(range(4)))
        held.hold(0, 1)
        held.open(0, error=error)
        one.take(1)
        held.open(1, 2, 3)
        one.take(4)
    assert ended(one) == {0: error, 1: "answer 1", 2: "answer 2", 3: "answer 3"}
    error.__traceback__ = None


def test_each_attempt_has_a_copy_of_the_job_s_context(pool: Pool) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")

    def change(call: Call) -> str:
        before = variable.get()
        variable.set(str(number_of(call)))
        return before

    async def change_later(call: Call) -> str:
        return change(call)

    variable.set("the job's")
    with pool.alone(change, change_later, workers=2) as one:
        variable.set("too late")
        one.runner.start(calls(range(9)))
        one.take(9)
    assert {*ended(one).values()} == {"the job's"}


# --- take back, stop, join


def test_what_has_not_begun_comes_back_in_its_order_and_can_be_started_anew(pool: Pool) -> None:
    with pool.held(workers=1) as (one, held):
        assert one.runner.take_back() == []
        one.runner.start(calls(range(1)))
        held.hold(0)
        assert one.runner.take_back() == []
        waiting = calls(range(1, 4))
        first = calls(range(4, 6))
        one.runner.start(waiting)
        one.runner.start(first, first=True)
        assert one.runner.out == 6
        back = one.runner.take_back()
        assert back == [*first, *waiting]
        assert one.runner.out == 1
        one.runner.start(back)
        held.open(*range(6))
        one.take(6)
    assert held.began == [0, 4, 5, 1, 2, 3]
    assert ended(one).keys() == {*range(6)}


def test_after_stop_nothing_begins_and_what_runs_reports_its_end(pool: Pool) -> None:
    with pool.held(workers=2) as (one, held):
        one.runner.start(calls(range(9)))
        one.runner.start(calls(range(9, 12)), first=True)
        until(lambda: held.running == 2)
        began = [*held.began]
        one.runner.stop()
        assert one.runner.out == 2
        held.open(*range(12))
        one.take(2)
        assert one.runner.out == 0
        one.runner.join()
        assert one.runner.out == 0
        assert held.began == began
        assert ended(one) == {number: f"answer {number}" for number in began}
        assert pool.awaits or not ours()


@pytest.mark.parametrize("used", [False, True])
def test_stop_and_join_may_come_without_a_start_and_twice(pool: Pool, *, used: bool) -> None:
    with pool.held(workers=2) as (one, held):
        if used:
            held.open(0)
            one.runner.start(calls(range(1)))
            one.take(1)
        for _ in range(2):
            one.runner.stop()
            one.runner.join()
        assert pool.awaits or not ours()


def test_threads_that_calls_are_expected_for_are_there() -> None:
    with Pool(PoolRunner, awaits=False).held(workers=3) as (one, held):
        one.runner.expect(2)
        assert len(ours()) == 2
        one.runner.start(calls(range(9)))
        held.hold(0, 1, 2)
        one.runner.expect(9)
        assert len(ours()) == 3
        held.open(*range(9))
        one.take(9)


# --- nothing is lost


class Hammer:
    """A function that is over in no time, or nearly, fails now and then, and counts."""

    def __init__(self) -> None:
        self.made: Counter[int] = Counter()
        self.running = self.most = 0
        self._lock = threading.Lock()

    def _begin(self, number: int) -> random.Random:
        with self._lock:
            self.made[number] += 1
            self.running += 1
            self.most = max(self.most, self.running)
        return random.Random(number)

    def _end(self, rng: random.Random) -> None:
        with self._lock:
            self.running -= 1
        if rng.random() < 0.1:
            raise LookupError

    def plain(self, call: Call) -> None:
        rng = self._begin(number_of(call))
        for _ in range(rng.randrange(3)):
            time.sleep(0)
        self._end(rng)

    async def awaited(self, call: Call) -> None:
        rng = self._begin(number_of(call))
        for _ in range(rng.randrange(3)):
            with contextlib.suppress(asyncio.CancelledError):  # some refuse
                await asyncio.sleep(0)
        self._end(rng)


@pytest.mark.parametrize("attempt_timeout", [None, 30])
@pytest.mark.parametrize("seed", range(3))
def test_each_call_ends_once_whatever_is_started_taken_back_and_given_up_meanwhile(
    seed: int, attempt_timeout: float | None, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no wake-up is lost: the runner runs dry often, and its tasks end all the time."""
    monkeypatch.setattr(pools, "LINGER", 0.0005)
    monkeypatch.setattr(pools, "TASK_TIME", (0.5, 5.0, 1e6)[seed])
    monkeypatch.setattr(logging.getLogger("twostage"), "disabled", True)
    rng = random.Random(seed)
    hammer = Hammer()
    workers = rng.choice((1, 2, 5))
    with pool.alone(hammer.plain, hammer.awaited, workers=workers, attempt_timeout=attempt_timeout) as one:
        waiting = deque(calls(range(1000)))
        while len(one.ends) < 1000:
            one.now += rng.choice((0, 1, 10))
            dice = rng.random()
            if dice < 0.6 and waiting:
                number = min(rng.choice((1, 1, 2, 10, 100)), len(waiting))
                one.runner.start([waiting.popleft() for _ in range(number)], first=rng.random() < 0.2)
            elif dice < 0.7:
                waiting.extendleft(reversed(one.runner.take_back()))
            elif dice < 0.8:
                one.runner.give_up(one.now)
            elif one.runner.out:
                one.step()
            assert one.runner.out + len(waiting) + len(one.ends) == 1000
        until(lambda: hammer.running == 0)
        while one.runner.given_up:
            one.step()
    assert ended(one).keys() == {*range(1000)}
    assert {*hammer.made.values()} == {1}
    assert hammer.most <= workers or (attempt_timeout is not None and not pool.awaits)
    for number, end in ended(one).items():
        rng = random.Random(number)
        rng.randrange(3)
        expected = LookupError if rng.random() < 0.1 else type(None)
        assert type(end) in (expected, AttemptTimeout)


# --- attempts that are given up


class Refusing(Held):
    """Its tasks do not let themselves be cancelled."""

    cancelled = 0

    async def awaited(self, call: Call) -> Any:  # noqa: ANN401 - whatever the test says
        with self._runs(number_of(call)):
            while True:
                try:
                    return await asyncio.shield(asyncio.wrap_future(self.gate(number_of(call))))
                except asyncio.CancelledError:
                    self.cancelled += 1


def test_place_of_an_attempt_that_was_given_up_is_another_s_at_the_latest_when_it_ends(pool: Pool) -> None:
    """A thread is replaced at once; a task is cancelled, and may take its time."""
    held = Refusing()
    with pool.held(held, workers=1, attempt_timeout=30) as (one, _):
        one.runner.start(calls(range(2)))
        held.hold(0)
        one.runner.give_up(one.now + 29)
        assert (one.runner.out, one.runner.given_up) == (2, 0)
        assert one.runner.next_overdue(one.now + 29) == one.now + 30
        one.runner.give_up(one.now + 30)
        assert (one.runner.out, one.runner.given_up) == (1, 1)
        assert isinstance(ended(one)[0], AttemptTimeout)
        if pool.awaits:
            until(lambda: held.cancelled == 1)
            assert held.began == [0]
            held.open(0)
        held.hold(0, 1)
        held.open(1)
        one.take(2)
        if not pool.awaits:
            held.open(0)
        while one.runner.given_up:
            one.step()
    assert held.most == (1 if pool.awaits else 2)
    assert ended(one)[1] == "answer 1"
    until(lambda: pool.awaits or not ours())


def test_join_does_not_wait_for_ever_for_what_was_given_up(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "LONGEST_CANCEL", 0.001)
    with pool.held(Refusing(), workers=3, attempt_timeout=30) as (one, held):
        one.runner.start(calls(range(2)))
        held.hold(0, 1)
        one.now += 30
        one.runner.start(calls(range(2, 3)))
        held.hold(0, 1, 2)
        one.runner.give_up(one.now)
        held.open(2)
        one.take(3)
        one.runner.stop()
        one.runner.join()
        assert (held.running, one.runner.given_up) == (2, 2)
    until(lambda: held.running == 0)
    until(lambda: pool.awaits or not ours())


# --- what is kept


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_call_is_kept_after_its_end(pool: Pool, *, fails: bool) -> None:
    refs: list[weakref.ref[Any]] = []

    class KeptError(Exception):
        pass

    def fetch(call: Call) -> WeakItem:
        assert isinstance(call, Outcome)
        answer = KeptError() if fails else WeakItem()
        refs.extend([weakref.ref(call.item), weakref.ref(answer)])
        if isinstance(answer, KeptError):
            try:
                raise answer
            finally:
                del answer  # or its own frame would hold it
        return answer

    async def fetch_later(call: Call) -> WeakItem:
        await asyncio.sleep(0)  # an eager task that fails at once is in a cycle, by frames of Python's own
        return fetch(call)

    with pool.alone(fetch, fetch_later, workers=1) as one, nothing_collected():
        one.runner.start([Outcome(number, WeakItem()) for number in range(3)])
        one.take(3)
        assert len([ref for ref in refs if ref() is not None]) == 6
        one.ends.clear()
        until(lambda: [ref for ref in refs if ref() is not None] == [])


# --- on a loop


@pytest.fixture
def on_loop(executor: AsyncExecutor) -> Pool:
    return Pool(partial(_task_runner, executor), awaits=True)


def cancel_all_tasks() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


@pytest.mark.parametrize("then", ["waits", "returns", "fails"])
def test_attempt_that_cancels_itself_ends_once(then: str, on_loop: Pool) -> None:
    running = most = 0

    async def fetch(call: Call) -> str:
        nonlocal running, most
        if then == "is over":
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return "answer"
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if then == "waits":
            await asyncio.sleep(0)
        if then == "fails":
            raise LookupError
        return "answer"

    with on_loop.alone(None, fetch, workers=1, attempt_timeout=30) as one:
        one.runner.start(calls(range(2)))
        one.take(2)
        assert one.runner.next_overdue(one.now) == float("inf")
        one.runner.give_up(one.now + 100)
        assert (one.runner.out, one.runner.given_up) == (0, 0)
        if then == "waits":
            assert {type(end) for end in ended(one).values()} == {CancelledError}
        else:  # it has ended before that could reach it
            assert {type(end) for end in ended(one).values()} == {LookupError if then == "fails" else str}
        then = "is over"
        one.runner.start(calls(range(2, 6)))
        one.take(4)
        assert most == 1  # its place was given away once


def test_who_cancels_all_tasks_of_the_loop_ends_all_attempts_and_the_job(
    on_loop: Pool, executor: AsyncExecutor
) -> None:
    with on_loop.held(workers=2) as (one, held):
        one.runner.start(calls(range(2)))
        held.hold(0, 1)

        async def cancel_all() -> None:
            cancel_all_tasks()

        executor.submit(cancel_all)
        with pytest.raises(CancelledError, match="its task on the event loop was cancelled"):
            one.take(3)
        one.take(2)
        assert {type(end) for end in ended(one).values()} == {CancelledError}
    assert_lives(executor)


def test_nothing_can_be_started_on_an_executor_that_was_shut_down(
    on_loop: Pool, executor: AsyncExecutor
) -> None:
    with on_loop.held(workers=2) as (one, _):
        executor.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            one.runner.start(calls(range(2)))
        assert one.runner.out == 0


def test_executor_is_shut_down_when_the_runner_is_joined(on_loop: Pool, executor: AsyncExecutor) -> None:
    with on_loop.held(workers=1) as (one, held):
        one.runner.start(calls(range(2)))
        held.hold(0)
        executor.shutdown(wait=False)
        one.runner.start(calls(range(2, 4)))
        held.open(*range(4))
        one.take(4)
        [thread] = ours()
        assert thread.is_alive()
    executor.shutdown()
    assert ended(one).keys() == {*range(4)}


@pytest.mark.parametrize("workers", [5000, 100])
def test_calls_get_to_the_loop_in_lots_that_do_not_hold_it_up(
    workers: int, on_loop: Pool, executor: AsyncExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    async def fetch(call: Call) -> None:
        begun.append(number_of(call))

    async def begin_to_look() -> asyncio.AbstractEventLoop:
        look()
        return asyncio.get_running_loop()

    def look() -> None:
        seen.append(len(begun))
        if len(begun) < 5000:
            asyncio.get_running_loop().call_soon(look)

    begun: list[int] = []
    with on_loop.alone(None, fetch, workers=workers) as one:
        loop = executor.submit(begin_to_look).result(PATIENCE)
        wakes: list[object] = []
        wake = loop.call_soon_threadsafe

        def count(*call: Any, **named: Any) -> asyncio.Handle:  # noqa: ANN401 - any call
            wakes.append(call)
            return wake(*call, **named)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        for sooner in range(0, 5000, 100):
            one.runner.start(calls(range(sooner, sooner + 100)))
        one.take(5000)
        until(lambda: seen[-1] == 5000)
        assert begun == list(range(5000))
        assert max(later - sooner for sooner, later in pairwise(seen)) <= 2 * LOT * CALLS_A_TASK
        assert len(wakes) < 500
