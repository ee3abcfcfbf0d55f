"""The pace that a stage's API bears: it pauses when asked to, and waits out an outage."""

from __future__ import annotations

import logging
import math
import random
from typing import TYPE_CHECKING

from twostage.gates import Gate
from twostage.throttling import LONGEST_PAUSE, Throttled, retry_after
from twostage.transient import is_outage, is_throttled, is_timeout, is_transient

if TYPE_CHECKING:
    from twostage.calls import Call
    from twostage.runners import Runner

__all__ = ["PATIENCE", "Pace"]

log = logging.getLogger("twostage")

PATIENCE = 300.0
"""How long, in seconds, a stage waits for an API that has answered before."""

FIRST_LIMIT = 8  # of an adaptive stage
LEAST_LOST = 8  # different calls: fewer failures in a row are no outage, however few workers there are
DOUBLINGS = 3  # of the time between probes: 1, 2, 4 and then 8 s
PROBE_LEAD = 0.1  # of another call over the one that was the last probe: that one may be what always fails
LONGEST_SPREAD = 1.0
SPREAD = 0.1  # of a pause: how long the starts after it are spread


class Pace(Gate):
    """How many attempts of a stage may run, and from when on, as its API's answers have it.

    Three things slow a stage down. A *pause* that an answer asked for: nothing starts. An *outage*: nothing
    starts but one probe at a time. And an *adaptive* limit, which follows what the API takes at once. After
    the first two the stage begins at half its limit and doubles that for each limit-full of successes.

    The adaptive limit comes down to what was running when the API refused a call, for that is what it
    takes, though to no less than half in a round trip, or in a limit-full of refusals. It grows by 1 after
    two limit-fulls of successes, then by 2, 4, 8 after one: so it starts fast, follows an API that takes
    more, and exceeds by 1 one that does not.

    Args:
        name: What messages call the stage.
        workers: The most attempts that run at once.
        pause: Whether an answer that asks for a wait makes the whole stage wait.
        patience: For how many seconds an API that has answered before is waited for; `None`: for ever.
        adaptive: Whether the limit is found out.

    Attributes:
        partner: The pace of the other stage, whose API is likely to be the same one.
        slows: Whether the stage may not run at its full pace now; if not, it is no gate.
        watches: Whether it wants to hear of a success; if not, `succeeded_at` is to be set, no more.
        succeeded_at: When the last success was.
        paused: How many seconds the stage has been held back in all; of a pause that goes on its whole, and
            of an outage that does nothing yet.
    """

    partner: Pace | None = None

    def __init__(
        self, name: str, workers: int, *, pause: bool, patience: float | None, adaptive: bool
    ) -> None:
        self.name = name
        self.slows = self.watches = adaptive
        self.succeeded_at: float | None = None
        self.paused = 0.0
        self._paused_before = 0.0  # the last time that it was
        self._held_since = -math.inf  # that time's beginning
        self._held_until = -math.inf  # and end
        self._workers = workers
        self._pauses = pause
        self._patience = math.inf if patience is None else patience
        self._adaptive = adaptive
        self._limit: float = min(workers, FIRST_LIMIT) if adaptive else workers
        self._least = self._limit / 2  # that it may come down to for now
        self._least_since = 0.0
        self._refused = 0  # since then
        self._round_trip = math.inf  # of the last success
        self._step = 1.0
        self._ramp = math.inf  # a limit below the limit, on the way up to it
        self._successes = 0  # since it was last changed
        self._full = False  # whether it has held a call back since
        self._resumes = -math.inf  # when the last pause ends
        self._gap = 0.0  # between starts after it, on average
        self._next_start = -math.inf
        self._lost: set[Call] = set()  # calls that the API did not answer, since the last success
        self._down_since: float | None = None
        self._given_up = False  # waiting for it; until the next success
        self._probe: Call | None = None
        self._probed: Call | None = None  # the last one that failed
        self._probes = 0
        self._next_probe = math.inf

    # --- the gate

    def when_may_start(self, now: float, runner: Runner, call: Call | None = None) -> float:  # noqa: ARG002 - a gate's
        if self._down_since is not None:
            if now < self._down_since + self._patience:
                return max(self._resumes, min(self._next_probe, self._down_since + self._patience))
            self._stop_waiting(now)
        if now < self._resumes:
            return self._resumes
        if runner.out >= self._at_once:
            self._full = True
            return math.inf
        return max(now, self._next_start)

    @property
    def is_down(self) -> bool:
        """Whether the API seems to be down."""
        return self._down_since is not None

    @property
    def _at_once(self) -> int:
        return max(1, int(min(self._limit, self._ramp)))

    def started(self, call: Call, now: float) -> None:
        if self._down_since is not None:
            self._probe = call
            self._probes += 1
            self._next_probe = math.inf
        elif self._gap:
            self._next_start = now + self._gap * 2 * random.random()  # noqa: S311 - no secret

    def taken_back(self, call: Call) -> None:
        if call is self._probe:
            self._probe = None
            self._next_probe = -math.inf

    def ended(self, call: Call, answer: object, error: BaseException | None, now: float) -> None:  # noqa: ARG002
        if error is None:
            self._round_trip = now - call.began
        if call is self._probe:
            self._probe, self._probed = None, call
            wait = 2.0 ** min(self._probes - 1, DOUBLINGS)
            self._next_probe = now + wait * random.uniform(0.5, 1)  # noqa: S311 - as above

    def paused_by(self, began: float) -> float:
        """Returns how long the stage had been held back in all when an attempt began, one of the last."""
        return self._paused_before if began <= self._held_since else self.paused

    def _hold(self, since: float, until: float) -> None:
        """Counts a time in which nothing may start; of an outage and a pause in it none twice."""
        if since > self._held_until:
            self._held_since = since
            self._paused_before = self.paused
        self.paused += max(0.0, until - max(since, self._held_until))
        self._held_until = max(self._held_until, until)

    # --- what the API answers

    def succeeded(self, now: float) -> None:
        """Hears of a success, if `watches`."""
        self.succeeded_at = now
        self._given_up = False
        self._answered(now)
        if now >= self._resumes:  # what was running when a pause began says nothing of the time after it
            self._successes += 1
            if self._successes >= self._at_once:
                self._climb()
        self._look()

    def _climb(self) -> None:
        """Goes up, after as many successes as attempts may run at once: a round trip or more."""
        self._successes = 0
        self._gap = 0.0
        if self._ramp < self._limit:
            self._ramp *= 2
        if self._ramp >= self._limit:
            self._ramp = math.inf
            if self._adaptive and self._full:
                self._limit = min(self._limit + self._step, self._workers)
                self._step *= 2
        self._full = False

    def failed(self, call: Call, error: Exception, now: float, running: int) -> bool:
        """Hears of a failed attempt, and returns whether it is excused: the API's state is to blame.

        Args:
            call: It failed as a whole.
            error: How.
            now: The time.
            running: How many attempts run still.
        """
        if self.throttled(error, now, running):
            return self._is_patient(now)
        if is_outage(error):
            if self._adaptive and is_timeout(error) and self._down_since is None:
                self._come_down(min(running, 0.9 * self._limit), now)
            excused = self._lose(call, now)
        else:
            excused = False
            if not is_transient(error):  # whoever says "not found" is up
                self._answered(now)
        self._look()
        return excused

    def slot_failed(self, error: Exception, now: float, running: int | None) -> bool:
        """The same for one slot of an answer: somebody has answered, so nobody is down.

        `running` is `None` for all but an answer's first such slot: it is one refusal.
        """
        return self.throttled(error, now, running) and self._is_patient(now)

    def throttled(self, error: Exception, now: float, running: int | None) -> bool:
        """Hears of a failure, of a call or one of its slots; returns whether the API said to slow down."""
        if not is_throttled(error):
            return False
        asked = min(retry_after(error) or 0.0, LONGEST_PAUSE)
        if asked and self._pauses:
            self._pause(now, now + asked, logging.INFO if isinstance(error, Throttled) else logging.WARNING)
        if self._adaptive and running is not None and not isinstance(error, Throttled):
            self._come_down(running, now)
        self._look()
        return True

    def _come_down(self, limit: float, now: float) -> None:
        self._refused += 1
        if now >= self._least_since + self._round_trip or self._refused > self._limit:
            self._least = self._limit / 2
            self._least_since = now
            self._refused = 0
        self._limit = max(1.0, self._least, min(self._limit - 1, limit))
        self._step = 1.0
        self._successes = -self._at_once  # a limit-full is let by before the next attempt to grow

    def _pause(self, now: float, until: float, level: int) -> None:
        longer = until - max(now, self._resumes)
        if longer <= 0:
            return
        if now >= self._resumes or longer >= 1:
            log.log(level, "%s: paused for %.1f s, as the API asks", self.name, until - now)
        if self._down_since is not None:
            self._hold(self._down_since, now)
        self._hold(now, until)
        self._resumes = until
        self._begin_at_half()
        self._gap = min(SPREAD * (until - now), LONGEST_SPREAD) / self._at_once

    def _begin_at_half(self) -> None:
        self._ramp = self._limit / 2
        self._successes = 0

    # --- outages

    def _lose(self, call: Call, now: float) -> bool:
        if self._down_since is not None:
            return True
        if self.succeeded_at is None or self._given_up:
            return False
        self._lost.add(call)
        # A stage that waits for the other one has too few calls to find out by itself.
        if len(self._lost) < max(self._limit, LEAST_LOST) and not (self.partner and self.partner.is_down):
            return False
        self._down_since = self._next_probe = now
        self._probes = 0
        log.warning(
            "%s: the API seems to be down: %d calls were not answered since the last success",
            self.name,
            len(self._lost),
        )
        return True

    def _answered(self, now: float) -> None:
        self._lost.clear()
        if self._down_since is not None:
            log.warning("%s: the API answers again, after %.1f s", self.name, now - self._down_since)
            self._up(now, self._down_since)

    def _stop_waiting(self, now: float) -> None:
        assert self._down_since is not None  # noqa: S101 - for the type checker
        log.warning("%s: the API is not waited for any more, after %.0f s", self.name, self._patience)
        self._given_up = True
        self._lost.clear()
        self._up(now, self._down_since)

    def put_off(self, call: Call, due: float) -> float:
        """Returns when a call that is due at `due` may wait in line: a probe not before the next one."""
        if call is self._probed and self._down_since is not None:
            return max(due, self._next_probe + PROBE_LEAD)
        return due

    def _up(self, now: float, down_since: float) -> None:
        self._hold(down_since, now)
        self._down_since = self._probe = self._probed = None
        self._begin_at_half()

    def _is_patient(self, now: float) -> bool:
        return self.succeeded_at is not None and now - self.succeeded_at <= self._patience

    def _look(self) -> None:
        self.slows = (
            self._adaptive
            or self._down_since is not None
            or self._ramp < self._limit  # after a pause, or in one
        )
        self.watches = self.slows or bool(self._lost) or self._given_up
