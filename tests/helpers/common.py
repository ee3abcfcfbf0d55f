"""What several test modules use: one job in each of the three forms, and waiting for what must come."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_none

from twostage import is_transient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from twostage.base.as_completed import AsCompleted
    from twostage.core.coordinator import Coordinator

PartT = TypeVar("PartT")
PATIENCE: Final = 20.0  # seconds: for what is at hand in moments, or never
ALWAYS: Final = Retrying(
    retry=retry_if_exception(lambda _: True), stop=stop_after_attempt(5), wait=wait_none()
)
AT_ONCE: Final = Retrying(
    retry=retry_if_exception(is_transient), stop=stop_after_attempt(10), wait=wait_none()
)


class LeaveError(BaseException):
    """One that is no `Exception`, as a user may have it."""


HTTP_CLIENTS: Final = ("azure.core", "botocore", "google.api_core", "grpc", "httpx2", "openai")


def needs_clients(*modules: str) -> None:
    """Skips a test, or a module of tests, that wants what only the extra `test-clients` brings."""
    for module in modules or HTTP_CLIENTS:
        package = module.partition(".")[0]
        # Not by importing it: from then on Dask has exceptions be unpickled in another way.
        if find_spec(package) is None or find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[test-clients]'", allow_module_level=True)


async def as_it_is(argument: Any) -> Any:  # noqa: ANN401 - of both stages
    await asyncio.sleep(0)
    return argument


def books(outcomes: Any) -> Coordinator:  # noqa: ANN401 - a stream, sync or async
    """Returns what all of a job's state is in."""
    coordinator: Coordinator = outcomes._job._coordinator
    return coordinator


def part(outcomes: Any, kind: type[PartT]) -> PartT | None:  # noqa: ANN401 - as above
    """Returns the part of a job that is of that kind, and hears of something."""
    heard = chain.from_iterable(vars(books(outcomes).hears).values())
    parts = (getattr(hear, "__self__", None) for hear in heard)
    return next((one for one in parts if isinstance(one, kind)), None)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("twostage")]


def until(condition: Callable[[], object], what: object = "it") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} has not come"
        time.sleep(0.001)


def goes_on() -> bool:
    return any(thread.name == "twostage-coordinator" for thread in ours())


class Clock:
    """Stands for the drivers' clock: one that a test may put forward. It counts the wake-ups as well."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []  # for how long the coordinator was ready to wait, each time
        self.completions: list[AsCompleted] = []
        self._ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        """Puts the clock forward; returns when the coordinator has acted on it, or has ended."""
        self._ahead += seconds
        self.wake_up()

    def wake_up(self) -> None:
        self._tell()
        self._tell()  # when it hears of this, it has looked at the clock after the first

    def _tell(self) -> None:
        heard = threading.Event()
        self.completions[-1].put((lambda *_: heard.set(), None, None, None))
        until(lambda: heard.is_set() or not goes_on())


def frames(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Has Python's collector do nothing: what is dropped here is gone only if it was in no cycle."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def switching() -> Iterator[None]:
    """Has threads take turns at every opportunity."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def given_up_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the warnings about attempts that were given up."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "given up" in record.getMessage()
    ]


def source_of(items: Iterable[Any], closed: list[str], error: BaseException | None = None) -> Iterator[Any]:
    """Yields the items, then raises; when it is closed it says in which thread."""
    try:
        for item in items:  # noqa: UP028 - `yield from` would hand the closing on
            yield item
        if error is not None:
            raise error
    finally:
        closed.append(threading.current_thread().name)


class WeakItem:
    """Can be referred to weakly."""


class WeakItems:
    """A source without an end that knows which of its items are kept."""

    def __init__(self) -> None:
        self.read: list[weakref.ref[WeakItem]] = []

    def __iter__(self) -> Iterator[WeakItem]:
        while True:
            item = WeakItem()
            self.read.append(weakref.ref(item))
            yield item

    def kept(self) -> list[WeakItem]:
        return [item for one in self.read if (item := one()) is not None]
