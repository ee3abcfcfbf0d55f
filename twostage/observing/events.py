"""What happens in a job, for who wants to hear of it: `Observer`, and the events it is told."""

from __future__ import annotations

import logging
import math
import traceback
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from twostage.base.records import item_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from twostage.base.records import Call, Member, Outcome

__all__ = [
    "Attempt",
    "HeldBack",
    "JobBegan",
    "JobEnded",
    "Listeners",
    "Observer",
    "Progress",
    "RetryDue",
    "StageSettings",
]

log = logging.getLogger("twostage")

LEAST_BETWEEN_LOOKS = 0.1  # seconds
MOST_BETWEEN_LOOKS = 1.0


class StageSettings(NamedTuple):
    """How a stage runs.

    Attributes:
        function: The name of the user's function.
        workers: How many of its calls run at once, at most.
        batch_size: How many items or tokens a call takes, at most; `None` if one, and not in a list.
        rates: Its limits of starts, each as a number and for how many seconds that is.
        weighs: Whether starts weigh differently there.
        pause: Whether it pauses as a whole when the API asks for a wait.
        adaptive: Whether it finds out how many calls the API bears.
        patience: For how many seconds it waits for an API that is down; `None` for ever.
        attempt_timeout: Seconds after which an attempt is given up; `None` for never.
    """

    function: str
    workers: int
    batch_size: int | None
    rates: tuple[tuple[float, float], ...] = ()
    weighs: bool = False
    pause: bool = True
    adaptive: bool = False
    patience: float | None = None
    attempt_timeout: float | None = None


class JobBegan(NamedTuple):
    """A job begins.

    Attributes:
        time: When: seconds since 1970.
        clock: The same on the job's clock, that all other events are timed by; in seconds.
        total: How many items there are, if that is known.
        stages: How they run.
        many: Whether an item has many tokens.
        window: How many items may be read and not handed over.
    """

    time: float
    clock: float
    total: int | None
    stages: tuple[StageSettings, StageSettings]
    many: bool
    window: int


class Attempt(NamedTuple):
    """An attempt has ended. Times are on the job's clock, in seconds.

    Attributes:
        stage: 1 or 2.
        item_index: Of the item, the first one's if it is a batch.
        size: How many items, or tokens at stage two, it took.
        number: Which attempt of its call it was, from 1; one that ended with `Throttled` does not count.
        handed_over: When it was given to the stage's workers.
        began: When one of them began.
        ended: When it ended; if it ran in another process, when the job heard of that.
        answers: How many tokens, or results at stage two, it gave.
        error: Its failure, if it has failed as a whole.
    """

    stage: int
    item_index: int
    size: int
    number: int
    handed_over: float
    began: float
    ended: float
    answers: int
    error: BaseException | None


class RetryDue(NamedTuple):
    """A call, or a part of a batch, will be tried again.

    Attributes:
        stage: 1 or 2.
        item: Whose it is, the first one's if it is a batch.
        item_index: Of this item.
        size: How many items or tokens are tried again.
        number: Which attempt has failed, from 1.
        error: Its failure, or that of one of them; `None` if the policy has refused what it returned.
        at: When that was known, on the job's clock.
        due: When the next attempt may begin.
    """

    stage: int
    item: Any
    item_index: int
    size: int
    number: int
    error: Exception | None
    at: float
    due: float


class HeldBack(NamedTuple):
    """A stage is held back, or goes on.

    Attributes:
        stage: 1 or 2.
        why: "paused", as the API asks; "limited", as a `Throttled` of yours asks; "down", when the API does
            not answer; then "up" when it does, or "given up" when it is not waited for any more.
        at: When, on the job's clock.
        until: Till when it pauses; infinite if it is not known how long it waits.
        seconds: How long this is, or how long the API was down.
        lost: How many different calls were not answered when it was found to be down.
    """

    stage: int
    why: Literal["paused", "limited", "down", "up", "given up"]
    at: float
    until: float = math.inf
    seconds: float = 0.0
    lost: int = 0


class Progress(NamedTuple):
    """How far a job is.

    Attributes:
        seconds: Since it began.
        done: How many items have their outcome.
        failed: How many of them are failures.
        total: How many items there are, if that is known.
        tokens_waiting: How many tokens wait for a worker.
        token_calls: How many calls of stage one run.
        result_calls: How many calls of stage two run.
        delayed: How many calls wait for a retry.
        why: Why it stands still, if it does: in words; else empty.
    """

    seconds: float
    done: int
    failed: int
    total: int | None
    tokens_waiting: int
    token_calls: int
    result_calls: int
    delayed: int
    why: str


class JobEnded(NamedTuple):
    """A job has ended.

    Attributes:
        at: When, on the job's clock.
        seconds: How long it took.
        done: How many items have their outcome.
        failed: How many of them are failures.
        error: Why it ended early, if it did.
    """

    at: float
    seconds: float
    done: int
    failed: int
    error: BaseException | None


