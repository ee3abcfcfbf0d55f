"""How a job from async code ends before its time: by cancellation, `aclose`, a failure, or with its loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from asynchronous import patiently, turns
from common import PATIENCE, ours

from twostage import aiter_two_stage, arun_two_stage

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
