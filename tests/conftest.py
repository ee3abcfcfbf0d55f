"""What every test is held to, and what many use."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from common import Clock, ours
from loops import LOOPS

from twostage import AsyncExecutor
from twostage.base.as_completed import AsCompleted
from twostage.core.coordinator import Coordinator
from twostage.testing import VirtualTime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loops import LoopFactory

    from twostage.base.as_completed import Event


gc.disable()  # what is imported and collected from here on stays: looking through it all took over a second


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()  # the clients' modules, or each collection below looks at them all


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()  # what a test dropped without closing ends now
    gc.freeze()  # and what is still there is not looked at after each of the next ones
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(5)  # an abandoned job's end is on its way; one that hangs is what this is about
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture(autouse=True)
def _sigint_is_heard() -> Iterator[None]:
    """Also by the children of a test, if a shell that runs this in the background has SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """That of a journal which is not there yet."""
    return tmp_path / "jobs.sqlite"


@pytest.fixture
def virtual() -> Iterator[VirtualTime]:
    with VirtualTime() as time:
        yield time


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when a coordinator has stopped both of its stages."""
    event, end = threading.Event(), Coordinator.end

    def end_and_tell(coordinator: Coordinator, error: BaseException | None) -> None:
        end(coordinator, error)
        event.set()

    monkeypatch.setattr(Coordinator, "end", end_and_tell)
    return event


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    class Watched(AsCompleted):
        """Says how long is waited."""

        def __init__(self) -> None:
            super().__init__()
            clock.completions.append(self)

        def take(self, timeout: float | None) -> list[Event]:
            clock.waits.append(timeout)
            return super().take(timeout)

    monkeypatch.setattr("twostage.job.driver.AsCompleted", Watched)
    monkeypatch.setattr("twostage.job.driver.time", clock)
    return clock


@pytest.fixture(params=["a loop of its own", *LOOPS])
def on(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Gives the setting of a stage that says which loop it has."""
    if request.param not in LOOPS:
        yield {}
        return
    with AsyncExecutor(loop_factory=LOOPS[request.param]) as executor:
        yield {"executor": executor}


@pytest.fixture
def asyncio_is_quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Has nothing be logged of a task that was destroyed, or of an exception that nobody retrieved."""
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@pytest.fixture(params=list(LOOPS.values()), ids=list(LOOPS))
def loop_factory(request: pytest.FixtureRequest) -> Any:  # noqa: ANN401 - a factory, or none
    return request.param


@pytest.fixture
def executor(loop_factory: LoopFactory | None) -> Iterator[AsyncExecutor]:
    with AsyncExecutor(loop_factory=loop_factory) as executor:
        yield executor
    assert not ours()
