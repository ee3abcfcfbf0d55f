"""The caller's event loop is never held up by a job: little runs on it in a row, and nothing waits there."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from asynchronous import patiently, until
from common import PATIENCE, books
from fakes import each

from twostage import Stage, aiter_two_stage, arun_two_stage
from twostage.running.async_executor import LOT
from twostage.running.callers_loop import LONGEST_TURN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.usefixtures("asyncio_is_quiet")


class Loop:
    """Knows how often the loop has come round, and how much of something was done in one round at most."""

    def __init__(self) -> None:
        self.rounds = 0
        self.most = 0
        self._done = 0
        self._lock = threading.Lock()

    def count(self) -> None:
        with self._lock:
            self._done += 1
            self.most = max(self.most, self._done)

    async def come_round(self) -> None:
        while True:
            self.rounds += 1
            with self._lock:
                self._done = 0
            await asyncio.sleep(0)


@asynccontextmanager
async def watched() -> AsyncIterator[Loop]:
    loop = Loop()
    watching = asyncio.create_task(loop.come_round())
    try:
        yield loop
    finally:
        watching.cancel()


class Clock:
    """Takes the place of the machine's clock for who asks whether a turn has been long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1.0
        monkeypatch.setattr("twostage.running.callers_loop.perf_counter", lambda: self.now)


# --- what runs in a row


def test_consumer_whose_outcomes_are_all_there_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def main() -> int:
        outcomes = aiter_two_stage(range(250), str, int)
        async with watched() as loop, outcomes:
            await anext(outcomes)
            await until(lambda: books(outcomes).ending)
            async for _ in outcomes:
                loop.count()
                clock.now += LONGEST_TURN  # it has work to do with each
        return loop.most

    assert asyncio.run(main()) == 1


def test_consumer_that_does_little_goes_on_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def main() -> int:
        outcomes = aiter_two_stage(range(250), str, int)
        async with watched() as loop, outcomes:
            await anext(outcomes)
            await until(lambda: books(outcomes).ending)
            async for _ in outcomes:
                loop.count()
                clock.now += LONGEST_TURN / 9.5
        return loop.most

    assert asyncio.run(main()) == 10


def test_async_source_that_never_waits_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def main() -> int:
        async def source() -> AsyncIterator[int]:
            for number in range(1000):
                loop.count()
                clock.now += LONGEST_TURN
                yield number

        async with watched() as loop:
            await arun_two_stage(source(), each(str), int, batch_size=100)
        return loop.most

    assert asyncio.run(main()) == 1


def test_coroutines_are_begun_in_lots() -> None:
    begun = 0

    async def main() -> int:
        all_begun = asyncio.Event()

        async def fetch(item: int) -> int:
            nonlocal begun
            begun += 1
            loop.count()
            if begun == 1000:
                all_begun.set()
            await all_begun.wait()
            return item

        async with watched() as loop:
            await patiently(arun_two_stage(range(1000), Stage(fetch, workers=1000), int))
        return loop.most

    assert asyncio.run(main()) <= 2 * LOT  # two, if it is woken just then


# --- what waits


def source_that_waits(gate: threading.Event) -> Iterator[int]:
    yield 1
    assert gate.wait(PATIENCE)
    yield 2


@pytest.mark.parametrize("where", ["source", "fetch_token", "fetch_result", "key", "aclose", "cancel"])
def test_loop_goes_on_while_a_thread_waits(where: str) -> None:
    gate = threading.Event()

    def wait(item: Any) -> Any:  # noqa: ANN401 - an item or a token
        assert gate.wait(PATIENCE)
        return item

    async def main() -> None:
        async with watched() as loop:
            outcomes = aiter_two_stage(
                source_that_waits(gate) if where == "source" else iter([1, 2]),
                wait if where == "fetch_token" else int,
                int if where in ("source", "fetch_token", "key") else wait,
                key=wait if where == "key" else None,
            )
            taking = asyncio.create_task(anext(outcomes))
            if where == "source":
                await patiently(taking)
            await until(lambda: books(outcomes).reading.number or where == "key")
            rounds = loop.rounds
            ending = asyncio.create_task(outcomes.aclose() if where != "cancel" else asyncio.sleep(0))
            if where == "cancel":
                taking.cancel()
            await until(lambda: loop.rounds > rounds + 100)
            gate.set()
            await patiently(ending)
            await asyncio.wait([taking])
            assert taking.cancelled() == (where == "cancel")
            if not taking.cancelled():
                taking.exception()
            await outcomes.aclose()

    asyncio.run(main())
