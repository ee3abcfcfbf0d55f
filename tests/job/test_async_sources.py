"""Sources of a job from async code: where each kind is read, and that it is closed once, however it ends."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from asynchronous import patiently, turns, until
from common import PATIENCE, LeaveError, ours
from fakes import each, in_virtual_time
from forms import arun, each_async_way

from twostage import RunTimeout, aiter_two_stage, arun_two_stage
from twostage.job.sources import LONGEST_READ

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from forms import Run

pytestmark = pytest.mark.usefixtures("asyncio_is_quiet")

Place: TypeAlias = "tuple[str, asyncio.Task[Any] | None]"
"""A thread's name, and the task that runs in it."""


def here() -> Place:
    try:
        return threading.current_thread().name, asyncio.current_task()
    except RuntimeError:
        return threading.current_thread().name, None


class Numbers:
    """Where numbers come from, which knows where it was read and closed; and what it raises at its end."""

    def __init__(self, end: int | None = None, error: BaseException | None = None) -> None:
        self.places: set[Place] = set()
        self.read = 0
        self.closed = 0
        self._end = end
        self._error = error

    def next(self) -> int | None:
        self.places.add(here())
        if self.read == self._end:
            if self._error is not None:
                raise self._error
            return None
        self.read += 1
        return self.read - 1

    def close_here(self) -> None:
        self.places.add(here())
        self.closed += 1


class Iterating(Numbers):
    def __iter__(self) -> Iterator[int]:
        self.places.add(here())
        return self

    def __next__(self) -> int:
        if (number := self.next()) is None:
            raise StopIteration
        return number

    def close(self) -> None:
        self.close_here()


class Generating(Numbers):
    def generator(self) -> Iterator[int]:
        try:
            while (number := self.next()) is not None:
                yield number
        finally:
            self.close_here()


class AsyncIterating(Numbers):
    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await asyncio.sleep(0)
        if (number := self.next()) is None:
            raise StopAsyncIteration
        return number

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.close_here()


class Both(AsyncIterating):
    """Can be iterated over in both ways; read as what the caller's loop is made for."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("it is read by a task")

    def __next__(self) -> int:
        raise AssertionError("it is read by a task")

    def close(self) -> None:
        raise AssertionError("it is closed by a task")


class AsyncGenerating(Numbers):
    async def generator(self) -> AsyncIterator[int]:
        try:
            while (number := self.next()) is not None:
                yield number
        finally:
            await asyncio.sleep(0)
            self.close_here()


KINDS: list[type[Numbers]] = [Iterating, Generating, AsyncIterating, AsyncGenerating, Both]

each_kind = pytest.mark.parametrize("kind", KINDS)


def items_of(numbers: Any) -> Any:  # noqa: ANN401 - a source of either kind
    return numbers.generator() if isinstance(numbers, Generating | AsyncGenerating) else numbers


def is_read_by_a_task(kind: type[Numbers]) -> bool:
    return not issubclass(kind, Iterating | Generating)


# --- what is read, and where


class Bag:
    """An iterable of no kind that Python knows."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(300))


class Old:
    """Iterable as things were before `__iter__`."""

    def __getitem__(self, index: int) -> int:
        if index == 300:
            raise IndexError
        return index


@each_async_way
@pytest.mark.parametrize(
    "items",
    [list(range(300)), tuple(range(300)), range(300), dict.fromkeys(range(300)), Bag(), Old()],
    ids=lambda items: type(items).__name__,
)
def test_each_item_of_an_iterable_gives_its_result(items: Any, job: Run) -> None:  # noqa: ANN401 - of any kind
    assert job(items, str, int) == list(range(300))
    assert job(items, each(str), int, batch_size=7) == list(range(300))


@each_async_way
@each_kind
def test_each_item_of_an_iterator_gives_its_result(kind: type[Numbers], job: Run) -> None:
    for settings in ({}, {"batch_size": 7}, {"window": 7}):
        numbers = kind(300)
        fetch: Callable[[Any], Any] = each(str) if "batch_size" in settings else str
        assert job(items_of(numbers), fetch, int, **settings) == list(range(300))
        assert numbers.closed == 1
    assert not ours()


@each_async_way
@pytest.mark.parametrize("items", [[], (), range(0), iter(()), {}, AsyncIterating(0)], ids=repr)
def test_source_without_items_gives_none(items: Any, job: Run) -> None:  # noqa: ANN401 - of any kind
    assert job(items, str, int) == []


@each_kind
def test_iterator_is_read_and_closed_in_one_place_which_is_not_the_consumer_s(kind: type[Numbers]) -> None:
    numbers = kind(100)
    keyed: set[Place] = set()

    async def main() -> Place:
        async def slow(item: str) -> int:
            await asyncio.sleep(0)
            return int(item)

        def key(item: int) -> int:
            keyed.add(here())
            return item

        results = await arun_two_stage(items_of(numbers), str, slow, key=key, window=10)
        assert results == list(range(100))
        return here()

    consumer = asyncio.run(main())
    assert len(numbers.places) == 1
    assert keyed == numbers.places
    thread, task = keyed.pop()
    if is_read_by_a_task(kind):
        assert thread == consumer[0]
        assert task not in (None, consumer[1])
    else:
        assert (thread, task) == ("twostage-source", None)


