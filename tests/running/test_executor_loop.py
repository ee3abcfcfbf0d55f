"""The loop of an `AsyncExecutor`: whatever is raised in it, it goes on, and it ends when it is to."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import weakref
from concurrent import futures
from concurrent.futures import CancelledError, Future
from functools import partial
from textwrap import dedent
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest
from common import PATIENCE, nothing_collected, ours, switching, until
from loops import ENDS, Gate, LoopFactory, assert_lives, busy, double, fail, loop_of
from scripts import ran

from twostage import AsyncExecutor
from twostage.running.async_executor import LOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextvars import Context


# --- what would end the loop


@pytest.mark.parametrize("error", ENDS, ids=repr)
@pytest.mark.parametrize("place", ["call", "task", "task that nobody awaits", "callback", "timer"])
def test_loop_goes_on_whatever_is_raised_in_it(
    place: str, error: BaseException, executor: AsyncExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[BaseException] = []

    def callback() -> NoReturn:
        raised.append(error)
        raise error

    async def call() -> str:
        if place == "call":
            raise error
        if place == "task":
            await asyncio.create_task(fail(error))
        elif place == "callback":
            asyncio.get_running_loop().call_soon(callback)
        elif place == "timer":
            asyncio.get_running_loop().call_later(0.001, callback)
        else:
            task = asyncio.create_task(fail(error))
            await asyncio.wait([task])
            assert task.exception() is error
        return "answer"

    with Gate() as gate:
        others = [executor.submit(gate, number) for number in range(100)]
        gate.hold(100)
        [thread] = ours()
        calls = [executor.submit(call) for _ in range(10)]
        assert futures.wait(calls, PATIENCE) == (set(calls), set())
        for one in calls:
            if place in ("call", "task"):
                assert one.exception() is error
            else:
                assert one.result() == "answer"
        until(lambda: len(raised) == 10 * (place in ("callback", "timer")))
        assert_lives(executor, thread)
        gate.open()
        assert [other.result(PATIENCE) for other in others] == list(range(100))
    error.__traceback__ = None
    caplog.clear()


def test_loop_goes_on_when_it_is_stopped(executor: AsyncExecutor) -> None:
    async def stop() -> str:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        return "answer"

    with Gate() as gate:
        other = executor.submit(gate, "other")
        gate.hold()
        [thread] = ours()
        assert executor.submit(stop).result(PATIENCE) == "answer"
        assert_lives(executor, thread)
        gate.open()
        assert other.result(PATIENCE) == "other"


def test_task_that_cannot_be_made_is_the_failure_of_its_call(executor: AsyncExecutor) -> None:
    loop = loop_of(executor)
    factory = loop.get_task_factory()

    def refuse(*_: object, **__: object) -> NoReturn:
        raise LookupError("no task")

    with Gate() as gate:
        other = executor.submit(gate, "other")
        gate.hold()
        loop.set_task_factory(refuse)
        calls = [executor.submit(double, number) for number in range(3)]
        for call in calls:
            with pytest.raises(LookupError, match="no task"):
                call.result(PATIENCE)
        loop.set_task_factory(factory)
        gate.open()
        assert other.result(PATIENCE) == "other"
        assert_lives(executor)
    loop.set_task_factory(refuse)  # the loop's end needs none


# --- shutdown


def test_shutdown_awaits_what_waits_and_what_runs(executor: AsyncExecutor) -> None:
    with Gate() as gate:
        runs = executor.submit(gate, "ran")
        gate.hold()
        with busy(executor):
            waits = [executor.submit(double, number) for number in range(3 * LOT)]
            executor.shutdown(wait=False)
            assert not runs.done()
        gate.open()
        executor.shutdown()
        assert runs.result(0) == "ran"
        assert [call.result(0) for call in waits] == [2 * number for number in range(3 * LOT)]
        assert not ours()


def test_shutdown_may_come_twice_from_anywhere(executor: AsyncExecutor) -> None:
    with Gate() as gate:
        call = executor.submit(gate, "answer")
        gate.hold()
        threads = [threading.Thread(target=executor.shutdown) for _ in range(3)]
        for thread in threads:
            thread.start()
        executor.shutdown(wait=False)
        gate.open()
        for thread in threads:
            thread.join()
        assert call.result(0) == "answer"
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    executor.shutdown(cancel_futures=True)


@pytest.mark.parametrize("used", [False, True])
def test_nothing_is_taken_after_shutdown(executor: AsyncExecutor, *, used: bool) -> None:
    if used:
        assert_lives(executor)
    executor.shutdown()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^cannot schedule new futures after shutdown$"):
            executor.submit(double, 1)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.map(double, [1])
    assert not ours()


def test_executor_that_is_not_used_has_no_thread(loop_factory: LoopFactory | None) -> None:
    with AsyncExecutor(loop_factory=loop_factory):
        assert not ours()
    assert not ours()


def test_call_may_shut_its_executor_down_without_waiting(executor: AsyncExecutor) -> None:
    async def shut_down() -> str:
        executor.shutdown(wait=False)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(double, 1)
        return "answer"

    assert executor.submit(shut_down).result(PATIENCE) == "answer"
    until(lambda: not ours())


def test_leaving_with_an_error_awaits_the_calls(loop_factory: LoopFactory | None) -> None:
    ended: list[str] = []

    async def call() -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        ended.append("call")

    with contextlib.suppress(LookupError), AsyncExecutor(loop_factory=loop_factory) as executor:
        executor.submit(call)
        raise LookupError
    assert ended == ["call"]
    assert not ours()


@pytest.mark.parametrize("wait", [False, True])
def test_shutdown_can_drop_what_has_not_begun(executor: AsyncExecutor, *, wait: bool) -> None:
    made: list[int] = []

    async def make(number: int) -> None:
        made.append(number)

    with Gate() as gate:
        runs = executor.submit(gate, "ran")
        gate.hold()
        begun, over = threading.Event(), threading.Event()

        async def block() -> None:
            begun.set()
            assert over.wait(PATIENCE)

        blocks = executor.submit(block)
        assert begun.wait(PATIENCE)
        waits = [executor.submit(make, number) for number in range(3 * LOT)]
        shuts = threading.Thread(target=executor.shutdown, kwargs={"wait": wait, "cancel_futures": True})
        shuts.start()
        assert futures.wait(waits, PATIENCE) == (set(waits), set())  # told while the loop is busy
        assert all(call.cancelled() for call in waits)
        assert not blocks.done()
        over.set()
        gate.open()
        shuts.join()
        assert runs.result(PATIENCE) == "ran"
        assert blocks.result(PATIENCE) is None
    assert made == []
    executor.shutdown()


def test_second_shutdown_can_drop_what_the_first_left(executor: AsyncExecutor) -> None:
    with busy(executor):
        call = executor.submit(double, 1)
        executor.shutdown(wait=False)
        executor.shutdown(wait=False, cancel_futures=True)
        assert call.cancelled()


@pytest.mark.parametrize("seed", range(5))
def test_submits_and_shutdown_race_and_each_call_ends(seed: int, loop_factory: LoopFactory | None) -> None:
    rng = random.Random(seed)

    def submit(executor: AsyncExecutor, calls: list[Future[int]], barrier: threading.Barrier) -> None:
        barrier.wait(PATIENCE)
        with contextlib.suppress(RuntimeError):
            while True:
                calls.append(executor.submit(double, len(calls)))

    def race() -> None:
        executor = AsyncExecutor(loop_factory=loop_factory)
        lists: list[list[Future[int]]] = [[] for _ in range(rng.randrange(1, 5))]
        barrier = threading.Barrier(len(lists) + 1)
        threads = [threading.Thread(target=submit, args=(executor, calls, barrier)) for calls in lists]
        for thread in threads:
            thread.start()
        barrier.wait(PATIENCE)
        enough = rng.choice((0, 1, 10, 300))
        until(lambda: sum(map(len, lists)) >= enough)
        drop = rng.random() < 0.5
        executor.shutdown(wait=rng.random() < 0.7, cancel_futures=drop)
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        executor.shutdown()
        for calls in lists:
            for number, call in enumerate(calls):
                assert call.done()
                assert (drop and call.cancelled()) or call.result(0) == 2 * number
        assert not ours()

    with switching():
        for _ in range(8):
            race()


def test_pending_calls_end_after_their_executor_was_dropped(loop_factory: LoopFactory | None) -> None:
    with nothing_collected(), Gate() as gate:
        executor = AsyncExecutor(loop_factory=loop_factory)
        runs = executor.submit(gate, "ran")
        gate.hold()
        with busy(executor):
            waits = [executor.submit(double, number) for number in range(3 * LOT)]
            dropped = weakref.ref(executor)
            del executor
            assert dropped() is None
        gate.open()
        assert runs.result(PATIENCE) == "ran"
        assert [call.result(PATIENCE) for call in waits] == [2 * number for number in range(3 * LOT)]
        until(lambda: not ours())


def test_executor_that_is_dropped_in_its_own_loop_ends(loop_factory: LoopFactory | None) -> None:
    executors = [AsyncExecutor(loop_factory=loop_factory)]

    async def drop() -> str:
        executors.clear()
        return "answer"

    assert executors[0].submit(drop).result(PATIENCE) == "answer"
    until(lambda: not ours())


@pytest.mark.parametrize("way", ["dropped", "shut down"])
@pytest.mark.parametrize("moment", ["submit", "cancel"])
def test_executor_may_be_finished_in_the_middle_of_something_else(way: str, moment: str) -> None:
    """By the collector, that finds it in a cycle, or by the handler of a signal."""
    actions: list[Callable[[], object]] = []

    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(
            self,
            callback: Callable[..., object],
            *args: object,
            context: Context | None = None,
        ) -> asyncio.Handle:
            if threading.current_thread() is threading.main_thread() and actions:
                actions.pop()()
            return super().call_soon_threadsafe(callback, *args, context=context)

    executors = [AsyncExecutor(loop_factory=Loop)]
    with Gate() as gate:
        calls = [executors[0].submit(gate, "answer")]
        gate.hold()
        actions.append(executors.clear if way == "dropped" else partial(executors[0].shutdown, wait=False))
        if moment == "submit":
            calls.append(executors[0].submit(double, 1))
            assert not actions
            gate.open()
            assert [call.result(PATIENCE) for call in calls] == ["answer", 2]
        else:
            calls[0].cancel()
            assert not actions
            with pytest.raises(CancelledError):
                calls[0].result(PATIENCE)
    executors.clear()
    until(lambda: not ours())


# --- what a call leaves behind


def test_tasks_that_calls_have_left_are_cancelled_at_the_end(executor: AsyncExecutor) -> None:
    gate, cleaned, tasks = Gate(), threading.Event(), []

    async def background() -> None:
        try:
            await gate()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    async def call() -> None:
        tasks.append(asyncio.create_task(background()))

    executor.submit(call).result(PATIENCE)
    gate.hold()
    executor.shutdown()
    assert cleaned.is_set()
    assert tasks[0].cancelled()


def test_shutdown_at_the_end_does_not_disturb_it(executor: AsyncExecutor) -> None:
    gate, cleaned = Gate(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def background() -> None:
        try:
            await gate()
        finally:
            executor.shutdown(wait=False)
            for _ in range(10):
                await asyncio.sleep(0)
            cleaned.set()

    async def call() -> None:
        tasks.append(asyncio.create_task(background()))

    executor.submit(call).result(PATIENCE)
    gate.hold()
    executor.shutdown()
    assert cleaned.is_set()


def raise_one(error: BaseException) -> NoReturn:
    raise error


def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()


def cancel_all_tasks() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


def raise_in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(raise_one, SystemExit(3))


@pytest.mark.parametrize(
    "act",
    [*(partial(raise_one, error) for error in ENDS), stop_the_loop, cancel_all_tasks, raise_in_a_callback],
)
def test_tasks_that_calls_have_left_are_ended_whatever_they_do_then(
    act: Callable[[], None], executor: AsyncExecutor
) -> None:
    gate = Gate()
    cleaned: list[int] = []
    tasks: list[asyncio.Task[None]] = []

    async def background(number: int) -> None:
        try:
            await gate()
        finally:
            try:
                act()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
            finally:
                cleaned.append(number)

    def ends(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # else it is logged that nobody has asked

    async def call() -> None:
        for number in range(5):
            tasks.append(asyncio.create_task(background(number)))
            tasks[-1].add_done_callback(ends)

    executor.submit(call).result(PATIENCE)
    gate.hold(5)
    executor.shutdown()
    assert sorted(cleaned) == list(range(5))
    assert all(task.done() for task in tasks)


def test_async_generators_are_closed_at_the_end(executor: AsyncExecutor) -> None:
    closed = threading.Event()
    generators = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            closed.set()

    async def begin() -> int:
        generators.append(numbers())
        return await anext(generators[0])

    assert executor.submit(begin).result(PATIENCE) == 1
    assert not closed.is_set()
    executor.shutdown()
    assert closed.is_set()


def test_threads_of_to_thread_are_gone_at_the_end(executor: AsyncExecutor) -> None:
    before = set(threading.enumerate())

    async def call() -> str:
        return await asyncio.to_thread(lambda: threading.current_thread().name)

    assert executor.submit(call).result(PATIENCE) not in [thread.name for thread in ours()]
    assert len(set(threading.enumerate()) - before) == 2
    executor.shutdown()
    assert set(threading.enumerate()) == before


def test_loop_is_closed_at_the_end(executor: AsyncExecutor) -> None:
    loop = loop_of(executor)
    executor.shutdown()
    assert loop.is_closed()


# --- the loop's making


def test_loop_is_the_factory_s(loop_factory: LoopFactory | None) -> None:
    made: list[asyncio.AbstractEventLoop] = []

    def factory() -> asyncio.AbstractEventLoop:
        made.append((loop_factory or asyncio.new_event_loop)())
        return made[-1]

    with AsyncExecutor(loop_factory=factory) as executor:
        assert not made
        assert [loop_of(executor), loop_of(executor)] == made * 2


def test_factory_that_cannot_be_called_is_refused() -> None:
    factory: Any = "uvloop"
    with pytest.raises(TypeError, match=r"^loop_factory is 'uvloop'; expected a function"):
        AsyncExecutor(loop_factory=factory)


@pytest.mark.parametrize("error", [LookupError("no loop"), *ENDS], ids=repr)
def test_submit_raises_what_the_factory_does_and_the_next_one_tries_again(error: BaseException) -> None:
    failures = [error, error]

    def factory() -> asyncio.AbstractEventLoop:
        if failures:
            raise failures.pop()
        return asyncio.new_event_loop()

    with AsyncExecutor(loop_factory=factory) as executor:
        for _ in range(2):
            with pytest.raises(type(error)) as raised:
                executor.submit(double, 1)
            assert raised.value is error
            until(lambda: not ours())
        assert_lives(executor)
    with AsyncExecutor(loop_factory=partial(raise_one, error)) as executor:
        with pytest.raises(type(error)):
            executor.submit(double, 1)
        executor.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(double, 1)
    error.__traceback__ = None


def test_submit_raises_if_no_thread_can_be_started_and_the_next_one_tries_again(
    executor: AsyncExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            executor.submit(double, 1)
    assert_lives(executor)


# --- the interpreter's end

SCRIPT = """
    import atexit, asyncio, contextlib, sys, threading

    def submit_late():
        try:
            executor.submit(pending, 0)
        except RuntimeError as error:
            print("refused:", error)

    # Before the library's own hook, so it runs after that.
    atexit.register(submit_late)

    from twostage import AsyncExecutor
    LOOP
    executor = AsyncExecutor(loop_factory=loop_factory)

    async def background():
        try:
            await asyncio.Event().wait()
        finally:
            print("cleaned", flush=True)

    async def pending(number):
        if number == 0:
            task = asyncio.create_task(background())
        while not executor._loop._finishing:
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)
        print(number, flush=True)
