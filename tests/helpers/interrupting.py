"""Ctrl-C at any line of the caller's half of a job: raised there by a trace, and what must be true then."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import Counter
from dis import opname
from queue import Empty
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeAlias

from common import PATIENCE, ours, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

VISITS: Final = 2  # of a line: it may be reached in several states
SHARES: Final = 8  # of the lines, of which a job is interrupted at one: the jobs have most lines in common
HALF: Final = (
    "twostage.run",
    "twostage.job.building",
    "twostage.job.stages",
    "twostage.job.outcomes",
    "twostage.job.driver",
)


class Place(NamedTuple):
    """A line of the caller's half, or 0 for a function that it calls, when it is come to for the nth time."""

    function: str
    line: int
    visit: int


def names(frame: FrameType | None) -> Iterator[str]:
    """Yields the names of the functions that are running, from the inmost out."""
    while frame is not None:
        yield frame.f_code.co_qualname
        frame = frame.f_back


def is_ours(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") in HALF


class Interrupter:
    """Traces a thread, and raises `KeyboardInterrupt` at one place.

    A finaliser is left alone: what it raises reaches nobody.

    Args:
        target: The place.
        at_length: Is called when a line is come to again and again, as one that waits is.
    """

    def __init__(self, target: Place | None = None, at_length: Callable[[], object] = int) -> None:
        self.seen: list[Place] = []
        self.hit = False
        self.within: set[str] = set()  # the functions that were interrupted
        self._target = target
        self._at_length = at_length
        self._visits: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, _event: str, _arg: object) -> Callable[..., Any] | None:
        if any(name.endswith(".__del__") for name in names(frame)):
            return None
        if is_ours(frame):
            return self._line
        if is_ours(frame.f_back):
            self._come_to(frame, 0)
        return None

    def _line(self, frame: FrameType, event: str, _arg: object) -> Callable[..., Any]:
        # Raised at the end of an `except` block, it would leave the thread in there; Python never does it.
        if event == "line" and opname[frame.f_code.co_code[frame.f_lasti]] != "POP_EXCEPT":
            self._come_to(frame, frame.f_lineno)
        return self._line

    def _come_to(self, frame: FrameType, line: int) -> None:
        here = frame.f_code.co_qualname, line
        self._visits[here] += 1
        place = Place(*here, self._visits[here])
        self.seen.append(place)
        if place.visit > VISITS + 1:
            self._at_length()
        if place == self._target:
            self.hit = True
            self.within = set(names(frame))
            raise KeyboardInterrupt


class World:
    """A source and two functions that remember what happened to them."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.started = self.closed = 0
        self.release = threading.Event()
        self.interrupter = Interrupter()

    def source(self, items: Iterable[int]) -> Iterator[int]:
        self.started += 1
        try:
            for item in items:  # noqa: UP028 - `yield from` would hand the closing on
                yield item
        finally:
            self.closed += 1

    def fetch(self, token: int) -> int:
        self.begun.append(token)
        return token

    def interrupted_source(self) -> Iterator[int]:
        """Raises `KeyboardInterrupt` when both workers are busy; from then on the caller is traced."""
        yield from self.source(range(100))
        until(lambda: len(self.begun) == 2, "two calls")
        self.interrupter.__enter__()
        raise KeyboardInterrupt

    def wait(self, token: int) -> int:
        self.begun.append(token)
        assert self.release.wait(PATIENCE)
        return token

    def linger(self, token: int) -> int:
        time.sleep(0.005)
        return token

    def fail(self, token: int) -> int:
        self.begun.append(token)
        if token == 5:
            raise ValueError
        return token


Job: TypeAlias = "Callable[[World], object]"


# Under it the job is still going on; where it is not above, the job is being built or closed, or has ended.
GOING_ON: Final = "Job.advance"


def interrupt(job: Job, target: Place | None) -> Interrupter:
    """Runs a job, interrupts it at `target`, and asserts that nothing is left of it."""
    world, interrupter = World(), Interrupter(target)
    awaited = False
    raised: KeyboardInterrupt | None = None
    try:
        with interrupter:
            job(world)
    except ValueError:
        awaited = True  # its own end
    except KeyboardInterrupt as error:
        raised = error
        awaited = GOING_ON in interrupter.within
        if awaited:
            assert not ours(), target
            assert world.closed == world.started, target
    begun = len(world.begun)
    assert (raised is not None) == interrupter.hit, target
    if raised is not None and target is not None and target.line == 0:  # where a signal really comes
        assert not isinstance(raised.__context__, Empty), target  # which would be a second traceback
    was_raised, raised = raised is not None, None
    if was_raised and not awaited:  # interrupted while it cleaned up it gives up the waiting, nothing else
        gc.collect()
    until(lambda: not ours(), target)
    assert world.closed == world.started, target
    if awaited:
        assert len(world.begun) == begun, target
    return interrupter


def interrupt_everywhere(
    interrupt: Callable[[Place | None], Interrupter], function: str = "", share: int | None = None
) -> set[str]:
    """Interrupts at each line, or at some, and returns the functions that were come to."""
    tried: set[Place] = set()
    hit: set[str] = set()
    to_try = interrupt(None).seen
    while to_try:
        target = to_try.pop()
        if target.visit > VISITS or target in tried or not target.function.startswith(function):
            continue
        tried.add(target)
        hit.add(target.function)
        if share is None or (target.line + target.visit) % SHARES == share:
            interrupter = interrupt(target)
            to_try += interrupter.seen  # threads take turns in more than one way
            hit |= interrupter.within
    return hit
