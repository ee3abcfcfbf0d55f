"""What a job's listeners are told: of attempts, retries, outcomes, progress and its end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING, Any

from twostage.base.checks import positive_int
from twostage.base.words import brief
from twostage.observing.bar import shower
from twostage.observing.events import (
    JobBegan,
    JobEnded,
    Listeners,
    Observer,
    Progress,
    RetryDue,
    StageSettings,
)
from twostage.observing.log import Log
from twostage.pace.rates import rates_of
from twostage.running.processes import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.base.options import JobOptions
    from twostage.base.records import Call, Member
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome
    from twostage.core.lines import Line
    from twostage.core.moments import Message
    from twostage.job.stages import Settings

__all__ = ["Telling", "began", "listeners_of"]


class Telling:
    """Tells a job's listeners of what they have a method for."""

    def __init__(self, job: Coordinator, listeners: Listeners, begins: Callable[[float], JobBegan]) -> None:
        self._job = job
        self._listeners = listeners
        if listeners.job_began:
            job.hears.begins.append(lambda clock: listeners.tell(listeners.job_began, begins(clock)))
        if listeners.attempt_ended:
            job.hears.attempts.append(self._attempt)
        if listeners.retry_due:
            job.hears.retries.append(self._retry)
        if listeners.outcome_done:
            job.hears.done.append(self._outcome)
        if listeners.progressed:
            job.hears.due.append(lambda: listeners.next_look)
        job.hears.handled.append(self._handled)

    def _attempt(
        self, line: Line, call: Call, first: Member, size: int, answers: int, error: BaseException | None
    ) -> None:
        if self._listeners.attempt_ended:
            self._listeners.tell_attempt(line.stage, call, first, size, self._job.now, answers, error)

    def _retry(
        self, line: Line, members: Sequence[Member], error: Exception | None, number: int, due: float
    ) -> None:
        outcome = members[0].outcome
        event = RetryDue(
            line.stage, outcome.item, outcome.index, len(members), number, error, self._job.now, due
        )
        self._listeners.tell(self._listeners.retry_due, event)

    def _outcome(self, outcome: AnyOutcome) -> None:
        self._listeners.tell(self._listeners.outcome_done, outcome)

    def _handled(self, message: Message | None) -> None:
        job, listeners = self._job, self._listeners
        ended = message is not None and message.ended
        if listeners.progressed:
            if ended:
                listeners.next_look = job.now
            goes_on = any(line.runner.out or line.pace.why(job.now) for line in job.lines)
            listeners.look(job.now, self.progress, goes_on=goes_on)
        if message is not None and ended:
            seconds = job.now - (job.began or 0.0)
            end = JobEnded(job.now, seconds, job.finished, job.failed, message.error)
            listeners.tell(listeners.job_ended, end)

    def progress(self) -> Progress:
        """Returns how far the job is."""
        job = self._job
        running = [min(line.runner.out, line.workers) for line in job.lines]
        last = job.lines[-1]
        waits = len(last.waiting) + len(last.due) + last.runner.out - running[-1] if len(running) > 1 else 0
        return Progress(
            seconds=job.now - (job.began or 0.0),
            done=job.finished,
            failed=job.failed,
            total=self._listeners.total,
            tokens_waiting=waits,
            token_calls=running[0],
            result_calls=running[1] if len(running) > 1 else 0,
            delayed=len(job.delayed),
            why="" if job.ending else self._why(),
        )

    def _why(self) -> str:
        job = self._job
        held = [why for line in job.lines if (why := line.pace.why(job.now))]
        if not held and job.in_progress >= job.bound and not job.at_work:
            held = ["the consumer is away"]
        return "; ".join(held)


def listeners_of(options: JobOptions, items: object) -> Listeners:
    """Returns who is to hear of what happens.

    Raises:
        TypeError: Somebody of them can't.
        ValueError: `total` is below 1.
    """
    total, trace, observer = options.total, options.trace, options.observer
    if total:
        total = positive_int(total, "total")
    elif total is None and (options.progress is not False or type(items) in (list, tuple, range)):
        # What may be slow, as a query's, is not asked for nothing.
        total = len(items) if isinstance(items, Sized) else None
    if trace is not None and not isinstance(trace, Observer):
        raise TypeError(f"trace is {brief(trace)}; expected a Trace, or None")
    given: list[Any] = [] if observer is None else [observer]
    if isinstance(observer, Iterable) and not isinstance(observer, Observer):
        given = list(observer)
    for one in given:
        if not isinstance(one, Observer):
            raise TypeError(f"observer is {brief(observer)}; expected an Observer, or several")
    own = (Log(), trace, shower(options.progress))
    return Listeners([*(one for one in own if one is not None), *given], total=total)


def began(stages: tuple[Settings, Settings], window: int, total: int | None) -> Callable[[float], JobBegan]:
    """Returns what makes the first event of a job."""
    first, second = stages
    told = _told(first), _told(second)
    return lambda clock: JobBegan(time.time(), clock, total, told, first.many, window)


def _told(settings: Settings) -> StageSettings:
    stage = settings.stage
    rates = rates_of(stage.rate, "rate")
    return StageSettings(
        name_of(stage.fetch),
        settings.workers,
        settings.batch_size,
        tuple((rate.limit, rate.per) for rate in rates),
        any(rate.cost is not None for rate in rates),
        stage.pause,
        stage.adaptive,
        stage.patience,
        stage.attempt_timeout,
    )