"""
LOOP_LINES: Final = {"asyncio": "loop_factory = None"}
if sys.platform != "win32":
    LOOP_LINES["uvloop"] = "from uvloop import new_event_loop as loop_factory"

EXITS: Final = {
    "end": ("", 0, ""),
    "exception": ("raise ValueError('of the script')", 1, "ValueError: of the script"),
    "exit": ("sys.exit(3)", 3, ""),
    "shut down": ("executor.shutdown(wait=False)", 0, ""),
    "exception in with": ("with executor: raise ValueError('of the script')", 1, "ValueError: of the script"),
    "exit in with": ("with executor: sys.exit(3)", 3, ""),
    "exit by a callback": ("call.add_done_callback(lambda _: sys.exit(4))", 0, ""),
}


@pytest.mark.parametrize("loop", LOOP_LINES.values(), ids=LOOP_LINES)
@pytest.mark.parametrize(("last_line", "code", "last_word"), EXITS.values(), ids=EXITS)
def test_pending_calls_end_before_the_interpreter_does(
    last_line: str, code: int, last_word: str, loop: str
) -> None:
    body = """
        for number in range(3):
            call = executor.submit(pending, number)
    """
    process = ran(dedent(SCRIPT).replace("LOOP", loop) + dedent(body) + last_line)
    *pending, cleaned, refused = process.stdout.splitlines()
    assert sorted(pending) == ["0", "1", "2"]
    assert (cleaned, refused) == ("cleaned", "refused: cannot schedule new futures after shutdown")
    assert process.stderr.count("Traceback") == (last_word != "")
    assert process.stderr.endswith(last_word + "\n" if last_word else "")
    assert "Exception" not in process.stderr  # in a thread, or ignored
    assert process.returncode == code


@pytest.mark.parametrize("loop", LOOP_LINES.values(), ids=LOOP_LINES)
@pytest.mark.parametrize("dropped", [False, True])
def test_interpreter_awaits_a_call_that_had_a_thread(loop: str, *, dropped: bool) -> None:
    """Also if its executor is gone."""
    script = """
        import asyncio, threading
        from twostage import AsyncExecutor
        LOOP
        runs = threading.Event()

        async def pending():
            await asyncio.to_thread(runs.set)
            while threading.main_thread().is_alive():
                await asyncio.sleep(0.001)
            print("ended", flush=True)

        executor = AsyncExecutor(loop_factory=loop_factory)
        executor.submit(pending)
        assert runs.wait(20)
    """
    process = ran(dedent(script).replace("LOOP", loop) + "del executor\n" * dropped)
    assert (process.stdout, process.stderr, process.returncode) == ("ended\n", "", 0)
