"""How a job from async code ends before its time: by cancellation, `aclose`, a failure, or with its loop."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from asynchronous import patiently, turns, until
from common import PATIENCE, ours

from twostage import aiter_two_stage, arun_two_stage

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

pytestmark = pytest.mark.usefixtures("asyncio_is_quiet")


# --- several tasks at once


def test_outcomes_may_be_awaited_by_several_tasks_at_once() -> None:
    release = threading.Event()

    def fetch(item: int) -> int:
        assert release.wait(PATIENCE)
        return item

    async def main() -> list[Any]:
        outcomes = aiter_two_stage(range(3), str, fetch)
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


# --- threads that cannot be started


def test_thread_of_the_coordinator_that_cannot_be_started_ends_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = RuntimeError("can't start new thread")

    def fail(_: threading.Thread) -> None:
        raise error

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError) as raised:
                await patiently(arun_two_stage([1], str, str))
            assert raised.value is error
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