@pytest.mark.parametrize("items", [[1, 2, 3], (1, 2, 3), range(1, 4)])
def test_what_is_in_memory_is_read_by_no_thread_of_its_own(items: Any) -> None:  # noqa: ANN401 - of any kind
    keyed: set[str] = set()

    def key(item: int) -> int:
        keyed.add(threading.current_thread().name)
        return item

    assert arun(items, str, int, key=key) == [1, 2, 3]
    assert keyed == {"twostage-coordinator"}


def test_list_of_a_class_of_the_users_may_take_its_time_and_is_read_by_a_thread() -> None:
    class Rows(list[int]):
        def __iter__(self) -> Iterator[int]:
            threads.append(threading.current_thread().name)
            return super().__iter__()

    threads: list[str] = []
    assert arun(Rows([1, 2, 3]), str, int) == [1, 2, 3]
    assert threads == ["twostage-source"]


def test_iterable_that_blocks_holds_nobody_up() -> None:
    class Blocking:
        def __iter__(self) -> Iterator[int]:
            assert release.wait(PATIENCE)
            return iter([1, 2])

    release = threading.Event()

    async def main() -> list[Any]:
        job = asyncio.create_task(arun_two_stage(Blocking(), str, int))
        await turns()
        release.set()
        return await patiently(job)

    assert asyncio.run(main()) == [1, 2]


def test_source_that_is_bound_to_its_thread_has_to_be_made_an_async_iterable() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("create table items as select 1 as number union select 2 union select 3")
    rows = database.execute("select number from items order by number")
    with pytest.raises(sqlite3.ProgrammingError, match="thread"):
        arun(iter(rows.fetchone, None), str, str)

    async def here_in_the_loop() -> AsyncIterator[object]:
        for row in rows:
            yield row

    assert arun(here_in_the_loop(), str, str) == ["(1,)", "(2,)", "(3,)"]
    database.close()


@each_kind
@pytest.mark.parametrize("ordered", [False, True])
def test_source_is_read_no_further_than_the_window(kind: type[Numbers], *, ordered: bool) -> None:
    numbers = kind()
    most = 0

    async def main() -> None:
        nonlocal most
        settings: Any = {"batch_size": 10, "window": 50, "ordered": ordered}
        async with aiter_two_stage(items_of(numbers), each(str), str, **settings) as outcomes:
            taken = 0
            async for _ in outcomes:
                most = max(most, numbers.read - taken)
                taken += 1
                if taken % 20 == 0:
                    await turns()
                if taken == 300:
                    break

    asyncio.run(main())
    assert 10 <= most <= 50


@in_virtual_time
@each_async_way
@each_kind
def test_virtual_time_reads_each_kind(kind: type[Numbers], job: Run) -> None:
    class Ready(AsyncIterating):
        async def __anext__(self) -> int:
            if (number := self.next()) is None:
                raise StopAsyncIteration
            return number

        async def aclose(self) -> None:
            self.close_here()

    numbers = Ready(30) if issubclass(kind, AsyncIterating) else kind(30)
    if kind is not AsyncGenerating:
        assert job(items_of(numbers), str, int) == list(range(30))
        assert numbers.closed == 1


# --- what it raises


