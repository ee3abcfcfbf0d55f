"""The pace that a stage's API bears: it pauses when asked to, waits out an outage, and has a limit."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Literal

from twostage.base.gate import Gate
from twostage.base.kinds import Kind
from twostage.base.words import STAGES
from twostage.failing.throttling import LONGEST_PAUSE, Throttled, retry_after
from twostage.failing.transient import is_timeout, kind_of
from twostage.observing.events import HeldBack
from twostage.pace.limits import Limit
from twostage.pace.outages import Outage

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.base.records import Call
    from twostage.base.runner import Runner

__all__ = ["PATIENCE", "Pace"]

PATIENCE = 300.0
"""How long, in seconds, a stage waits for an API that has answered before."""

LONGEST_SPREAD = 1.0
SPREAD = 0.1  # of a pause: how long the starts after it are spread
AFTER_TIMEOUT = 0.9  # of an adaptive limit: nobody says how many the API would have answered in time


class TimeHeldBack:
    """The time in which a stage was held back, which does not count for calls that waited meanwhile.

    Attributes:
        seconds: Of all times; of a pause that goes on its whole, of an outage that does nothing yet.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before = 0.0  # the last time
        self._since = -math.inf  # its beginning
        self._until = -math.inf  # and end

    def add(self, since: float, until: float) -> None:
        """Counts a time; of an outage and a pause in it none twice."""
        if since > self._until:
            self._since = since
            self._before = self.seconds
        self.seconds += max(0.0, until - max(since, self._until))
        self._until = max(self._until, until)

    def seconds_by(self, began: float) -> float:
        """Returns how many seconds it were when an attempt began, one of the last."""
        return self._before if began <= self._since else self.seconds