class Observer:
    """Hears what happens in a job: derive from it, and define those of its methods that you need.

    They are called in the thread that runs the job, `job_began` in the caller's, so what they do takes its
    time from all calls: take what you need and return, and never wait there. One that raises is left
    out from then on, with a warning; the job goes on. Nothing is told that nobody has a method for. What an
    event holds belongs to the job: leave it as it is. `Outcome`s have tokens and results in them.

    >>> class Slow(Observer):
    ...     def attempt_ended(self, attempt):
    ...         if attempt.ended - attempt.began > 10:
    ...             print(f"item {attempt.item_index}: stage {attempt.stage} took long")
    >>> from twostage import run_two_stage
    >>> run_two_stage([1, 2, 3], str, len, observer=Slow())
    [1, 1, 1]
    """

    def job_began(self, job: JobBegan) -> None:
        """Hears that a job begins."""

    def attempt_ended(self, attempt: Attempt) -> None:
        """Hears of the end of each attempt."""

    def retry_due(self, retry: RetryDue) -> None:
        """Hears that a call will be tried again; after the end of its attempt."""

    def held_back(self, held: HeldBack) -> None:
        """Hears that a stage is held back, or goes on."""

    def outcome_done(self, outcome: Outcome[Any, Any, Any]) -> None:
        """Hears of each outcome, when it is done; it may be handed over later."""

    def progressed(self, progress: Progress) -> None:
        """Hears how far the job is: at most ten times a second, once a second at least, and at the end."""

    def job_ended(self, end: JobEnded) -> None:
        """Hears that the job has ended."""


EVENTS = tuple(name for name in vars(Observer) if not name.startswith("_"))

_new_tuple = tuple.__new__  # a named tuple's own `__new__` takes three times as long


class Listeners:
    """Tells a job's observers what they have a method for. Each list has who hears of one kind of event.

    Attributes:
        next_look: When the next look at the progress is due.
    """

    job_began: list[Callable[[JobBegan], None]]
    attempt_ended: list[Callable[[Attempt], None]]
    retry_due: list[Callable[[RetryDue], None]]
    held_back: list[Callable[[HeldBack], None]]
    outcome_done: list[Callable[[Outcome[Any, Any, Any]], None]]
    progressed: list[Callable[[Progress], None]]
    job_ended: list[Callable[[JobEnded], None]]

    def __init__(self, observers: Iterable[Observer] = (), *, total: int | None = None) -> None:
        self.total = total
        self.next_look = -math.inf
        self._last_look = -math.inf
        self._set(list(observers))

    def _set(self, observers: list[Observer]) -> None:
        self._observers = observers
        for name in EVENTS:
            hearing = [one for one in observers if getattr(type(one), name) is not getattr(Observer, name)]
            setattr(self, name, [getattr(one, name) for one in hearing])

    def tell(self, hearing: list[Callable[[Any], None]], event: object) -> None:
        """Tells those who hear of an event; who raises is told no more."""
        for hear in hearing:
            try:
                hear(event)
            except Exception as error:  # noqa: BLE001 - no observer's failure is the job's
                self._leave_out(hear, error)

    def _leave_out(self, hear: Callable[[Any], None], error: Exception) -> None:
        observer = next(one for one in self._observers if any(getattr(one, name) == hear for name in EVENTS))
        self._set([one for one in self._observers if one is not observer])
        where = traceback.extract_tb(error.__traceback__)[-1]
        log.warning(  # not its text, which may show a result
            "the observer %s has raised %s at %s:%s, and is left out",
            *(type(observer).__name__, type(error).__name__, where.filename, where.lineno),
        )

    def tell_attempt(
        self,
        stage: int,
        call: Call,
        first: Member,
        size: int,
        now: float,
        answers: int,
        error: BaseException | None,
    ) -> None:
        """Tells of the end of an attempt of a call, which had `size` members."""
        attempt = _new_tuple(
            Attempt,
            (
                stage,
                item_of(first).index,
                size,
                call.attempts,
                call.handed_over,
                call.began,
                call.ended or now,
                answers,
                error,
            ),
        )
        for hear in self.attempt_ended:  # as `tell` does it: a function less for each attempt
            try:
                hear(attempt)
            except Exception as raised:  # noqa: BLE001 - as there
                self._leave_out(hear, raised)

    def look(self, now: float, progress: Callable[[], Progress], *, goes_on: bool) -> None:
        """Tells how far the job is, if that is due.

        Args:
            now: The time.
            progress: Finds it out.
            goes_on: Whether that will change with time alone.
        """
        if now >= self.next_look:
            self.tell(self.progressed, progress())
            self._last_look = now
            self.next_look = now + MOST_BETWEEN_LOOKS if goes_on else math.inf
        else:
            self.next_look = min(self.next_look, self._last_look + LEAST_BETWEEN_LOOKS)


def settings_of(fields: Mapping[str, Any]) -> StageSettings:
    """Returns what `StageSettings._asdict` gave, after a way through JSON."""
    return StageSettings(**{**fields, "rates": tuple(map(tuple, fields["rates"]))})
