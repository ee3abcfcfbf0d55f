"""Attempts of coroutine functions that take too long: their tasks are cancelled, and keep their places.

Time is a clock's that the tests put forward.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import sys
import threading
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from common import (
    AT_ONCE,
    PATIENCE,
    Clock,
    LeaveError,
    as_it_is,
    given_up_in,
    goes_on,
    nothing_collected,
    ours,
    until,
)
from fakes import each, outcomes_of, stage
from forms import Run, each_way, iterate, run
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_none

from twostage import AttemptTimeout, iter_two_stage
from twostage.testing import sleep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twostage.testing import VirtualTime


class Hanging:
    """A coroutine function whose attempts for some arguments hang until they are released or cancelled.

    Each other attempt answers at once, with what it was asked and which attempt that was.

    Args:
        hanging: Arguments, and which attempt for them.
        cleans_up: Whether one that is cancelled goes on until it is released.
        refuses: The same for one that then ends as if nothing was.
    """

    def __init__(self, *hanging: tuple[Any, int], cleans_up: bool = False, refuses: bool = False) -> None:
        self.began: Counter[Any] = Counter()
        self.running: set[tuple[Any, int]] = set()
        self.most = 0
        self.cancelled: list[tuple[Any, int]] = []
        self.ended: list[tuple[Any, int]] = []
        self.fails: type[BaseException] | None = None
        self._cleans_up = cleans_up
        self._refuses = refuses
        self._released = {one: asyncio.Event() for one in hanging}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, argument: Any) -> str:  # noqa: ANN401 - any item or token
        self._loop = asyncio.get_running_loop()
        self.began[argument] += 1
        this = argument, self.began[argument]
        self.running.add(this)
        self.most = max(self.most, len(self.running))
        try:
            if this in self._released:
                await self._hang(this)
            else:
                await asyncio.sleep(0)
        finally:
            self.running.remove(this)
            self.ended.append(this)
        return f"{this[0]}{this[1]}"

    async def _hang(self, this: tuple[Any, int]) -> None:
        released = self._released[this]
        try:
            await released.wait()
        except asyncio.CancelledError:
            self.cancelled.append(this)
            while (self._cleans_up or self._refuses) and not released.is_set():
                with suppress(asyncio.CancelledError):
                    await released.wait()
            if self.fails is not None:
                raise self.fails from None
            if not self._refuses:
                raise

    def hang(self, *these: tuple[Any, int]) -> None:
        """Waits until just these run."""
        until(lambda: self.running == {*these}, these)

    def release(self, *these: tuple[Any, int]) -> None:
        for this in these or self._released:
            if self._loop is not None:
                with suppress(RuntimeError):  # it is over
                    self._loop.call_soon_threadsafe(self._released[this].set)


@contextmanager
def released(*functions: Hanging) -> Iterator[None]:
    try:
        yield
    finally:
        for function in functions:
            function.release()


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the end of a job wait for hardly anything that was given up."""
    monkeypatch.setattr("twostage.running.tasks.LONGEST_CANCEL", 0.01)


def begun(outcomes: Any) -> dict[Any, Any]:  # noqa: ANN401 - of anything
    """Takes the first outcome, so that the job goes on by itself; returns the results, which may grow."""
    first = next(outcomes)
    return {first.item: first.result}


def rest(outcomes: Any) -> dict[Any, Any]:  # noqa: ANN401 - of anything
    return {outcome.item: outcome.exception or outcome.result for outcome in outcomes}


