"""What coroutine functions raise: it reaches the caller as it is, keeps nothing, and never ends the loop."""

from __future__ import annotations

import asyncio
import functools
import itertools
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS, AT_ONCE, PATIENCE, LeaveError, as_it_is, frames, nothing_collected, ours, until
from fakes import notes, outcomes_of, stage
from forms import Run, each_way, run

from twostage import (
    iter_two_stage,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from twostage.testing import VirtualTime


# --- failures


@each_way
@pytest.mark.parametrize("place", ["stage one", "stage two"])
def test_failure_is_raised_as_it_is_and_begins_in_the_users_function(
    place: str, job: Run, on: dict[str, Any]
) -> None:
    error = LookupError("as it is")

    async def inner() -> None:
        await asyncio.sleep(0)
        raise error

    async def fetch(item: int) -> int:
        if item == 3:
            await inner()
        return item

    failing = stage(fetch, **on)
    with pytest.raises(LookupError) as raised:
        job(range(9), *((failing, as_it_is) if place == "stage one" else (as_it_is, failing)))
    assert raised.value is error
    assert notes(error) == [f"twostage: {place}, 3, 1 attempt"]
    assert frames(error)[-2:] == ["fetch", "inner"]
    assert "ended" not in frames(error)


def test_kept_failure_has_no_frame_of_ours(on: dict[str, Any]) -> None:
    async def fetch(item: int) -> int:
        await asyncio.sleep(0)
        raise LookupError

    (outcome,) = outcomes_of([1], stage(fetch, **on), as_it_is)
    assert outcome.exception is not None
    assert frames(outcome.exception) == ["fetch"]


@each_way
@pytest.mark.parametrize("kind", [LookupError, LeaveError, KeyboardInterrupt, SystemExit])
def test_failure_is_no_reference_cycle(kind: type[BaseException], job: Run, on: dict[str, Any]) -> None:
    class Kept(kind):  # type: ignore[misc, valid-type] # a class of Python, so that it can be referred to
        pass

    async def fetch(item: int) -> int:
        await asyncio.sleep(0)
        raise Kept

    def fail() -> weakref.ref[BaseException]:
        try:
            job([1], as_it_is, stage(fetch, **on))
        except Kept as error:
            return weakref.ref(error)
        raise AssertionError

    with nothing_collected():
        failure = fail()
        until(lambda: failure() is None)


def test_nothing_is_kept_of_attempts_that_have_ended(on: dict[str, Any]) -> None:
    """Not even while their stream goes on: neither items nor tokens, answers, failures or tasks.

    A task may be the next attempt's.
    """

    class Kept(str):
        """Can be referred to weakly."""

        __slots__ = ("__weakref__",)

    class KeptError(ConnectionError):
        pass

    kept: list[weakref.ref[Any]] = []
    hangs = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    tasks: list[asyncio.Task[Any] | None] = []

    def keep(one: Any) -> Any:  # noqa: ANN401 - of anything
        kept.append(weakref.ref(one))
        return one

    def source() -> Iterator[Kept | str]:
        yield from (keep(Kept(number)) for number in range(50))
        yield "last"

    async def fetch(argument: str) -> str:
        if argument == "last":
            tasks.append(asyncio.current_task())
            loops.append(asyncio.get_running_loop())
            await asyncio.wait_for(hangs.wait(), PATIENCE)
            return argument
        keep(asyncio.current_task())
        if len(kept) % 5 == 0:
            raise keep(KeptError())
        answer: str = keep(Kept(argument))
        return answer

    both = stage(fetch, retry=ALWAYS, **on)
    with nothing_collected(), iter_two_stage(source(), both, both) as outcomes:
        for _ in range(50):
            next(outcomes)
        until(lambda: loops)
        assert len(kept) > 200
        until(lambda: not [one for one in kept if one() is not None and one() not in tasks])
        loops[0].call_soon_threadsafe(hangs.set)
        assert next(outcomes).item == "last"


@each_way
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, LeaveError, GeneratorExit])
def test_what_is_no_exception_ends_the_job_and_not_the_loop(
    error: type[BaseException], job: Run, on: dict[str, Any], *, return_exceptions: bool
) -> None:
    this = error("as it is")
    raisers = 0

    async def fetch(item: int) -> int:
        nonlocal raisers
        await asyncio.sleep(0)
        if item == 3:
            raisers += 1
            raise this
        return item

    failing = stage(fetch, retry=ALWAYS, **on)
    with pytest.raises(error) as raised:
        job(itertools.count(), as_it_is, failing, return_exceptions=return_exceptions)
    assert raised.value is this
    assert not notes(this)
    assert raisers == 1
    assert len(ours()) == len(on)
    if on:
        assert run([1], stage(as_it_is, **on), as_it_is) == [1]


