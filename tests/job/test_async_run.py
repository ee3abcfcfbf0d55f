"""Jobs from async code give what jobs from scripts give: results, order, and an outcome for each item."""

from __future__ import annotations

import asyncio
import itertools
import re
import weakref
from typing import TYPE_CHECKING, Any, Final

import pytest
from asynchronous import patiently, until
from common import AT_ONCE, WeakItem, WeakItems, nothing_collected, ours
from fakes import ExpiredError, Fake, each, in_virtual_time, refusing, stage
from forms import aiterate, arun, each_async_way

from twostage import (
    MissingToken,
    Rate,
    RunTimeout,
    Throttled,
    TooManyFailures,
    aiter_two_stage,
    arun_two_stage,
    iter_two_stage,
    run_two_stage,
)
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from forms import Run

pytestmark = pytest.mark.usefixtures("asyncio_is_quiet")

ITEMS: Final = 200


def plain(fetch: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a function of either kind
    return fetch


def awaited(fetch: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    """Makes a coroutine function of a plain one."""

    async def fetch_soon(argument: Any) -> Any:  # noqa: ANN401 - of any job
        await asyncio.sleep(0)
        return fetch(argument)

    return fetch_soon


each_function = pytest.mark.parametrize("made", [plain, awaited])


async def stream(items: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - any items
    for item in items:
        yield item


each_source = pytest.mark.parametrize("source", [list, iter, stream])


def fails_at_first(fetch: Callable[[Any], Any], error: Exception) -> Callable[[Any], Any]:
    """Makes a function that fails for each argument once."""
    known: set[Any] = set()

    def fetch_or_fail(argument: Any) -> Any:  # noqa: ANN401 - of any job
        mark = tuple(argument) if isinstance(argument, list) else argument
        if mark not in known:
            known.add(mark)
            raise error
        return fetch(argument)

    return fetch_or_fail


# --- results


@each_async_way
@each_function
@each_source
def test_each_kind_of_job_gives_each_item_its_result(source: Any, made: Any, job: Run) -> None:  # noqa: ANN401
    numbers = list(range(ITEMS))
    texts = [str(number) for number in numbers]
    assert job(source(numbers), made(str), made(int)) == numbers
    assert job(source(numbers), made(each(str)), made(int), batch_size=7) == numbers
    assert job(source(numbers), made(str), stage(made(each(int)), batch_size=5)) == numbers
    assert job(
        source(numbers), made(lambda batch: {one: str(one) for one in batch}), made(int), batch_size=7
    ) == (numbers)
    lists = job(source(numbers), made(lambda number: range(number % 3)), made(str), many=True)
    assert lists == [[str(token) for token in range(number % 3)] for number in numbers]
    lists = job(source(numbers), made(each(lambda number: [number] * 2)), made(str), many=True, batch_size=7)
    assert lists == [[text] * 2 for text in texts]
    assert not ours()


@each_async_way
@each_function
def test_what_fails_for_a_moment_is_tried_again(made: Any, job: Run) -> None:  # noqa: ANN401 - of either kind
    first = fails_at_first(each(str), ApiError(500))
    second = fails_at_first(int, ApiError(500))
    assert job(range(ITEMS), made(first), made(second), batch_size=7, retry=AT_ONCE) == list(range(ITEMS))


@each_async_way
@each_function
def test_stage_pauses_for_who_asks_for_it(made: Any, job: Run) -> None:  # noqa: ANN401 - of either kind
    throttled = fails_at_first(int, Throttled(0.001))
    assert job(range(10), made(str), made(throttled)) == list(range(10))


@each_async_way
@each_function
def test_tokens_that_have_expired_are_asked_for_anew(made: Any, job: Run) -> None:  # noqa: ANN401 - as above
    expired = fails_at_first(int, ExpiredError())
    fetch = Fake(each(str))
    assert job(range(ITEMS), made(fetch), made(expired), batch_size=7, refresh_token_on=ExpiredError) == list(
        range(ITEMS)
    )
    assert sorted(fetch.asked_items) == sorted([*range(ITEMS), *range(ITEMS)])


@each_async_way
@each_function
@each_source
def test_equal_items_are_asked_for_once(source: Any, made: Any, job: Run) -> None:  # noqa: ANN401 - as above
    fetch = Fake(str)
    items = [number % 10 for number in range(100)]
    assert job(source(items), made(fetch), made(int), key=abs, window=1000) == items
    if job is arun:
        assert sorted(fetch.asked) == list(range(10))


@each_async_way
@each_function
def test_failures_stand_in_their_items_places(made: Any, job: Run) -> None:  # noqa: ANN401 - of either kind
    def fetch(text: str) -> str:
        if text == "<5>":
            raise LookupError
        return text

    def some(batch: list[int]) -> dict[int, str]:
        return {number: text for number, text in zip(batch, refusing({3})(batch), strict=True) if number != 4}

    results = job(range(10), made(some), made(fetch), batch_size=4, return_exceptions=True)
    assert [type(result) for result in results[3:6]] == [ApiError, MissingToken, LookupError]
    assert results[:3] + results[6:] == [f"<{number}>" for number in (0, 1, 2, 6, 7, 8, 9)]


@each_async_way
@each_function
def test_first_failure_is_raised_with_its_note(made: Any, job: Run) -> None:  # noqa: ANN401 - of either kind
    error = LookupError()

    def fetch(_: str) -> str:
        raise error

    with pytest.raises(LookupError) as raised:
        job(["a"], made(str), made(fetch))
    assert raised.value is error
    assert error.__notes__ == ["twostage: stage two, 'a', 1 attempt"]
    assert not ours()


@each_function
def test_too_many_failures_end_the_job(made: Any) -> None:  # noqa: ANN401 - of either kind
    def fetch(number: int) -> int:
        if number % 2:
            raise LookupError(number)
        return number

    settings: dict[str, Any] = {"return_exceptions": True, "max_failures": 3}
    with pytest.raises(TooManyFailures) as raised:
        arun(itertools.count(), int, stage(made(fetch), workers=1), **settings)
    assert sum(outcome.exception is not None for outcome in raised.value.outcomes) >= 4
    with pytest.raises(TooManyFailures):
        aiterate(itertools.count(), int, made(fetch), **settings)
    assert len(arun(range(7), int, made(fetch), **settings)) == 7
    assert not ours()


@pytest.mark.parametrize("ordered", [False, True])
def test_outcomes_come_as_they_complete_or_in_order(*, ordered: bool) -> None:
    async def main() -> list[int]:
        others_are_done = asyncio.Event()
        done: list[int] = []

        async def fetch(number: int) -> int:
            if number == 0:
                await others_are_done.wait()
            done.append(number)
            if len(done) == 9:
                others_are_done.set()
            return number

        async with aiter_two_stage(range(10), int, fetch, ordered=ordered) as outcomes:
            return [outcome.index async for outcome in outcomes]

    assert asyncio.run(main()) == ([*range(10)] if ordered else [*range(1, 10), 0])


# --- time


@in_virtual_time
@each_async_way
def test_list_has_an_entry_for_each_item_when_the_time_is_over(job: Run) -> None:
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for number in range(50):
            read += 1
            yield number

    for items in (source(), stream(range(50)), list(range(50))):
        api = SimulatedApi(int, latency=1.0)
        settings: dict[str, Any] = {"timeout": 4.5, "result_workers": 2}
        if job is arun:
            results = job(items, str, api, return_exceptions=True, **settings)
            assert [type(result) for result in results] == [int] * 10 + [RunTimeout] * 40
        with pytest.raises(RunTimeout):
            job(list(range(50)), str, api, **settings)
    assert job is not arun or read == 50


def test_stream_raises_when_the_time_is_over(virtual: VirtualTime) -> None:
    async def main(items: Any) -> list[int]:  # noqa: ANN401 - of any kind
        taken = []
        api = SimulatedApi(int, latency=1.0)
        outcomes = aiter_two_stage(items, str, stage(api, workers=2), timeout=4.5, window=30)
        try:
            async for outcome in outcomes:
                taken.append(outcome.index)  # noqa: PERF401 - they are wanted in spite of the exception
        except RunTimeout:
            assert await anext(outcomes, None) is None
            return taken
        raise AssertionError

    for items in (itertools.count(), stream(itertools.count()), range(10**9)):
        assert asyncio.run(main(items)) == list(range(10))


def test_timeout_of_the_run_on_a_real_loop_ends_what_waits() -> None:
    async def never() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async def main() -> None:
        outcomes = aiter_two_stage(never(), str, str, timeout=0.05)
        assert (await anext(outcomes)).item == 1
        with pytest.raises(RunTimeout):
            await patiently(anext(outcomes))
        results = await arun_two_stage(
            range(5), str, awaited_forever, timeout=0.01, retry=None, return_exceptions=True
        )
        assert [type(result) for result in results] == [str] * 5

    asyncio.run(main())
    assert not ours()


async def awaited_forever(token: str) -> str:
    """Longer than the time-out of the run, which lets it end."""
    await asyncio.sleep(0.02)
    return token


def test_batch_leaves_when_it_has_lingered(virtual: VirtualTime) -> None:
    def slow() -> Iterator[int]:
        for number in range(10):
            sleep(1)
            yield number

    async def slow_too() -> AsyncIterator[int]:
        for number in range(10):
            sleep(1)
            yield number

    async def main(items: Any) -> None:  # noqa: ANN401 - of either kind
        fetch = Fake(each(str), virtual=virtual)
        begin = virtual.now
        async with aiter_two_stage(items, fetch, int, batch_size=10, linger=3.5) as outcomes:
            assert [outcome.index async for outcome in outcomes] == list(range(10))
        assert [made.began - begin for made in fetch.calls] == [4.5, 8.5, 10.0]

    asyncio.run(main(slow()))
    asyncio.run(main(slow_too()))


def test_part_full_batch_leaves_on_a_real_loop_while_the_source_waits() -> None:
    more = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await more.wait()
        yield 2

    async def main() -> None:
        async with aiter_two_stage(source(), each(str), int, batch_size=10, linger=0.001) as outcomes:
            assert (await patiently(anext(outcomes))).item == 1
            more.set()
            assert (await patiently(anext(outcomes))).item == 2

    asyncio.run(main())


def test_same_seed_gives_the_same_log_in_virtual_time() -> None:
    def logged() -> list[str]:
        log: list[str] = []
        with VirtualTime(seed=3, log=log.append):
            first = SimulatedApi(each(str), latency=(1, 3), fail=0.1, seed=1)
            second = SimulatedApi(int, latency=(0.5, 1.5), fail=0.1, seed=2)
            assert arun(range(500), first, second, batch_size=10) == list(range(500))
        return log

    assert logged() == logged()


@each_async_way
def test_virtual_time_waits_for_nothing(job: Run, virtual: VirtualTime) -> None:
    async def hours(item: int) -> int:
        sleep(3600)
        return item

    settings: dict[str, Any] = {"result_workers": 10}
    assert job(range(100), int, hours, **settings) == list(range(100))
    assert virtual.now == 36000
    first = stage(int, rate=Rate(1, per=60))
    assert job(stream(range(10)), first, str) == [str(number) for number in range(10)]
    assert virtual.now == 36000 + 9 * 60


# --- memory


@each_function
@pytest.mark.parametrize("asynchronous", [False, True])
def test_stream_keeps_nothing_of_what_was_handed_over(made: Any, *, asynchronous: bool) -> None:  # noqa: ANN401
    source = WeakItems()
    settings: dict[str, Any] = {"window": 20, "batch_size": 4}

    async def main() -> None:
        items = stream(source) if asynchronous else iter(source)
        outcomes = aiter_two_stage(items, made(each(id)), made(str), **settings)
        for _ in range(300):
            await anext(outcomes)
        assert len(source.read) >= 300
        assert len(source.kept()) <= 22  # one in the hands of who reads, one of who takes
        await outcomes.aclose()

    with nothing_collected():
        asyncio.run(main())
        assert source.kept() == []


@each_function
def test_finished_list_keeps_nothing_but_its_results(made: Any) -> None:  # noqa: ANN401 - of either kind
    source = WeakItems()

    async def main() -> list[Any]:
        items = (item for item in itertools.islice(source, 50))
        results: list[Any] = await arun_two_stage(items, made(id), made(str))
        return results

    with nothing_collected():
        assert len(asyncio.run(main())) == 50
        assert source.kept() == []


def test_list_that_was_read_is_not_kept_by_a_job_that_has_ended() -> None:
    def fail(_: object) -> None:
        raise LookupError

    items = [WeakItem() for _ in range(1000)]
    first = weakref.ref(items[999])

    async def main() -> None:
        with pytest.raises(LookupError):
            await arun_two_stage(items, fail, str, window=10)

    with nothing_collected():
        asyncio.run(main())
        items.clear()
        assert first() is None


# --- the consumer


def test_calls_go_on_while_the_consumer_is_away() -> None:
    async def main() -> None:
        done = []

        async def fetch(number: int) -> int:
            done.append(number)
            return number

        async with aiter_two_stage(stream(range(100)), int, fetch) as outcomes:
            await anext(outcomes)
            await until(lambda: len(done) == 100)
            assert len([outcome async for outcome in outcomes]) == 99

    asyncio.run(main())


def test_many_consumers_share_a_stream() -> None:
    async def main() -> list[int]:
        taken: list[int] = []
        outcomes = aiter_two_stage(stream(range(500)), int, awaited(int))

        async def consume() -> None:
            async for outcome in outcomes:
                taken.append(outcome.index)
                await asyncio.sleep(0)

        await patiently(asyncio.gather(*(consume() for _ in range(10))))
        return taken

    assert sorted(asyncio.run(main())) == list(range(500))
    assert not ours()


def test_stream_that_has_ended_stays_so() -> None:
    async def main() -> None:
        outcomes = aiter_two_stage([1], str, str)
        assert [outcome.item async for outcome in outcomes] == [1]
        assert [outcome.item async for outcome in outcomes] == []
        assert not ours()
        await outcomes.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(outcomes)

    asyncio.run(main())


# --- arguments


class Untouched:
    """A source and a function that nobody may use."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("it was read")

    def __call__(self, argument: object) -> object:
        raise AssertionError("it was called")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"items": 3}, TypeError, "items is 3; expected something to iterate over"),
        ({"fetch_token": 3}, TypeError, "fetch_token is 3"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"window": 1, "batch_size": 2}, ValueError, "window is 1"),
        ({"timeout": -1}, ValueError, "timeout is -1"),
        ({"max_failures": 3}, TypeError, "max_failures is given without return_exceptions=True"),
        ({"key": 3}, TypeError, "key is 3"),
        ({"retry": "often"}, TypeError, "retry is 'often'"),
    ],
    ids=str,
)
def test_bad_argument_is_refused_before_anything_is_touched(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    untouched: Any = Untouched()
    settings: dict[str, Any] = {"items": untouched, "fetch_token": untouched, "fetch_result": untouched}
    settings |= arguments
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        arun(**settings)
    iterates: Any = aiter_two_stage  # for checkers, what it takes first has no name
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        iterates(**settings)


def test_arguments_of_the_stream_are_refused_too() -> None:
    with pytest.raises(ValueError, match="linger is 0"):
        aiter_two_stage([1], str, str, linger=0)
    function: Callable[..., Any] = arun_two_stage
    for name in ("linger", "ordered"):
        with pytest.raises(TypeError, match=name):
            function([1], str, str, **{name: 1.0})


@pytest.mark.parametrize("function", [run_two_stage, iter_two_stage])
def test_async_iterable_is_refused_where_it_cannot_be_awaited(function: Callable[..., Any]) -> None:
    with pytest.raises(
        TypeError, match=r"expected something to iterate over; with an async iterable, await arun"
    ):
        function(stream([1]), str, str)


def test_coroutine_or_function_in_place_of_the_items_is_refused() -> None:
    coroutine = awaited_forever("no items")
    wrong: list[Any] = [coroutine, stream, awaited_forever]
    for items in wrong:
        with pytest.raises(TypeError, match=r"^items is .*; expected something to iterate over$"):
            arun(items, str, str)
    coroutine.close()
