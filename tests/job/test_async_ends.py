"""How a job from async code ends before its time: by cancellation, `aclose`, a failure, or with its loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
from asynchronous import patiently, turns, until
from common import ALWAYS, PATIENCE, LeaveError, nothing_collected, ours
from common import until as until_in_threads
from forms import aiterate, aiterate_in_order, arun, each_async_way
from tenacity import Retrying, stop_after_attempt, wait_fixed

from twostage import Stage, aiter_two_stage, arun_two_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from forms import Run

WORKERS: Final = 3
QUICK: Final = 0

pytestmark = pytest.mark.usefixtures("asyncio_is_quiet")


class Calls:
    """A function, plain or of coroutines, whose calls last until they are released, but for one."""

    def __init__(self, *, awaited: bool) -> None:
        self.begun: list[Any] = []
        self.done: list[Any] = []
        self.release = threading.Event()
        self.stage: Stage[Any, Any] = Stage(self.awaited if awaited else self.plain, workers=WORKERS)

    def plain(self, argument: Any) -> Any:  # noqa: ANN401 - of any job
        if argument is QUICK:
            return argument
        self.begun.append(argument)
        assert self.release.wait(PATIENCE)
        self.done.append(argument)
        return argument

    async def awaited(self, argument: Any) -> Any:  # noqa: ANN401 - of any job
        if argument is QUICK:
            return argument
        self.begun.append(argument)
        await until(self.release.is_set)
        self.done.append(argument)
        return argument

    def are_busy(self) -> bool:
        return len(self.begun) == WORKERS


@contextmanager
def released_at(ending: threading.Event, calls: Calls) -> Iterator[None]:
    """Lets the calls go when their job has begun to end."""

    def release() -> None:
        assert ending.wait(PATIENCE)
        calls.release.set()

    thread = threading.Thread(target=release)
    thread.start()
    yield
    thread.join()


async def until_ended(task: asyncio.Task[Any]) -> BaseException | None:
    """Returns what a task has raised, at its end."""
    await patiently(asyncio.wait([task]))
    try:
        task.result()
    except BaseException as error:  # noqa: BLE001 - whatever it is
        return error
    return None


async def stream(*arguments: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    async with aiter_two_stage(*arguments, **settings) as outcomes:
        return [outcome.index async for outcome in outcomes]


plain_and_awaited = pytest.mark.parametrize("awaited", [False, True], ids=["plain", "awaited"])
each_form = pytest.mark.parametrize("form", [arun_two_stage, stream])

Form: TypeAlias = "Callable[..., Coroutine[Any, Any, list[Any]]]"


# --- cancellation


@each_form
@plain_and_awaited
def test_cancellation_begins_nothing_more_and_waits_for_what_runs(
    form: Form, ending: threading.Event, *, awaited: bool
) -> None:
    calls = Calls(awaited=awaited)

    async def main() -> None:
        job = asyncio.create_task(form(itertools.count(), str, calls.stage))
        await until(calls.are_busy)
        job.cancel("enough")
        await until(ending.is_set)
        await turns()
        assert not job.done()
        calls.release.set()
        error = await until_ended(job)
        assert isinstance(error, asyncio.CancelledError)
        assert error.args == ("enough",)
        assert not ours()

    asyncio.run(main())
    assert len(calls.begun) == len(calls.done) == WORKERS


@each_form
@plain_and_awaited
@pytest.mark.parametrize("stage_one", [False, True])
def test_second_cancellation_gives_up_the_waiting(
    form: Form, ending: threading.Event, *, stage_one: bool, awaited: bool
) -> None:
    calls = Calls(awaited=awaited)
    stages = (calls.stage, str) if stage_one else (str, calls.stage)

    async def main() -> None:
        job = asyncio.create_task(form(itertools.count(), *stages))
        await until(calls.are_busy)
        job.cancel("enough")
        await until(ending.is_set)
        await turns()
        job.cancel("now")
        error = await until_ended(job)  # an `async with` block has closed it once more by then
        assert isinstance(error, asyncio.CancelledError)
        assert error.args == ("now",)
        assert not calls.done
        calls.release.set()
        await until(lambda: not ours())

    asyncio.run(main())
    assert len(calls.begun) == len(calls.done) == WORKERS


@each_form
@pytest.mark.parametrize("rounds", range(8))
def test_cancellation_in_the_first_rounds_of_the_loop_leaves_nothing(form: Form, rounds: int) -> None:
    async def source() -> AsyncIterator[int]:
        for number in itertools.count():
            await asyncio.sleep(0)
            yield number

    async def fetch(item: int) -> int:
        await asyncio.sleep(0)
        return item

    async def main() -> None:
        for items in (itertools.count(), range(10**9), source()):
            for functions in ((str, int), (fetch, fetch)):
                job = asyncio.create_task(form(items, *functions))
                await turns(rounds)
                job.cancel()
                assert isinstance(await until_ended(job), asyncio.CancelledError)
                if rounds:
                    assert len(asyncio.all_tasks()) == 1
                    assert not ours() or not isinstance(items, range)
        await until(lambda: not ours())

    asyncio.run(main())


def test_list_that_may_have_failures_can_be_cancelled() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def fetch(number: int) -> None:
            begun.set()

        settings: dict[str, Any] = {"return_exceptions": True, "max_failures": 3}
        job = asyncio.create_task(arun_two_stage(itertools.count(), int, fetch, **settings))
        await begun.wait()
        job.cancel()
        assert isinstance(await until_ended(job), asyncio.CancelledError)

    asyncio.run(main())
    assert not ours()


def test_cancellation_ends_what_an_async_source_waits_for() -> None:
    waiting = asyncio.Event()
    ended: list[BaseException] = []

    async def source() -> AsyncIterator[int]:
        yield 1
        waiting.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            ended.append(error)
            raise

    async def main() -> None:
        job = asyncio.create_task(arun_two_stage(source(), str, str))
        await waiting.wait()
        job.cancel()
        assert isinstance(await until_ended(job), asyncio.CancelledError)
        assert [type(error) for error in ended] == [asyncio.CancelledError]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@each_form
def test_cancellation_does_not_wait_for_retries(form: Form) -> None:
    waits = threading.Event()
    hour = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(3600), before_sleep=lambda _: waits.set())

    async def fail(_: object) -> None:
        raise LookupError

    async def main() -> None:
        job = asyncio.create_task(form([1], str, fail, retry=hour))
        await until(waits.is_set)
        job.cancel()
        assert isinstance(await until_ended(job), asyncio.CancelledError)

    asyncio.run(main())
    assert not ours()


@each_form
@plain_and_awaited
def test_timeout_of_asyncio_waits_for_what_runs(
    form: Form, ending: threading.Event, *, awaited: bool
) -> None:
    calls = Calls(awaited=awaited)

    async def main() -> None:
        async def run() -> None:
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                await form(itertools.count(), str, calls.stage)

        limits: list[asyncio.Timeout] = []
        job = asyncio.create_task(run())
        await until(calls.are_busy)
        limits[0].reschedule(0)
        await until(ending.is_set)
        assert not job.done()
        calls.release.set()
        assert isinstance(await until_ended(job), TimeoutError)
        assert limits[0].expired()

    asyncio.run(main())
    assert len(calls.done) == WORKERS
    assert not ours()


@each_form
def test_sibling_in_a_task_group_that_fails_ends_the_job(form: Form, ending: threading.Event) -> None:
    calls = Calls(awaited=True)

    async def fail() -> None:
        await until(calls.are_busy)
        raise LookupError

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(form(itertools.count(), str, calls.stage))
            group.create_task(fail())

    with released_at(ending, calls), pytest.raises(ExceptionGroup) as raised:
        asyncio.run(main())
    assert [type(error) for error in raised.value.exceptions] == [LookupError]
    assert len(calls.done) == WORKERS
    assert not ours()


@plain_and_awaited
def test_client_that_disconnects_ends_the_job(ending: threading.Event, *, awaited: bool) -> None:
    """As a web framework does it: it closes the generator that makes the body of its answer."""
    calls = Calls(awaited=awaited)
    calls.release.set()

    async def body() -> AsyncIterator[int]:
        async with aiter_two_stage(itertools.count(), str, calls.stage) as outcomes:
            async for outcome in outcomes:
                yield outcome.item

    async def main() -> None:
        answer = body()
        await anext(answer)
        await patiently(answer.aclose())  # type: ignore[attr-defined] # it is a generator
        assert not ours()

    asyncio.run(main())
    assert len(calls.begun) == len(calls.done)


def test_cancelled_anext_is_the_end_of_the_stream() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async def main() -> None:
        outcomes = aiter_two_stage(source(), str, str)
        assert (await anext(outcomes)).item == 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(outcomes), 0.01)
        assert await anext(outcomes, None) is None

    asyncio.run(main())
    assert not ours()


# --- failures


@each_async_way
@plain_and_awaited
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, LeaveError])
def test_what_is_no_exception_ends_the_job_and_is_raised_as_it_is(
    kind: type[BaseException], job: Run, *, awaited: bool, return_exceptions: bool
) -> None:
    error = kind("as it is")

    def fail(number: int) -> int:
        if number == 3:
            raise error
        return number

    async def fail_awaited(number: int) -> int:
        await asyncio.sleep(0)
        return fail(number)

    fetch = fail_awaited if awaited else fail
    for functions in ((fetch, str), (int, fetch)):
        with pytest.raises(kind) as raised:
            job(itertools.count(), *functions, return_exceptions=return_exceptions, retry=ALWAYS)
        assert raised.value is error
        assert not ours()


def test_ctrl_c_that_comes_in_a_coroutine_while_what_runs_is_awaited_gives_that_up(
    ending: threading.Event,
) -> None:
    begun: list[int] = []

    async def fetch(number: int) -> None:
        begun.append(number)
        await until(ending.is_set)
        if number == 0:
            raise KeyboardInterrupt
        await asyncio.Event().wait()

    async def main() -> None:
        job = asyncio.create_task(arun_two_stage(range(3), int, fetch))
        await until(lambda: len(begun) == 3)
        job.cancel()
        await job

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    until_in_threads(lambda: not ours())


@each_async_way
@plain_and_awaited
def test_failure_waits_for_what_runs(job: Run, ending: threading.Event, *, awaited: bool) -> None:
    calls = Calls(awaited=awaited)
    error = LookupError()

    async def first(number: int) -> int:
        if number <= WORKERS:
            return number
        await until(calls.are_busy)
        raise error

    with released_at(ending, calls), pytest.raises(LookupError) as raised:
        job(itertools.count(), first, calls.stage, token_workers=1)
    assert raised.value is error
    assert len(calls.done) == len(calls.begun) == WORKERS
    assert not ours()


@plain_and_awaited
@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_stop_iteration_of_a_function_does_not_end_a_loop_as_if_complete(
    kind: type[Exception], *, awaited: bool
) -> None:
    def plain(number: int) -> int:
        if number == 2:
            raise kind("of the user's")
        return number

    async def of_coroutines(number: int) -> int:
        return plain(number)

    fetch = of_coroutines if awaited else plain
    raised_as = RuntimeError if awaited and kind is StopIteration else kind  # by Python, in the coroutine
    for functions in ((fetch, str), (int, fetch)):
        with pytest.raises(RuntimeError, match=kind.__name__):
            aiterate(range(4), *functions)
        with pytest.raises((RuntimeError, kind)):  # no coroutine can raise a StopIteration
            arun(range(4), *functions)
        for job in (arun, aiterate, aiterate_in_order):
            kept = job(range(4), *functions, return_exceptions=True)
            assert [type(one) for one in kept if isinstance(one, Exception)] == [raised_as]
    assert not ours()


@each_async_way
def test_call_that_is_cancelled_by_itself_fails_alone(job: Run) -> None:
    async def fetch(number: str) -> str:
        if number == "2":
            raise asyncio.CancelledError
        if number == "3":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(PATIENCE)
        return number

    results = job(range(5), str, fetch, return_exceptions=True)
    assert [type(result) for result in results] == [str, str, CancelledError, CancelledError, str]


def test_failure_is_no_reference_cycle() -> None:
    class KeptError(LookupError):
        pass

    async def fail(_: object) -> None:
        raise KeptError

    async def main(form: Form) -> weakref.ref[BaseException]:
        try:
            await form([1], str, fail)
        except KeptError as error:
            return weakref.ref(error)
        raise AssertionError

    for form in (arun_two_stage, stream):
        with nothing_collected():
            assert asyncio.run(main(form))() is None


# --- nobody closes it


@plain_and_awaited
def test_job_that_is_dropped_lets_what_runs_end(ending: threading.Event, *, awaited: bool) -> None:
    calls = Calls(awaited=awaited)

    async def main() -> None:
        outcomes = aiter_two_stage(itertools.count(), int, calls.stage)
        assert (await anext(outcomes)).item == QUICK
        await until(calls.are_busy)
        del outcomes
        await until(ending.is_set)
        calls.release.set()
        await until(lambda: not ours())
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(main())
    assert len(calls.begun) == len(calls.done) == WORKERS


@plain_and_awaited
@pytest.mark.parametrize("waiting", [False, True])
def test_job_that_is_left_open_ends_with_its_loop(
    ending: threading.Event, *, awaited: bool, waiting: bool
) -> None:
    calls = Calls(awaited=awaited)
    kept: list[object] = []

    async def main() -> None:
        outcomes = aiter_two_stage(itertools.count(), int, calls.stage)
        assert (await anext(outcomes)).item == QUICK
        await until(calls.are_busy)
        kept.append(asyncio.create_task(anext(outcomes)) if waiting else outcomes)
        await turns()

    with released_at(ending, calls):
        asyncio.run(main())
        kept.clear()
    until_in_threads(lambda: not ours())


# --- threads that cannot be started


def test_thread_of_the_coordinator_that_cannot_be_started_ends_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = RuntimeError("can't start new thread")

    def fail(_: threading.Thread) -> None:
        raise error

    source = (number for number in itertools.count())

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError) as raised:
                await patiently(arun_two_stage(source, str, str))
            assert raised.value is error
            assert next(source, None) is None  # closed
            outcomes = aiter_two_stage([1], str, str)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await patiently(anext(outcomes))
        assert await anext(outcomes, None) is None

    asyncio.run(main())
    assert not ours()


# --- whoever awaits it is gone


def test_coroutine_that_is_closed_ends_the_job_without_waiting() -> None:
    release = threading.Event()

    async def main() -> None:
        outcomes = aiter_two_stage(range(3), str, lambda _: release.wait(PATIENCE))
        for step in (outcomes.__anext__(), arun_two_stage(range(3), str, lambda _: release.wait(PATIENCE))):
            await await_and_close(step)
        assert await anext(outcomes, None) is None
        release.set()
        await until(lambda: not ours())

    asyncio.run(main())


async def await_and_close(coroutine: Coroutine[Any, Any, object]) -> None:
    """As Python does it with what awaits something for ever on a loop that is gone."""
    coroutine.send(None)
    await turns()
    coroutine.send(None)
    coroutine.close()


@pytest.mark.parametrize("times", [1, 2])
def test_source_that_blocks_is_not_touched_by_who_closes_the_job_again(times: int) -> None:
    release = threading.Event()
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield 1
            assert release.wait(PATIENCE)
        finally:
            closed.append(threading.current_thread().name)

    async def main() -> None:
        outcomes = aiter_two_stage(source(), str, str)
        await anext(outcomes)
        for _ in range(times):
            await patiently(outcomes.aclose())
        assert not closed
        release.set()
        await until(lambda: not ours())

    asyncio.run(main())
    assert closed == ["twostage-source"]