@pytest.mark.parametrize("raised_in", ["the call", "the coroutine"])
def test_stop_iteration_of_a_function_does_not_end_a_loop_as_if_complete(
    raised_in: str, on: dict[str, Any]
) -> None:
    def stop(item: int) -> Coroutine[Any, Any, int]:
        if item == 2 and raised_in == "the call":
            raise StopIteration("of the user's")
        return fetch(item)

    async def fetch(item: int) -> int:
        if item == 2:
            raise StopIteration("of the user's")
        return item

    failing = stage(functools.wraps(fetch)(stop), **on)
    outcomes = iter_two_stage(range(4), as_it_is, failing)
    with pytest.raises(RuntimeError, match="raised StopIteration") as raised:
        list(outcomes)
    assert isinstance(raised.value.__cause__, StopIteration)
    assert raised.value.__cause__.value == "of the user's"
    kept = run(range(4), as_it_is, failing, return_exceptions=True)
    kind = StopIteration if raised_in == "the call" else RuntimeError  # PEP 479
    assert [type(one) for one in kept] == [int, int, kind, int]


@each_way
def test_stop_async_iteration_is_a_failure_like_any_other(job: Run, on: dict[str, Any]) -> None:
    async def fetch(item: int) -> int:
        if item == 2:
            raise StopAsyncIteration
        return item

    results = job(range(4), as_it_is, stage(fetch, **on), return_exceptions=True)
    assert [type(one) for one in results] == [int, int, StopAsyncIteration, int]


@each_way
def test_cancelled_error_of_a_functions_own_is_its_items_failure(job: Run, on: dict[str, Any]) -> None:
    async def fetch(item: int) -> int:
        await asyncio.sleep(0)
        if item == 1:
            raise asyncio.CancelledError
        if item == 2:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        return item

    results = job(range(4), as_it_is, stage(fetch, **on), return_exceptions=True)
    assert [results[0], results[3]] == [0, 3]
    for result in results[1:3]:
        assert isinstance(result, Exception)
        assert str(result) == "the call's task was cancelled, and not by its job"
        assert isinstance(result.__cause__, asyncio.CancelledError)
        assert frames(result.__cause__)[0] == "fetch"


@each_way
def test_asyncio_s_own_means_work_inside(job: Run, on: dict[str, Any]) -> None:
    attempts: Counter[int] = Counter()

    async def fail(item: int) -> None:
        raise LookupError(item)

    async def fetch(item: int) -> int:
        attempts[item] += 1
        if item == 1 and attempts[item] == 1:
            async with asyncio.timeout(0):
                await asyncio.sleep(PATIENCE)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(as_it_is(part)) for part in (item, 1)]
            if item == 2:
                group.create_task(fail(item))
        return sum(task.result() for task in tasks)

    results = job(range(4), as_it_is, stage(fetch, retry=AT_ONCE, **on), return_exceptions=True)
    assert [results[0], results[1], results[3]] == [1, 2, 4]
    assert isinstance(results[2], ExceptionGroup)
    assert attempts == {0: 1, 1: 2, 2: 1, 3: 1}


@each_way
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_task_that_a_call_has_created_may_raise_anything(
    error: type[BaseException], job: Run, on: dict[str, Any]
) -> None:
    """asyncio has it leave the loop as well; who awaits the task gets it, and else it is nobody's."""

    async def leave() -> None:
        raise error

    async def fetch(item: int) -> int:
        task = asyncio.Task(leave())  # an eager task factory would raise it here
        await asyncio.wait([task])
        if item == 20:
            await task
        assert type(task.exception()) is error
        return item

    assert job(range(20), as_it_is, stage(fetch, **on)) == list(range(20))
    with pytest.raises(error):
        job(range(30), as_it_is, stage(fetch, **on), return_exceptions=True)


@each_way
def test_in_virtual_time_failures_are_the_same(job: Run, virtual: VirtualTime) -> None:
    async def fetch(item: int) -> int:
        if item == 1:
            raise asyncio.CancelledError
        if item == 2:
            raise StopIteration
        if item == 3:
            raise LookupError
        return item

    def takes_no_time(item: int) -> Any:  # noqa: ANN401 - a coroutine or not
        return item if item == 5 else fetch(item)

    awaited = stage(functools.wraps(fetch)(takes_no_time))
    results = job(range(6), int, awaited, return_exceptions=True)
    assert [results[0], results[4]] == [0, 4]
    assert [str(results[1]), repr(results[3])] == [
        "the call's task was cancelled, and not by its job",
        "LookupError()",
    ]
    assert frames(results[3]) == frames(results[1].__cause__) == ["fetch"]
    assert isinstance(results[2].__cause__, StopIteration)
    assert "returned int, which can't be awaited" in str(results[5])
    with pytest.raises(RuntimeError, match="a coroutine awaits what takes real time"):
        job([1], int, as_it_is)
