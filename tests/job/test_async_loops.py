"""Jobs and event loops: which one a job belongs to, what runs there, and what becomes of it at its end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvloop
from asynchronous import patiently, turns
from common import PATIENCE, ours
from common import until as until_in_threads
from fakes import stage
from forms import arun, each_async_way
from scripts import STRICT, interrupt_when, running

from twostage import (
    AsyncExecutor,
    AttemptTimeout,
    aiter_two_stage,
    arun_two_stage,
    iter_two_stage,
    run_two_stage,
)
from twostage.demo.answers import result_of, token_of
from twostage.demo.api import EmbeddedApi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from forms import Run

    from twostage import AsyncOutcomes

pytestmark = pytest.mark.usefixtures("asyncio_is_quiet")

span: ContextVar[str] = ContextVar("span", default="none")


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


# --- where functions run


@each_async_way
def test_coroutines_run_on_the_callers_loop_and_plain_functions_in_threads(job: Run) -> None:
    threads: set[str] = set()

    async def fetch_token(item: int) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def fetch_result(token: asyncio.AbstractEventLoop) -> bool:
        threads.add(threading.current_thread().name)
        return token.is_running()

    async def fetch_loop(token: object) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert job(range(9), fetch_token, fetch_result) == [True] * 9
    assert all(name.startswith("twostage_") for name in threads)
    loops = job(range(9), fetch_token, fetch_loop)
    assert len(set(loops)) == 1
    assert not ours()


@each_async_way
@pytest.mark.parametrize("batch_size", [None, 7])
def test_plain_functions_and_coroutines_may_be_mixed(job: Run, batch_size: int | None) -> None:
    async def doubles(batch: list[int]) -> list[int]:
        return [await double(number) for number in batch]

    first: Any = double if batch_size is None else doubles
    settings: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    assert job(range(200), first, str, **settings) == [str(2 * number) for number in range(200)]
    assert job(range(200), first, double, **settings) == [4 * number for number in range(200)]
    assert job(range(200), int, stage(double, workers=1)) == [2 * number for number in range(200)]


def test_client_made_on_the_callers_loop_can_be_used(no_proxy: None) -> None:
    async def main(url: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:

            async def fetch_tokens(ids: list[int]) -> list[str]:
                answer = await client.post("/tokens", json={"ids": ids})
                return answer.raise_for_status().json()["tokens"]  # type: ignore[no-any-return] # JSON

            async def fetch_result(token: str) -> object:
                answer = await client.get(f"/results/{token}")
                return answer.raise_for_status().json()["result"]

            async def ids() -> AsyncIterator[int]:
                for id_ in range(100):
                    yield id_

            warm = (await client.get("/results/none")).status_code  # its connection belongs to this loop now
            assert warm == 404
            lists = [
                await arun_two_stage(items, fetch_tokens, fetch_result, batch_size=10)
                for items in (range(100), ids())
            ]
            assert lists[0] == lists[1]
            return lists[0]

    with EmbeddedApi(token_latency=0, result_latency=0) as api:
        results = asyncio.run(main(api.url))
    assert results == [result_of(token_of(id_)) for id_ in range(100)]


def test_context_of_a_stage_is_entered_and_left_once_on_the_callers_loop() -> None:
    places: list[tuple[str, object]] = []

    @asynccontextmanager
    async def client() -> AsyncIterator[str]:
        places.append(("entered", asyncio.get_running_loop()))
        try:
            yield span.get()
        finally:
            places.append(("left", asyncio.get_running_loop()))

    async def fetch(item: int, value: str) -> str:
        await asyncio.sleep(0)
        return f"{value} {item}"

    async def main() -> None:
        span.set("the caller's")
        results = await arun_two_stage(range(3), int, stage(fetch, context=client))
        assert results == [f"the caller's {item}" for item in range(3)]
        async with aiter_two_stage(range(3), stage(fetch, context=client), str) as outcomes:
            await anext(outcomes)
        loop = asyncio.get_running_loop()
        assert places == [("entered", loop), ("left", loop)] * 2

    asyncio.run(main())


def test_context_that_fails_ends_the_job() -> None:
    @asynccontextmanager
    async def client() -> AsyncIterator[None]:
        if span.get() == "none":
            raise LookupError("no client")
        yield

    async def fetch(item: int, value: object) -> int:
        return item

    with pytest.raises(LookupError, match="no client"):
        arun([1], int, stage(fetch, context=client))
    assert not ours()


@each_async_way
def test_executors_of_the_users_are_used(job: Run) -> None:
    async def threads(token: str) -> tuple[str, str]:
        return token, threading.current_thread().name

    with AsyncExecutor() as executor, ThreadPoolExecutor(2, "the user's") as pool:
        first = stage(lambda _: threading.current_thread().name, executor=pool)
        for token, thread in job(range(50), first, stage(threads, executor=executor)):
            assert token.startswith("the user's")
            assert thread == "twostage-loop"


# --- several jobs


def test_jobs_go_on_beside_each_other_on_one_loop() -> None:
    both = asyncio.Barrier(2)

    async def meet(token: int) -> int:
        await both.wait()
        return token

    async def main() -> list[list[int]]:
        jobs = [arun_two_stage(range(20), int, stage(meet, workers=1)) for _ in range(2)]
        return await patiently(asyncio.gather(*jobs))

    assert asyncio.run(main()) == [list(range(20))] * 2
    assert not ours()


def test_job_may_be_awaited_inside_of_an_attempt() -> None:
    async def nested(number: int) -> list[int]:
        return await arun_two_stage([number] * 3, double, int)

    assert arun(range(5), double, nested) == [[4 * number] * 3 for number in range(5)]
    with AsyncExecutor() as executor:

        async def on_the_executor(number: int) -> list[int]:
            one = stage(double, executor=executor)
            results: list[int] = await arun_two_stage([number], one, one)
            return results

        outer = stage(on_the_executor, executor=executor, workers=1)
        assert arun(range(5), int, outer) == [[4 * number] for number in range(5)]
        assert run_two_stage(range(5), int, outer) == [[4 * number] for number in range(5)]
    assert not ours()


def test_job_that_would_wait_for_its_own_attempt_is_refused() -> None:
    with ThreadPoolExecutor(1) as pool, AsyncExecutor() as executor:

        def in_threads(number: int) -> list[int]:
            return arun([number], int, stage(int, executor=pool))

        with pytest.raises(RuntimeError, match="runs the attempt that starts this job"):
            arun([1], int, stage(in_threads, executor=pool))

        async def on_the_executor(number: int) -> list[int]:
            with pytest.warns(UserWarning, match="Use arun_two_stage"):
                return run_two_stage([number], int, stage(double, executor=executor))

        with pytest.raises(RuntimeError, match="runs the attempt that starts this job"):
            arun([1], int, stage(on_the_executor, executor=executor))
        with pytest.raises(RuntimeError, match="runs the attempt that starts this job"):
            run_two_stage([1], int, stage(on_the_executor, executor=executor))


# --- several tasks at once


def test_outcomes_may_be_awaited_by_several_tasks_at_once() -> None:
    release = threading.Event()

    def fetch(item: int) -> int:
        assert release.wait(PATIENCE)
        return item

    async def main() -> list[Any]:
        outcomes = aiter_two_stage(range(3), int, fetch)
        tasks = [asyncio.create_task(anext(outcomes, None)) for _ in range(5)]
        await turns()
        release.set()
        return await patiently(asyncio.gather(*tasks))

    taken = asyncio.run(main())
    assert sorted(outcome.index for outcome in taken if outcome) == [0, 1, 2]
    assert taken.count(None) == 2
    assert not ours()


def test_closing_ends_what_another_task_awaits() -> None:
    release = threading.Event()

    async def main() -> None:
        outcomes = aiter_two_stage(range(3), str, lambda _: release.wait(PATIENCE))
        awaited = asyncio.create_task(anext(outcomes, None))
        await turns()
        closing = [asyncio.create_task(outcomes.aclose()) for _ in range(2)]
        await turns()
        assert not any(task.done() for task in [awaited, *closing])
        release.set()
        await patiently(asyncio.gather(awaited, *closing))
        assert await anext(outcomes, None) is None

    asyncio.run(main())
    assert not ours()


# --- attempts that are given up


@pytest.mark.parametrize("stubborn", [False, True])
def test_coroutine_that_takes_too_long_is_cancelled_on_the_callers_loop(
    monkeypatch: pytest.MonkeyPatch, *, stubborn: bool
) -> None:
    monkeypatch.setattr("twostage.running.tasks.LONGEST_CANCEL", 0.01)
    cancelled: list[int] = []

    async def hang(number: int) -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(number)
                if not stubborn or len(cancelled) > 1:
                    raise

    async def main() -> None:
        with pytest.raises(AttemptTimeout):
            await patiently(arun_two_stage([1], int, stage(hang, attempt_timeout=0.01, retry=None)))

    asyncio.run(main())
    assert cancelled == ([1, 1] if stubborn else [1])  # the second time as the loop ends
    assert not ours()


# --- context variables


@pytest.mark.parametrize("awaited", [False, True])
def test_variables_of_the_caller_reach_its_functions_and_each_attempt_has_a_copy(*, awaited: bool) -> None:
    def plain(argument: object) -> str:
        seen = span.get()
        span.set(f"of {argument}")
        return seen

    async def of_coroutines(argument: object) -> str:
        await asyncio.sleep(0)
        return plain(argument)

    async def main() -> None:
        span.set("the caller's")
        fetch: Any = of_coroutines if awaited else plain
        async with aiter_two_stage(range(30), fetch, fetch) as outcomes:
            async for outcome in outcomes:
                assert (outcome.token, outcome.result) == ("the caller's", "the caller's")
        assert span.get() == "the caller's"

    asyncio.run(main())


def test_variables_of_the_caller_reach_its_source_and_its_key() -> None:
    async def awaited() -> AsyncIterator[str]:
        for _ in range(30):
            yield span.get()

    def threaded() -> Iterator[str]:
        for _ in range(30):
            yield span.get()

    seen: set[str] = set()

    def key(item: str) -> str:
        seen.update({item, span.get()})
        return item

    async def main() -> None:
        span.set("the caller's")
        for items in (awaited(), threaded(), ["the caller's"]):
            await arun_two_stage(items, str, str, key=key)

    asyncio.run(main())
    assert seen == {"the caller's"}


# --- loops of other kinds, and several


FACTORIES: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]
if hasattr(asyncio, "eager_task_factory"):

    def eager() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore] # from 3.12
        return loop

    FACTORIES.append(eager)


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: f"{factory.__module__}.{factory.__name__}")
@pytest.mark.parametrize("debug", [False, True])
def test_job_runs_on_each_kind_of_loop(
    factory: Callable[[], asyncio.AbstractEventLoop], *, debug: bool
) -> None:
    async def source(numbers: Iterable[int]) -> AsyncIterator[int]:
        for number in numbers:
            yield number

    async def main() -> None:
        for items in (source(range(100)), iter(range(100)), range(100)):
            assert await arun_two_stage(items, double, double) == [4 * number for number in range(100)]
        for endless in (source(itertools.count()), itertools.count()):
            job = asyncio.create_task(arun_two_stage(endless, double, double))
            await turns()
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await patiently(job)
        with pytest.raises(SystemExit):
            await arun_two_stage(range(10), double, leave)

    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.get_loop().slow_callback_duration = PATIENCE
        runner.run(main())
    assert not ours()


async def leave(_: object) -> None:
    raise SystemExit(3)


def test_stream_made_without_a_loop_belongs_to_the_one_where_it_is_iterated() -> None:
    outcomes = aiter_two_stage(range(100), double, str, ordered=True)
    assert not ours()

    async def main() -> list[str]:
        return [outcome.result async for outcome in outcomes]

    assert asyncio.run(main()) == [str(2 * number) for number in range(100)]

    async def make() -> AsyncOutcomes[int, int, str]:
        return aiter_two_stage(range(100), double, str, ordered=True)

    outcomes = asyncio.run(make())
    assert asyncio.run(main()) == [str(2 * number) for number in range(100)]
    assert not ours()


@pytest.fixture
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostage.job.driver.LONGEST_GET", 0.002)
    monkeypatch.setattr("twostage.running.tasks.LONGEST_CANCEL", 0.01)


@pytest.mark.usefixtures("_looks_often")
def test_stream_that_is_left_open_ends_with_its_loop_and_is_nothing_for_another() -> None:
    kept = aiter_two_stage(itertools.count(), str, str, window=10)

    async def take() -> object:
        return await anext(kept, None)

    assert asyncio.run(take()) is not None
    until_in_threads(lambda: not ours())
    with pytest.raises(RuntimeError, match="event loop that the job belonged to has been closed"):
        list(map(asyncio.run, (take() for _ in range(11))))  # those that were done may still be had
    assert asyncio.run(take()) is None


@pytest.mark.usefixtures("_looks_often")
@pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited", "ignore:Exception ignored in. <coroutine"
)
@pytest.mark.parametrize("function", [str, double])
@pytest.mark.parametrize("dropped", [False, True])
def test_loop_that_is_closed_under_a_job_ends_it(function: Callable[[int], Any], *, dropped: bool) -> None:
    kept: list[object] = []

    async def source() -> AsyncIterator[int]:
        for number in itertools.count():
            yield number

    async def main(items: Any) -> None:  # noqa: ANN401 - a source of either kind
        outcomes = aiter_two_stage(items, function, str, window=10)
        await anext(outcomes)
        kept.append(outcomes)

    for items in (itertools.count(), range(10**9), source()):
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # it tells of tasks that are destroyed
        loop.run_until_complete(main(items))
        if dropped:
            kept.clear()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        until_in_threads(lambda: not ours())
    kept.clear()
    gc.collect()


# --- run_two_stage where a loop runs


def test_run_two_stage_works_where_a_loop_runs_and_is_silent_for_plain_functions() -> None:
    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run_two_stage(range(5), int, str) == list("01234")
            with iter_two_stage(range(5), int, str, ordered=True) as outcomes:
                assert [outcome.result for outcome in outcomes] == list("01234")

    asyncio.run(main())
    assert not ours()


@pytest.mark.parametrize("functions", [(double, str), (int, double), (double, double)])
def test_run_two_stage_warns_once_of_coroutines_where_a_loop_runs(
    functions: tuple[Callable[[Any], Any], Callable[[Any], Any]],
) -> None:
    async def main() -> None:
        with pytest.warns(UserWarning, match=r"another event loop.*Use arun_two_stage$") as warned:
            assert len(run_two_stage(range(5), *functions)) == 5
        assert [one.filename for one in warned] == [__file__]
        with pytest.warns(UserWarning, match=r"Use aiter_two_stage$") as warned:
            outcomes = iter_two_stage(range(5), *functions)
        assert [one.filename for one in warned] == [__file__]
        with outcomes:
            assert len(list(outcomes)) == 5

    asyncio.run(main())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run_two_stage(range(5), *functions)) == 5  # no loop runs here
    assert not ours()


# --- Ctrl-C


SCRIPT = """
    import asyncio, itertools, threading
    from twostage import Stage, aiter_two_stage, arun_two_stage
    from twostage.core.coordinator import Coordinator

    begun, over = [], threading.Event()

    def plain(token):
        begin(token)
        over.wait()
        return token

    async def awaited(token):
        begin(token)
        # Seldom, as asyncio loses a handle that it has taken and not run when Ctrl-C comes (`_run_once`).
        while not over.is_set():
            await asyncio.sleep(0.05)
        return token

    def begin(token):
        begun.append(token)
        if len(begun) == 3:
            print("ready", flush=True)

    end = Coordinator.end

    def end_and_tell(coordinator, error):
        is_news = not coordinator.ending
        end(coordinator, error)
        if is_news:
            print("ending", flush=True)
            if ONCE:
                over.set()

    Coordinator.end = end_and_tell

    async def stream(*arguments):
        async with aiter_two_stage(*arguments) as outcomes:
            async for outcome in outcomes:
                pass

    try:
        asyncio.run(FORM(itertools.count(), int, Stage(FUNCTION, workers=3)))
    except KeyboardInterrupt:
        print(len(begun), over.is_set(), flush=True)
        over.set()
"""


@pytest.mark.parametrize("function", ["plain", "awaited"])
@pytest.mark.parametrize("form", ["arun_two_stage", "stream"])
@pytest.mark.parametrize("once", [True, False])
def test_ctrl_c_waits_for_what_runs_and_a_second_one_does_not(
    form: str, function: str, *, once: bool
) -> None:
    script = dedent(SCRIPT).replace("FORM", form).replace("FUNCTION", function).replace("ONCE", str(once))
    with running(script, options=("-X", "dev", *STRICT)) as process:
        for line in ["ready"] if once else ["ready", "ending"]:
            interrupt_when(line, process)
        output, errors = process.communicate(timeout=PATIENCE)
    assert errors == ""
    assert output == ("ending\n3 True\n" if once else "3 False\n")
    assert process.returncode == 0
