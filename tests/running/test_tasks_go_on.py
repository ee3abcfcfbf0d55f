"""A task goes on with the next call after a success; no call can tell by what the one before has left."""

from __future__ import annotations

import asyncio
import sys
from contextvars import ContextVar

import pytest
from tenacity import Retrying, stop_after_attempt, wait_none

from twostage import AsyncExecutor, Stage, iter_two_stage, run_two_stage

ITEMS = range(100)

span: ContextVar[str] = ContextVar("span", default="none")


async def same(argument: int) -> int:
    return argument


def test_each_attempt_has_the_callers_context_variables_whatever_the_last_one_set() -> None:
    async def fetch(argument: int) -> int:
        before = span.get()
        span.set(f"of {argument}")
        await asyncio.sleep(0)
        assert await asyncio.create_task(seen()) == span.get() == f"of {argument}"
        assert before == "the caller's"
        return argument

    async def seen() -> str:
        return span.get()

    token = span.set("the caller's")
    try:
        assert run_two_stage(ITEMS, fetch, fetch, token_workers=1, result_workers=3) == [*ITEMS]
    finally:
        span.reset(token)


def test_cancellation_that_a_call_has_left_behind_does_not_reach_the_next() -> None:
    async def fetch(argument: int) -> int:
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        task.cancel()  # and it returns before it is cancelled
        return argument

    assert run_two_stage(ITEMS, fetch, fetch, token_workers=1, result_workers=3, retry=None) == [*ITEMS]


def test_time_limits_and_groups_of_tasks_work_call_after_call() -> None:
    async def fetch(argument: int) -> int:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(60)
        with pytest.raises(ExceptionGroup):
            await fail_in_group()
        return argument

    async def fail_in_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            group.create_task(fail())

    async def fail() -> None:
        raise LookupError

    assert run_two_stage(ITEMS, same, fetch, result_workers=10, retry=None) == [*ITEMS]


@pytest.mark.parametrize("workers", [1, 2, 40])
def test_each_call_given_up_or_failed_is_made_again_and_none_twice_at_once(workers: int) -> None:
    attempts = dict.fromkeys(ITEMS, 0)
    running: set[int] = set()

    async def fetch(token: int) -> int:
        assert token not in running
        running.add(token)
        try:
            attempts[token] += 1
            if attempts[token] == 1 and token % 3 == 0:
                raise ConnectionError
            await asyncio.sleep(60 if attempts[token] == 1 and token % 10 == 5 else 0.001)
        finally:
            running.discard(token)
        return token

    patient = Retrying(wait=wait_none(), stop=stop_after_attempt(3))
    second = Stage(fetch, workers=workers, attempt_timeout=0.05, retry=patient)
    with iter_two_stage(ITEMS, same, second) as outcomes:
        assert sorted(outcome.result for outcome in outcomes) == [*ITEMS]
    assert all(made == 1 + (token % 3 == 0 or token % 10 == 5) for token, made in attempts.items())


def test_calls_that_never_wait_leave_the_loop_to_others() -> None:
    turns: list[int] = []

    async def fetch(token: int) -> int:
        if not token:
            asyncio.get_running_loop().call_soon(take_turns)
        return token

    def take_turns() -> None:
        turns.append(1)
        asyncio.get_running_loop().call_soon(take_turns)

    assert run_two_stage(range(5000), same, fetch, token_workers=2, result_workers=2) == [*range(5000)]
    assert len(turns) > 50


@pytest.mark.skipif(sys.version_info < (3, 12), reason="has no eager tasks")
def test_loop_whose_tasks_begin_at_once_makes_no_deep_stack() -> None:
    def eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
        return loop

    with AsyncExecutor(loop_factory=eager_loop) as executor:
        stage = Stage(same, executor=executor)
        assert run_two_stage(range(20_000), stage, stage) == [*range(20_000)]
