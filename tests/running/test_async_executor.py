"""`AsyncExecutor`: what CPython's own tests ask of an executor, and how calls get to the loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import weakref
from collections import Counter
from concurrent import futures
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, CancelledError, Future
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from common import PATIENCE, WeakItem, frames, nothing_collected, ours, switching, until
from loops import ENDS, Gate, assert_lives, busy, double, fail, loop_of, same

from twostage.running.async_executor import LOT

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from twostage import AsyncExecutor


# --- submit


def test_future_has_the_answer(executor: AsyncExecutor) -> None:
    assert executor.submit(double, 21).result(PATIENCE) == 42
    assert executor.submit(same, None).result(PATIENCE) is None


def test_all_arguments_reach_the_function_whatever_their_names(executor: AsyncExecutor) -> None:
    async def capture(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any
        return args, kwargs

    named = {name: name for name in ("self", "fn", "function", "args", "kwargs", "loop", "context", "coro")}
    assert executor.submit(capture, 1, **named).result(PATIENCE) == ((1,), named)
    assert executor.submit(double, number=4).result(PATIENCE) == 8


def test_function_is_no_keyword_argument(executor: AsyncExecutor) -> None:
    submit: Any = executor.submit
    with pytest.raises(TypeError):
        submit(fn=double, number=1)
    with pytest.raises(TypeError):
        submit()


class Later:
    """Can be awaited and is no coroutine."""

    def __await__(self) -> Generator[Any, Any, str]:
        yield from asyncio.sleep(0).__await__()
        return "later"


def test_function_may_be_anything_that_returns_an_awaitable(executor: AsyncExecutor) -> None:
    gate = Gate()
    future = executor.submit(gate, "through")  # an object with an async `__call__`
    gate.hold()
    gate.open()
    assert future.result(PATIENCE) == "through"
    assert executor.submit(lambda: double(3)).result(PATIENCE) == 6
    assert executor.submit(partial(double, 4)).result(PATIENCE) == 8
    assert executor.submit(Later).result(PATIENCE) == "later"


def test_function_that_returns_no_awaitable_fails_by_name(executor: AsyncExecutor) -> None:
    future: Future[Any] = executor.submit(int, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^int returned int, which can't be awaited; expected a coroutine"):
        future.result(PATIENCE)
    uncallable: Any = "text"
    with pytest.raises(TypeError, match="not callable"):
        executor.submit(uncallable).result(PATIENCE)


@pytest.mark.parametrize("error", [ValueError("of the user's"), StopAsyncIteration(), *ENDS], ids=repr)
def test_error_is_the_very_one_with_the_user_s_frames_alone(
    error: BaseException, executor: AsyncExecutor
) -> None:
    async def outer() -> None:
        await fail(error)

    future = executor.submit(outer)
    assert future.exception(PATIENCE) is error
    assert frames(error) == ["outer", "fail"]
    with pytest.raises(type(error)) as raised:
        future.result()
    assert raised.value is error
    assert frames(error)[-2:] == ["outer", "fail"]
    error.__traceback__ = None


def test_each_call_has_a_copy_of_the_context_of_who_submits(executor: AsyncExecutor) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")

    async def change(value: str) -> str:
        before = variable.get()
        variable.set(value)
        await asyncio.sleep(0)
        assert variable.get() == value
        return before

    assert executor.submit(change, "a").result(PATIENCE) == "none"
    variable.set("mine")
    with busy(executor):
        calls = [executor.submit(change, "b")]
        variable.set("mine, later")
        calls.append(executor.submit(change, "c"))
        variable.set("too late")
    assert [call.result(PATIENCE) for call in calls] == ["mine", "mine, later"]
    assert variable.get() == "too late"


def test_calls_begin_in_their_order(executor: AsyncExecutor) -> None:
    begun: list[int] = []

    async def begin(number: int) -> None:
        begun.append(number)

    with busy(executor):
        calls = [executor.submit(begin, number) for number in range(5 * LOT)]
    futures.wait(calls, PATIENCE)
    assert begun == list(range(5 * LOT))


def test_all_calls_run_at_once_in_one_thread_which_is_no_hindrance_to_the_exit(
    executor: AsyncExecutor,
) -> None:
    with Gate() as gate:
        calls = [executor.submit(gate, number) for number in range(1000)]
        gate.hold(1000)
        [thread] = ours()
        assert thread.daemon
        gate.open()
        assert [call.result(PATIENCE) for call in calls] == list(range(1000))


# --- map


async def divide(dividend: int, divisor: int) -> tuple[int, int]:
    await asyncio.sleep(0)
    return divmod(dividend, divisor)


def test_map_gives_the_answers_in_order(executor: AsyncExecutor) -> None:
    assert list(executor.map(double, range(500))) == [2 * number for number in range(500)]
    assert list(executor.map(double, range(5), chunksize=3)) == [0, 2, 4, 6, 8]
    assert list(executor.map(double, [])) == []


def test_map_takes_several_iterables_and_ends_with_the_shortest(executor: AsyncExecutor) -> None:
    assert list(executor.map(divide, range(100), [3, 4])) == [(0, 0), (0, 1)]
    assert list(executor.map(divide, [9, 8], [5, 6], timeout=PATIENCE)) == [(1, 4), (1, 2)]


def test_map_raises_where_the_call_failed(executor: AsyncExecutor) -> None:
    answers = executor.map(divide, [1, 1, 1, 1], [2, 3, 0, 5])
    assert [next(answers), next(answers)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError) as raised:
        next(answers)
    assert frames(raised.value)[-1] == "divide"


@pytest.mark.parametrize("leave", [False, True])
def test_map_that_is_over_in_time_or_left_cancels_what_runs(executor: AsyncExecutor, *, leave: bool) -> None:
    gate = Gate()
    cancelled: list[int] = []

    async def wait_at(number: int) -> int:
        if number > 0:
            try:
                await gate()
            finally:
                cancelled.append(number)
        return number

    answers: Any = executor.map(wait_at, range(4), timeout=None if leave else 0)
    gate.hold(3)
    if leave:
        assert next(answers) == 0
        answers.close()
    else:
        with pytest.raises(TimeoutError):
            list(answers)
    until(lambda: sorted(cancelled) == [1, 2, 3])


def test_map_keeps_no_answer_that_it_has_given(executor: AsyncExecutor) -> None:
    async def make(_: int) -> WeakItem:
        return WeakItem()

    with nothing_collected():
        for item in executor.map(make, range(10)):
            one = weakref.ref(item)
            del item
            until(lambda one=one: one() is None)  # type: ignore[misc]


# --- as_completed and wait


def four_ends(executor: AsyncExecutor) -> list[Future[Any]]:
    """Returns the futures of four calls: one with an answer, one that failed, two that were cancelled."""
    with Gate() as gate:
        runs = executor.submit(gate)
        gate.hold()
        with busy(executor):
            waits = executor.submit(double, 1)
            assert waits.cancel()
        assert runs.cancel()
        return [executor.submit(double, 1), executor.submit(fail, LookupError()), waits, runs]


def test_as_completed_gives_each_future_once(executor: AsyncExecutor) -> None:
    four = four_ends(executor)
    given = list(futures.as_completed([*four, *four], timeout=PATIENCE))
    assert len(given) == 4
    assert set(given) == set(four)


def test_as_completed_gives_them_as_they_end(executor: AsyncExecutor) -> None:
    gates = [Gate(), Gate(), Gate()]
    calls = [executor.submit(gate, number) for number, gate in enumerate(gates)]
    for gate in gates:
        gate.hold()
    given = futures.as_completed(calls, timeout=PATIENCE)
    for number in (1, 2):
        gates[number].open()
        assert next(given).result() == number
    calls[0].cancel()
    assert next(given).cancelled()
    assert list(given) == []


def test_as_completed_and_wait_are_over_in_time(executor: AsyncExecutor) -> None:
    with Gate() as gate:
        four, open_ = four_ends(executor), executor.submit(gate)
        futures.wait(four, PATIENCE)
        with pytest.raises(TimeoutError, match=r"1 \(of 5\) futures unfinished"):
            list(futures.as_completed([open_, *four], timeout=0))
        assert futures.wait([open_, *four], 0) == (set(four), {open_})
        with pytest.raises(TimeoutError):
            open_.result(0)
        with pytest.raises(TimeoutError):
            open_.exception(0)


def test_wait_returns_at_the_first_end(executor: AsyncExecutor) -> None:
    with Gate() as gate:
        open_ = executor.submit(gate)
        done = executor.submit(double, 1)
        assert futures.wait([open_, done], PATIENCE, FIRST_COMPLETED) == ({done}, {open_})


def test_wait_returns_at_the_first_failure(executor: AsyncExecutor) -> None:
    with Gate() as gate:
        open_, done = executor.submit(gate), executor.submit(double, 1)
        done.result(PATIENCE)
        bad = executor.submit(fail, LookupError())
        assert futures.wait([open_, done, bad], PATIENCE, FIRST_EXCEPTION) == ({done, bad}, {open_})


def test_wait_for_all_hears_of_each_way_to_end(executor: AsyncExecutor) -> None:
    four = four_ends(executor)
    assert futures.wait([*four, four[0]], PATIENCE, ALL_COMPLETED) == (set(four), set())


def test_wait_hears_of_ends_that_come_as_it_begins(executor: AsyncExecutor) -> None:
    with switching():
        for _ in range(30):
            calls = [executor.submit(double, number) for number in range(100)]
            assert futures.wait(calls, PATIENCE) == (set(calls), set())


# --- callbacks, and futures of another loop


def test_callback_is_called_once_at_each_end(executor: AsyncExecutor) -> None:
    called: list[Future[Any]] = []
    with busy(executor):
        calls: list[Future[Any]] = [
            executor.submit(double, 1),
            executor.submit(fail, LookupError()),
            executor.submit(double, 2),
        ]
        for call in calls:
            call.add_done_callback(called.append)
        calls[2].cancel()
        assert called == [calls[2]]
    until(lambda: len(called) == 3)
    for call in calls:
        call.add_done_callback(called.append)  # at once, as it is done
    assert called == [calls[2], *calls[:2], *calls]


@pytest.mark.parametrize("error", [*ENDS, LookupError()], ids=repr)
@pytest.mark.parametrize("end", ["answer", "failure", "cancelled"])
def test_error_in_a_callback_harms_nobody(error: BaseException, end: str, executor: AsyncExecutor) -> None:
    """Nor does it keep from those who wait for the future that it is done."""

    async def ends() -> None:
        await gate()
        if end == "failure":
            raise LookupError

    def callback(_: object) -> NoReturn:
        raise error

    with Gate() as gate:
        call, other = executor.submit(ends), executor.submit(gate, "other")
        call.add_done_callback(callback)
        gate.hold(2)
        waits = threading.Thread(target=futures.wait, args=([call],))
        waits.start()
        until(lambda: call._waiters)
        if end == "cancelled":
            call.cancel()
        else:
            gate.open()
        waits.join(PATIENCE)
        assert not waits.is_alive()
        gate.open()
        assert other.result(PATIENCE) == "other"
        assert_lives(executor)


def test_another_loop_can_await_the_future(executor: AsyncExecutor) -> None:
    async def main() -> None:
        assert await asyncio.wrap_future(executor.submit(double, 2)) == 4
        with pytest.raises(LookupError):
            await asyncio.wrap_future(executor.submit(fail, LookupError()))
        loop = asyncio.get_running_loop()
        gate, cancelled = Gate(), Gate()

        async def clean_up() -> None:
            try:
                await gate()
            finally:
                loop.call_soon_threadsafe(cancelled._event.set)

        call = executor.submit(clean_up)
        gate.hold()
        wrapped = asyncio.wrap_future(call)
        wrapped.cancel()
        await cancelled()
        with pytest.raises(asyncio.CancelledError):
            await wrapped

        call = executor.submit(gate)
        gate.hold(2)
        wrapped = asyncio.wrap_future(call)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped

    asyncio.run(main())


# --- cancel


def test_call_that_waits_is_cancelled_at_once_and_never_made(executor: AsyncExecutor) -> None:
    made: list[int] = []

    async def make(number: int) -> None:
        made.append(number)

    with busy(executor):
        calls = [executor.submit(make, number) for number in range(3)]
        assert not calls[1].running()
        assert calls[1].cancel()
        assert calls[1].cancel()  # again
        assert (calls[1].cancelled(), calls[1].done(), calls[1].running()) == (True, True, False)
        assert futures.wait(calls[1:2], 0) == ({calls[1]}, set())
        with pytest.raises(CancelledError):
            calls[1].result(0)
        with pytest.raises(CancelledError):
            calls[1].exception(0)
    futures.wait(calls, PATIENCE)
    assert made == [0, 2]


def test_call_that_runs_is_cancelled_when_it_has_cleaned_up(executor: AsyncExecutor) -> None:
    gate, cleaning, cleaned = Gate(), Gate(), threading.Event()

    async def clean_up() -> None:
        try:
            await gate()
        finally:
            await cleaning()
            cleaned.set()

    call = executor.submit(clean_up)
    call.add_done_callback(lambda _: done.append(cleaned.is_set()))
    done: list[bool] = []
    gate.hold()
    assert (call.running(), call.cancel(), call.running()) == (True, True, True)
    cleaning.hold()
    assert not call.done()
    assert not call.cancelled()
    cleaning.open()
    with pytest.raises(CancelledError):
        call.result(PATIENCE)
    assert (call.running(), call.cancelled(), call.cancel(), call.done()) == (False, True, True, True)
    assert done == [True]


@pytest.mark.parametrize("ends", ["answer", "failure"])
def test_call_that_does_not_let_itself_be_cancelled_ends_as_it_ends(
    ends: str, executor: AsyncExecutor
) -> None:
    gate, last = Gate(), Gate()

    async def refuse() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await gate()
        await last()
        if ends == "failure":
            raise LookupError
        return "answer"

    call = executor.submit(refuse)
    gate.hold()
    assert call.cancel()
    last.hold()
    assert call.running()
    last.open()
    if ends == "failure":
        assert isinstance(call.exception(PATIENCE), LookupError)
    else:
        assert call.result(PATIENCE) == "answer"
    assert (call.cancelled(), call.running(), call.cancel()) == (False, False, False)


def test_call_that_is_over_is_not_cancelled(executor: AsyncExecutor) -> None:
    call = executor.submit(double, 1)
    assert call.result(PATIENCE) == 2
    assert (call.running(), call.cancel(), call.cancelled(), call.result(0)) == (False, False, False, 2)


def test_call_may_cancel_others_and_itself(executor: AsyncExecutor) -> None:
    with Gate() as gate:
        other = executor.submit(gate)
        gate.hold()

        async def cancel_it() -> bool:
            return other.cancel()

        assert executor.submit(cancel_it).result(PATIENCE)
        with pytest.raises(CancelledError):
            other.result(PATIENCE)

        calls: list[Future[None]] = []

        async def cancel_itself() -> None:
            calls[0].cancel()
            await gate()

        with busy(executor):
            calls.append(executor.submit(cancel_itself))
        with pytest.raises(CancelledError):
            calls[0].result(PATIENCE)


def test_call_that_raises_cancelled_error_by_itself_is_cancelled(executor: AsyncExecutor) -> None:
    call = executor.submit(fail, asyncio.CancelledError("of the user's"))
    assert futures.wait([call], PATIENCE) == ({call}, set())
    assert call.cancelled()
    with pytest.raises(CancelledError):
        call.result(0)
    assert_lives(executor)


def cancel_all(calls: Sequence[Future[Any]]) -> None:
    for call in calls:
        call.cancel()


def test_cancelling_and_beginning_race_and_one_of_them_wins(executor: AsyncExecutor) -> None:
    """Each call has one end, and those that were cancelled before they began are never made."""
    rng = random.Random(0)
    made: Counter[int] = Counter()
    ended: Counter[Future[int]] = Counter()

    async def make(number: int) -> int:
        made[number] += 1
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        return number

    def race() -> None:
        made.clear()
        ended.clear()
        calls: list[Future[int]] = []
        for number in range(200):
            calls.append(executor.submit(make, number))
            calls[-1].add_done_callback(lambda call: ended.update([call]))
            if rng.random() < 0.5:
                calls[rng.randrange(len(calls))].cancel()
        threads = [threading.Thread(target=cancel_all, args=(calls[half::2],)) for half in (0, 1)]
        for thread in threads:
            thread.start()
        assert futures.wait(calls, PATIENCE) == (set(calls), set())
        for thread in threads:
            thread.join()
        until(lambda: len(ended) == 200)
        assert {*ended.values()} == {1}
        assert {*made.values()} <= {1}
        for number, call in enumerate(calls):
            assert call.cancelled() or (call.result(0), made[number]) == (number, 1)

    with switching():
        for _ in range(10):
            race()


@pytest.mark.parametrize("waiting", [0, 3 * LOT])
def test_who_cancels_all_tasks_of_the_loop_cancels_the_calls_and_no_more(
    waiting: int, executor: AsyncExecutor
) -> None:
    """Also those that have a task and have not begun; those that have none yet are made."""
    with Gate() as gate:
        runs = executor.submit(gate)
        gate.hold()

        async def cancel_all() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        with busy(executor):
            cancels = executor.submit(cancel_all)
            calls = [executor.submit(double, number) for number in range(waiting)]
        cancels.result(PATIENCE)
        assert futures.wait([runs, *calls], PATIENCE) == ({runs, *calls}, set())
        assert runs.cancelled()
        assert all(call.cancelled() or call.result(0) == 2 * number for number, call in enumerate(calls))
        assert_lives(executor)


# --- lots


def test_many_submits_wake_the_loop_once(executor: AsyncExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_of(executor)
    wakes: list[object] = []
    wake = loop.call_soon_threadsafe

    def count(*call: Any, **named: Any) -> asyncio.Handle:  # noqa: ANN401 - any
        wakes.append(call)
        return wake(*call, **named)

    for number in (1, 10_000):
        with busy(executor), monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", count)
            calls = [executor.submit(same, one) for one in range(number)]
        assert futures.wait(calls, PATIENCE) == (set(calls), set())
        assert len(wakes) <= 1  # none if the busy call has begun in the middle of a lot
        wakes.clear()


@pytest.mark.parametrize("more", [False, True])
def test_loop_s_other_work_is_not_held_up_by_many_calls(executor: AsyncExecutor, *, more: bool) -> None:
    """Nor if more are submitted all the time."""
    begun: list[int] = []
    seen: list[int] = []

    async def begin() -> None:
        begun.append(1)

    def tick() -> None:
        seen.append(len(begun))
        if len(begun) < 10_000:
            loop.call_later(0, tick)
            if more:
                executor.submit(begin)

    loop = loop_of(executor)
    with busy(executor):
        calls = [executor.submit(begin) for _ in range(10_000)]
        loop.call_soon_threadsafe(tick)
    futures.wait(calls, PATIENCE)
    until(lambda: seen[-1] >= 10_000)
    assert max(later - sooner for sooner, later in pairwise(seen)) <= 2 * LOT


# --- what is kept


@pytest.mark.parametrize("end", ["answer", "failure", "cancelled", "never begun"])
def test_nothing_of_a_call_is_kept_after_its_end(end: str, executor: AsyncExecutor) -> None:
    """The future keeps what it gives, and nothing else."""

    class Item(WeakItem):
        async def meet(self, gate: Gate, other: Item) -> WeakItem:
            del self, other  # else a failure's frames hold them
            await gate()
            if end == "failure":
                raise LookupError
            return WeakItem()

    variable: ContextVar[Item] = ContextVar("variable")
    refs: list[weakref.ref[Any]] = []

    def submit(gate: Gate) -> Future[WeakItem]:
        one, other = Item(), Item()
        refs.extend([weakref.ref(one), weakref.ref(other)])
        token = variable.set(one)
        future = executor.submit(one.meet, gate, other=other)
        variable.reset(token)
        return future

    def kept() -> list[Any]:
        return [item for ref in refs if (item := ref()) is not None]

    with nothing_collected(), Gate() as gate:
        with busy(executor) if end == "never begun" else nullcontext():
            future = submit(gate)
            if end != "never begun":
                gate.hold()
            if end in ("cancelled", "never begun"):
                future.cancel()
            else:
                gate.open()
        futures.wait([future], PATIENCE)
        until(lambda: not kept())
        if end == "answer":
            refs.append(weakref.ref(future.result()))
            assert kept()
        future = Future()
        until(lambda: not kept())


def test_nothing_of_a_call_is_kept_whose_future_nobody_has(executor: AsyncExecutor) -> None:
    async def meet(item: WeakItem) -> WeakItem:
        return item

    with nothing_collected():
        item = WeakItem()
        ref = weakref.ref(item)
        executor.submit(meet, item)
        del item
        until(lambda: ref() is None)