class Pace(Gate):
    """Whether an attempt of a stage may start, as its API's answers have it.

    Three things slow a stage down. A *pause* that an answer asked for: nothing starts. An *outage*: nothing
    starts but one probe at a time. And a *limit* of attempts at once: after these two, or an adaptive one.

    Args:
        stage: Which it is, 1 or 2.
        workers: The most attempts that run at once.
        pause: Whether an answer that asks for a wait makes the whole stage wait.
        patience: For how many seconds an API that has answered before is waited for; `None`: for ever.
        adaptive: Whether the limit is found out.
        tell: Hears when the stage is held back, and when it goes on.

    Attributes:
        partner: The pace of the other stage, whose API is likely to be the same one.
        slows: Whether the stage may not run at its full pace now; if not, it is no gate.
        watches: Whether it wants to hear of a success; if not, `succeeded_at` is to be set, no more.
        succeeded_at: When the last success was.
        held_back: For how long the stage was.
    """

    partner: Pace | None = None

    def __init__(
        self,
        stage: int,
        workers: int,
        *,
        pause: bool,
        patience: float | None,
        adaptive: bool,
        tell: Callable[[HeldBack], None],
    ) -> None:
        self.slows = self.watches = adaptive
        self.succeeded_at: float | None = None
        self.held_back = TimeHeldBack()
        self._stage = stage
        self._tell = tell
        self._pauses = pause
        self._patience = math.inf if patience is None else patience
        self._limit = Limit(workers, adaptive=adaptive)
        self._outage = Outage()
        self._given_up = False  # waiting for the API; until the next success
        self._resumes = -math.inf  # when the last pause ends
        self._paused_by = ""
        self._gap = 0.0  # between starts after it, on average
        self._next_start = -math.inf

    @property
    def is_down(self) -> bool:
        """Whether the API seems to be down."""
        return self._outage.since is not None

    def why(self, now: float) -> str:
        """Returns why nothing starts, or only what probes the API; empty if neither is so."""
        if self.is_down:
            return "API down, probing"
        if now >= self._resumes:
            return ""
        return f"{STAGES[self._stage]} paused {math.ceil(self._resumes - now)} s {self._paused_by}"

    # --- the gate

    def when_may_start(self, now: float, runner: Runner, call: Call | None = None) -> float:  # noqa: ARG002 - a gate's
        down_since = self._outage.since
        if down_since is not None:
            if now < down_since + self._patience:
                return max(self._resumes, min(self._outage.next_probe, down_since + self._patience))
            self._stop_waiting(now, down_since)
        if now < self._resumes:
            return self._resumes
        if runner.out >= self._limit.at_once:
            self._limit.full = True
            return math.inf
        return max(now, self._next_start)

    def started(self, call: Call, now: float) -> None:
        if self.is_down:
            self._outage.began_probe(call)
        elif self._gap:
            self._next_start = now + self._gap * 2 * random.random()  # noqa: S311 - no secret

    def taken_back(self, call: Call) -> None:
        self._outage.took_back(call)

    def ended(self, call: Call, answer: object, error: BaseException | None, now: float) -> None:  # noqa: ARG002
        if error is None:
            self._limit.round_trip = now - call.began
        self._outage.ended(call, now)

    # --- what the API answers

    def succeeded(self, now: float) -> None:
        """Hears of a success, if `watches`."""
        self.succeeded_at = now
        self._given_up = False
        self._answered(now)
        # What was running when a pause began says nothing of the time after it.
        if now >= self._resumes and self._limit.succeeded():
            self._gap = 0.0
        self._look()

    def failed(self, call: Call, error: Exception, now: float, running: int) -> bool:
        """Hears of a failed attempt, and returns whether it is excused: the API's state is to blame.

        Args:
            call: It failed as a whole.
            error: How.
            now: The time.
            running: How many attempts run still.
        """
        kind = kind_of(error)
        if kind is Kind.THROTTLED:
            return self.throttled(error, now, running)
        excused = False
        if kind is Kind.OUTAGE:
            if is_timeout(error) and not self.is_down:
                self._limit.refused(min(running, AFTER_TIMEOUT * self._limit.most), now)
            excused = self._lose(call, now)
        elif kind is Kind.LASTING:  # whoever says "not found" is up
            self._answered(now)
        self._look()
        return excused

    def throttled(self, error: Exception, now: float, running: int | None) -> bool:
        """Hears that a call, or a slot of one, was told to slow down; returns whether it is excused.

        `running` is `None` for all but an answer's first such slot: it is one refusal.
        """
        asked = min(retry_after(error) or 0.0, LONGEST_PAUSE)
        if asked and self._pauses:
            self._pause(now, now + asked, "limited" if isinstance(error, Throttled) else "paused")
        if running is not None and not isinstance(error, Throttled):
            self._limit.refused(running, now)
        self._look()
        return self.succeeded_at is not None and now - self.succeeded_at <= self._patience

    def _pause(self, now: float, until: float, why: Literal["paused", "limited"]) -> None:
        longer = until - max(now, self._resumes)
        if longer <= 0:
            return
        if now >= self._resumes or longer >= 1:
            self._tell(HeldBack(self._stage, why, now, until, until - now))
        self._paused_by = "by Retry-After" if why == "paused" else "by your limit"
        if self._outage.since is not None:
            self.held_back.add(self._outage.since, now)
        self.held_back.add(now, until)
        self._resumes = until
        self._limit.begin_at_half()
        self._gap = min(SPREAD * (until - now), LONGEST_SPREAD) / self._limit.at_once

    def _lose(self, call: Call, now: float) -> bool:
        """Hears of a call that was not answered, and returns whether that is an outage."""
        if self.is_down:
            return True
        if self.succeeded_at is None or self._given_up:
            return False
        # A stage that waits for the other one has too few calls to find out by itself.
        suspected = self.partner is not None and self.partner.is_down
        if not self._outage.lose(call, now, self._limit.most, suspected=suspected):
            return False
        self._tell(HeldBack(self._stage, "down", now, lost=len(self._outage.lost)))
        return True

    def _answered(self, now: float) -> None:
        if self._outage.since is not None:
            self._tell(HeldBack(self._stage, "up", now, now, now - self._outage.since))
            self._begin_again(now, self._outage.since)
        self._outage.end()

    def _stop_waiting(self, now: float, down_since: float) -> None:
        self._tell(HeldBack(self._stage, "given up", now, now, self._patience))
        self._given_up = True
        self._begin_again(now, down_since)
        self._outage.end()

    def _begin_again(self, now: float, down_since: float) -> None:
        self.held_back.add(down_since, now)
        self._limit.begin_at_half()

    def put_off(self, call: Call, due: float) -> float:
        """Returns when a call that is due at `due` may wait in line."""
        return self._outage.put_off(call, due) if self.is_down else due

    def _look(self) -> None:
        self.slows = self.is_down or self._limit.slows
        self.watches = self.slows or bool(self._outage.lost)