@pytest.mark.parametrize("place", ["stage one", "stage two"])
def test_task_that_takes_too_long_is_cancelled_and_its_call_made_again(
    place: str, clock: Clock, on: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Hanging(("b", 1))
    timed = stage(fetch, attempt_timeout=30, retry=AT_ONCE, **on)
    stages = (timed, as_it_is) if place == "stage one" else (as_it_is, timed)
    with released(fetch), iter_two_stage("abc", *stages) as outcomes:
        results = begun(outcomes)
        fetch.hang(("b", 1))
        clock.advance(29)
        assert not fetch.cancelled
        clock.advance(1)
        assert results | rest(outcomes) == {"a": "a1", "b": "b2", "c": "c1"}
        assert fetch.cancelled == [("b", 1)]
    assert given_up_in(caplog) == [f"{place}, 'b': the attempt takes longer than 30 s and is given up"]
    assert len(ours()) == len(on)


@each_way
def test_failure_is_a_timeout_and_no_cancellation(job: Run, on: dict[str, Any]) -> None:
    fetch = Hanging((1, 1))
    timed = stage(fetch, attempt_timeout=0.01, retry=None, **on)
    results = job(range(3), as_it_is, timed, return_exceptions=True)
    assert [results[0], str(results[1]), results[2]] == [
        "01",
        "the attempt took longer than attempt_timeout=0.01 s",
        "21",
    ]
    assert type(results[1]) is AttemptTimeout


def test_warning_tells_neither_tokens_nor_results(
    on: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fetch = Hanging(("secret", 1))

    async def fetch_token(item: str) -> str:
        return "secret"

    outcomes_of(["it"], fetch_token, stage(fetch, attempt_timeout=0.01, retry=None, **on))
    assert given_up_in(caplog) == ["stage two, 'it': the attempt takes longer than 0.01 s and is given up"]
    assert "secret" not in caplog.text


@pytest.mark.usefixtures("_impatient")
def test_place_is_kept_until_the_task_has_ended(clock: Clock, on: dict[str, Any]) -> None:
    """Three places, and one that cleans up: the others go on in two."""
    fetch = Hanging((1, 1), (2, 1), (3, 1), cleans_up=True)
    timed = stage(fetch, attempt_timeout=30, workers=3, retry=AT_ONCE, **on)
    with released(fetch), iter_two_stage(range(40), each(int), timed, batch_size=40) as outcomes:
        results = begun(outcomes)
        fetch.hang((1, 1), (2, 1), (3, 1))
        clock.advance(10)
        fetch.release((2, 1), (3, 1))
        results |= {outcome.item: outcome.result for outcome in (next(outcomes) for _ in range(38))}
        fetch.hang((1, 1))
        clock.advance(20)
        results |= rest(outcomes)
        assert fetch.running == {(1, 1)}
        fetch.release()
    assert results == {item: f"{item}{1 + (item == 1)}" for item in range(40)}
    assert fetch.most == 3


@pytest.mark.usefixtures("_impatient")
def test_nothing_begins_while_all_places_are_kept(clock: Clock, on: dict[str, Any]) -> None:
    fetch = Hanging((1, 1), (2, 1), cleans_up=True)
    timed = stage(fetch, attempt_timeout=30, workers=2, retry=AT_ONCE, **on)
    with released(fetch), iter_two_stage(range(9), each(int), timed, batch_size=9) as outcomes:
        results = begun(outcomes)
        fetch.hang((1, 1), (2, 1))
        clock.advance(30)
        until(lambda: len(fetch.cancelled) == 2)
        clock.advance(200)
        assert fetch.began == {0: 1, 1: 1, 2: 1}
        fetch.release((1, 1))
        results |= {outcome.item: outcome.result for outcome in (next(outcomes) for _ in range(8))}
        assert fetch.running == {(2, 1)}
        fetch.release()
    assert results == {item: f"{item}{1 + (item in (1, 2))}" for item in range(9)}
    assert fetch.most == 2


# --- tasks that refuse to be cancelled


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("more", [1, 5])
@pytest.mark.parametrize("at_once", [False, True])
def test_after_patience_the_job_ends(more: int, clock: Clock, on: dict[str, Any], *, at_once: bool) -> None:
    """Two places are lost, in the same moment or one after the other, and one call or more wait for them."""
    fetch = Hanging((1, 1), (2, 1), (3, 1), refuses=True)
    timed = stage(fetch, attempt_timeout=30, workers=2, patience=60, retry=None, **on)
    items = range(3 + more) if at_once else range(4 + more)
    with released(fetch):
        outcomes = iter_two_stage(items, each(int), timed, batch_size=9, return_exceptions=True)
        results = begun(outcomes)
        fetch.hang((1, 1), (2, 1))
        if not at_once:
            clock.advance(10)
            fetch.release((2, 1))
            fetch.hang((1, 1), (3, 1))
        clock.advance(20)
        clock.advance(10)
        clock.advance(59)
        assert goes_on()
        clock.advance(1)
        message = "stage two: 2 attempts were given up and have not ended for 60 s, so no worker is left"
        with pytest.raises(AttemptTimeout, match=message):
            results |= rest(outcomes)
        assert not goes_on()
        assert len(fetch.running) == 2
        assert sum(fetch.began.values()) == 3 + (not at_once)


@pytest.mark.usefixtures("_impatient")
def test_job_that_is_done_does_not_wait_for_them(clock: Clock, on: dict[str, Any]) -> None:
    fetch = Hanging((1, 1), (2, 1), refuses=True)
    timed = stage(fetch, attempt_timeout=30, workers=2, retry=None, **on)
    with released(fetch):
        outcomes = iter_two_stage(range(3), each(int), timed, batch_size=3, return_exceptions=True)
        results = begun(outcomes)
        fetch.hang((1, 1), (2, 1))
        clock.advance(30)
        results |= rest(outcomes)
        assert {type(one) for one in results.values()} == {str, AttemptTimeout}
        assert len(fetch.running) == 2
        assert {thread.name for thread in ours()} == {"twostage-loop"}
    until(lambda: len(ours()) == len(on))


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("way", ["close", "raise", "interrupt"])
def test_left_job_awaits_what_runs_and_not_what_was_given_up(
    way: str, clock: Clock, ending: threading.Event, on: dict[str, Any]
) -> None:
    fetch = Hanging((1, 1), (2, 1), (3, 1), refuses=True)
    timed = stage(fetch, attempt_timeout=30, workers=2, retry=None, **on)
    error = {"raise": LookupError, "interrupt": KeyboardInterrupt}.get(way)

    def release() -> None:
        assert ending.wait(PATIENCE)
        fetch.release((3, 1))

    with released(fetch):
        outcomes = iter_two_stage(range(9), each(int), timed, batch_size=9, return_exceptions=True)
        begun(outcomes)
        fetch.hang((1, 1), (2, 1))
        clock.advance(20)
        fetch.release((2, 1))
        fetch.hang((1, 1), (3, 1))
        clock.advance(10)
        until(lambda: fetch.cancelled == [(1, 1)])
        releasing = threading.Thread(target=release)
        releasing.start()
        with pytest.raises(error) if error is not None else nullcontext(), outcomes:
            if error is not None:
                raise error
        releasing.join()
        assert fetch.running == {(1, 1)}
        assert (3, 1) in fetch.ended
        assert sum(fetch.began.values()) == 4


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit, LeaveError, None])
def test_late_end_is_dropped_whatever_it_is(
    error: type[BaseException] | None, clock: Clock, on: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Hanging((1, 1), refuses=True)
    fetch.fails = error
    timed = stage(fetch, attempt_timeout=30, workers=2, retry=AT_ONCE, **on)
    with released(fetch), iter_two_stage(range(9), each(int), timed, batch_size=9) as outcomes:
        results = begun(outcomes)
        fetch.hang((1, 1))
        clock.advance(30)
        results |= {outcome.item: outcome.result for outcome in (next(outcomes) for _ in range(7))}
        fetch.release()
        results |= rest(outcomes)
    assert results == {item: f"{item}{1 + (item == 1)}" for item in range(9)}
    assert all(record.levelno < logging.ERROR for record in caplog.records)


# --- what a task has begun


def test_cancellation_reaches_all_that_the_call_waits_for(clock: Clock, on: dict[str, Any]) -> None:
    ends: Counter[str] = Counter()
    attempts = 0

    async def part(name: str) -> None:
        try:
            await asyncio.sleep(2 * PATIENCE)
        finally:
            ends[name] += 1

    async def fetch(item: int) -> int:
        nonlocal attempts
        attempts += item
        if item == 1 and attempts == 1:
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                group.create_task(part("a"))
                group.create_task(part("b"))
                await part("c")
        return item

    timed = stage(fetch, attempt_timeout=30, retry=AT_ONCE, **on)
    with iter_two_stage(range(3), each(int), timed, batch_size=3) as outcomes:
        results = begun(outcomes)
        until(lambda: attempts)
        clock.advance(30)
        assert results | rest(outcomes) == {0: 0, 1: 1, 2: 2}
    assert ends == {"a": 1, "b": 1, "c": 1}


def test_nothing_is_kept_of_an_attempt_that_was_given_up(clock: Clock, on: dict[str, Any]) -> None:
    class Kept(str):
        """Can be referred to weakly."""

        __slots__ = ("__weakref__",)

    fetch = Hanging(("b", 1))
    kept: list[weakref.ref[Any]] = []

    def keep(one: Any) -> Any:  # noqa: ANN401 - of anything
        kept.append(weakref.ref(one))
        return one

    async def fetch_result(token: Kept) -> Kept:
        keep(asyncio.current_task())
        answer: Kept = keep(Kept(await fetch(token.lower())))
        return answer

    items = (keep(Kept(item)) for item in "ABC")
    timed = stage(fetch_result, attempt_timeout=30, retry=AT_ONCE, **on)
    with nothing_collected():
        with iter_two_stage(items, each(str.upper), timed, batch_size=3) as outcomes:
            assert len(begun(outcomes)) == 1
            fetch.hang(("b", 1))
            clock.advance(30)
            assert len(rest(outcomes)) == 2
        until(lambda: not [one() for one in kept if one() is not None])
    assert len(kept) == 3 + 4 + 3


@pytest.mark.parametrize("seed", range(4))
def test_end_and_giving_up_race_and_one_of_them_wins(seed: int, on: dict[str, Any]) -> None:
    """Attempts take about as long as they may; each item has one outcome, and its own."""
    rng = random.Random(seed)
    timeout = rng.choice((0.002, 0.005))
    running: Counter[int] = Counter()
    numbers = itertools.count()

    async def fetch(argument: int, places: int) -> int:
        running[places] += 1
        assert running[places] <= places
        try:
            if next(numbers) % 2:  # else it may look as if the API was down
                await asyncio.sleep(timeout * rng.uniform(0.5, 1.5))  # the attempt itself
        finally:
            try:
                await asyncio.sleep(0)
            finally:
                running[places] -= 1
        return argument + 1

    settings: dict[str, Any] = on | {
        "attempt_timeout": timeout,
        "retry": Retrying(
            retry=retry_if_exception_type(AttemptTimeout), stop=stop_after_attempt(5), wait=wait_none()
        ),
    }
    stages = [stage(partial(fetch, places=places), workers=places, **settings) for places in (3, 5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    logging.disable()
    try:
        results = iterate(range(100), *stages, return_exceptions=True)
    finally:
        logging.disable(logging.NOTSET)
        sys.setswitchinterval(interval)
    assert len(results) == 100
    for item, result in enumerate(results):
        assert isinstance(result, AttemptTimeout) or result == item + 2


# --- in virtual time


def test_in_virtual_time_a_task_that_is_given_up_has_ended(virtual: VirtualTime) -> None:
    """Two places, and calls that hang for longer than patience."""
    attempts: Counter[int] = Counter()

    async def fetch(item: int) -> int:
        attempts[item] += 1
        sleep(1e6 if attempts[item] < 3 and item < 4 else 1)
        return item

    timed = stage(fetch, workers=2, attempt_timeout=10, patience=60, retry=AT_ONCE)
    assert run(range(6), each(int), timed, batch_size=6) == list(range(6))
    assert attempts == {0: 3, 1: 3, 2: 3, 3: 3, 4: 1, 5: 1}
    assert virtual.now == 43