@each_async_way
@each_kind
@pytest.mark.parametrize("error", [LookupError, LeaveError, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_the_source_raises_ends_the_job_as_it_is(
    error: type[BaseException], kind: type[Numbers], job: Run
) -> None:
    raised = error("the source's")
    numbers = kind(5, raised)
    with pytest.raises(error) as caught:
        job(items_of(numbers), str, int, return_exceptions=True)
    assert caught.value is raised
    assert numbers.closed == 1
    assert not ours()


@each_kind
def test_what_the_source_raises_comes_after_the_outcomes_that_are_done(kind: type[Numbers]) -> None:
    async def main() -> list[int]:
        outcomes = aiter_two_stage(items_of(kind(5, LookupError())), str, int, window=1)
        taken = [(await anext(outcomes)).index for _ in range(5)]
        with pytest.raises(LookupError):
            await anext(outcomes)
        assert await anext(outcomes, None) is None
        return taken

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


@each_async_way
def test_stop_iteration_is_not_taken_for_the_source_s_end(job: Run) -> None:
    class Wrong:
        def __iter__(self) -> Iterator[int]:
            raise StopIteration

    async def wrong() -> AsyncIterator[int]:
        yield 1
        raise StopIteration  # noqa: PLR1708 - as a user does it

    def key(item: int) -> int:
        raise StopAsyncIteration if item % 2 else StopIteration

    for wrong_items in (Wrong(), wrong()):
        with pytest.raises(RuntimeError, match="StopIteration"):
            job(wrong_items, str, str)
    for first, name in enumerate(["StopIteration", "StopAsyncIteration"]):
        numbers = AsyncIterating(9)
        numbers.read = first
        sources: list[Any] = [[first], iter([first]), numbers]
        for items in sources:
            with pytest.raises(RuntimeError, match=f"raised {name}"):
                job(items, str, str, key=key)
    assert not ours()


# --- its closing


def fail(_: object) -> None:
    raise ValueError


async def break_out(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    async with aiter_two_stage(items, str, str) as outcomes:
        async for outcome in outcomes:
            if outcome.index == 100:
                break


async def leave_at_once(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    async with aiter_two_stage(items, str, str):
        pass


async def close_twice(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    outcomes = aiter_two_stage(items, str, str)
    await anext(outcomes)
    await outcomes.aclose()
    await outcomes.aclose()
    assert await anext(outcomes, None) is None


async def fail_in_a_call(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    with pytest.raises(ValueError):  # noqa: PT011 - there is no other
        await arun_two_stage(items, fail, str)


async def fail_in_the_loop(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    outcomes = aiter_two_stage(items, str, str)
    with pytest.raises(LeaveError):
        async with outcomes:
            raise LeaveError(await anext(outcomes))


async def be_cancelled(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    begun = threading.Event()
    job = asyncio.create_task(arun_two_stage(items, lambda _: begun.set(), str))
    await until(begun.is_set)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


async def be_cancelled_at_the_first_await(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    job = asyncio.create_task(arun_two_stage(items, str, str))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


async def be_dropped(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    outcomes = aiter_two_stage(items, str, str)
    await anext(outcomes)
    del outcomes
    await until(lambda: not ours())


async def time_out(items: Any) -> None:  # noqa: ANN401 - a source of either kind
    outcomes = aiter_two_stage(items, str, str, timeout=0.001)
    with suppress(RunTimeout):
        async for _ in outcomes:
            pass


@pytest.mark.parametrize(
    "end",
    [
        break_out,
        leave_at_once,
        close_twice,
        fail_in_a_call,
        fail_in_the_loop,
        be_cancelled,
        be_cancelled_at_the_first_await,
        be_dropped,
        time_out,
    ],
)
@each_kind
def test_source_is_closed_once(kind: type[Numbers], end: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    numbers = kind()

    async def main() -> None:
        await patiently(end(items_of(numbers)))
        await until(lambda: not ours())
        begun = bool(numbers.read) or not isinstance(numbers, Generating | AsyncGenerating)
        assert numbers.closed == begun  # a generator that never began has nothing to close

    asyncio.run(main())


@each_kind
def test_job_that_is_left_open_closes_its_source_as_the_loop_ends(kind: type[Numbers]) -> None:
    numbers = kind()
    kept = []

    async def main() -> None:
        kept.append(aiter_two_stage(items_of(numbers), str, str))
        await anext(kept[0])

    asyncio.run(main())
    kept.clear()
    assert numbers.closed == 1 or not is_read_by_a_task(kind)


def test_source_is_closed_by_its_task_though_that_is_to_end_before_it_begins(ending: threading.Event) -> None:
    numbers = AsyncIterating()

    async def main() -> None:
        outcomes = aiter_two_stage(numbers, str, str)
        step = outcomes.__anext__()
        step.send(None)  # the job is going on
        outcomes._job.abandon()
        assert ending.wait(PATIENCE)  # as nothing else can on this loop meanwhile
        await patiently(outcomes.aclose())
        step.close()

    asyncio.run(main())
    assert (numbers.read, numbers.closed) == (0, 1)
    assert not ours()


def test_source_that_does_not_let_itself_be_cancelled_is_read_no_further() -> None:
    class Stubborn(AsyncIterating):
        async def __anext__(self) -> int:
            waiting.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(PATIENCE)
            return await super().__anext__()

    numbers = Stubborn()
    waiting = asyncio.Event()

    async def main() -> None:
        outcomes = aiter_two_stage(numbers, str, str)
        awaited = asyncio.create_task(anext(outcomes, None))
        await waiting.wait()
        await patiently(outcomes.aclose())
        await awaited

    asyncio.run(main())
    assert (numbers.read, numbers.closed) == (1, 1)


def test_closing_of_an_async_source_is_awaited_however_long_it_takes() -> None:
    class Slow(AsyncIterating):
        async def aclose(self) -> None:
            await asyncio.sleep(3 * LONGEST_READ)
            await super().aclose()

    numbers = Slow()

    async def main() -> None:
        outcomes = aiter_two_stage(numbers, str, str)
        await anext(outcomes)
        await patiently(outcomes.aclose())
        assert numbers.closed == 1

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Iterating, AsyncIterating])
def test_source_that_fails_as_it_is_closed_is_told_of(
    kind: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(kind):  # type: ignore[misc] # either
        def close_here(self) -> None:
            super().close_here()
            raise LookupError

    numbers = Failing()

    async def main() -> None:
        outcomes = aiter_two_stage(numbers, str, str)
        await anext(outcomes)
        await patiently(outcomes.aclose())

    asyncio.run(main())
    assert numbers.closed == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the source has failed as it was closed: <class 'LookupError'>"
    ]
    assert not ours()
