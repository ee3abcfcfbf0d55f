"""What travels to another machine: a shard of the items, and there a job of its own for them."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from twostage.base.records import failure_of
from twostage.base.words import without_our_frames
from twostage.errors import RunTimeout
from twostage.job.building import build
from twostage.job.outcomes import Outcomes
from twostage.journal.collector import Collector
from twostage.observing.events import Listeners, Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.base.options import JobOptions
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome
    from twostage.job.outcomes import Job
    from twostage.job.stages import Settings
    from twostage.journal.collector import Rows
    from twostage.journal.journal import Journal
    from twostage.journal.rows import Identity
    from twostage.observing.events import Attempt, HeldBack, JobBegan, RetryDue

__all__ = ["End", "Heard", "Shard", "ShardAnswer", "ShardItems"]


class ShardItems(list[Any]):
    """A shard's items, and what its job has to know beside them.

    Attributes:
        keys: Theirs, if a journal is kept.
        timeout: How many seconds the whole job still has.
    """

    keys: Sequence[str] = ()
    timeout: float = math.inf


class End(NamedTuple):
    """What became of an item: what an `Outcome` says, but for the item itself."""

    token: Any
    result: Any
    exception: Exception | None
    token_attempts: int
    attempts: int

    def __repr__(self) -> str:
        return "<End>"  # not what is in it


class ShardAnswer(NamedTuple):
    """What a shard's job has given.

    Attributes:
        ends: For each item; `None` if the job has ended before.
        error: Why it did.
        rows: What a journal is to have of it.
        partial: The places of items of which a part is not recorded as an answer.
        heard: What happened in it.
    """

    ends: list[End | None]
    error: Exception | None
    rows: list[Rows]
    partial: set[int]
    heard: Heard

    def __repr__(self) -> str:
        return f"<ShardAnswer of {len(self.ends)} items>"  # nor here


class Shard(NamedTuple):
    """How each shard's job runs.

    Attributes:
        stages: The two.
        options: Those of the whole job that hold in each shard too.
        journal: What was said of it, and of whose answers it is, if there is one.
        observed: Whether each attempt is to be told of.
    """

    stages: tuple[Settings, Settings]
    options: JobOptions
    journal: tuple[Journal, Identity] | None
    observed: bool

    def run(self, items: ShardItems) -> ShardAnswer:
        """Runs the job of a shard, wherever this is."""
        is_cancelled = _cancellation()
        heard = Heard()
        listeners = Listeners([heard])
        if not self.observed:
            listeners.attempt_ended = []
        keeping = None
        if self.journal is not None:
            journal, identity = self.journal
            keeping = Keeping(Collector(journal, dict(enumerate(items.keys)), many=bool(identity.many)))
        job = self.job(items, listeners, keeping)
        wanted = self.options.return_exceptions
        many = self.stages[0].many and not wanted  # else one of many tokens may fail alone
        ends: list[End | None] = [None] * len(items)
        error: Exception | None = None
        try:
            with Outcomes[Any, Any, Any](job) as outcomes:
                for outcome in outcomes:
                    failure = failure_of(outcome, many=many)
                    ends[outcome.index] = _end(outcome, failure)
                    ends_all = failure is not None and not isinstance(failure, RunTimeout)
                    if is_cancelled() or (ends_all and not wanted):
                        break
        except Exception as ending:  # noqa: BLE001 - it ends the whole job, after the outcomes that are there
            error = without_our_frames(ending)
        if keeping is None:
            return ShardAnswer(ends, error, [], set(), heard)
        return ShardAnswer(ends, error, keeping.lots, keeping.collected.partial, heard)

    def job(
        self, items: ShardItems, listeners: Listeners | None = None, keeping: Keeping | None = None
    ) -> Job:
        """Builds the job of a shard, of which nothing runs yet.

        Raises:
            TypeError: A setting is of the wrong kind.
            ValueError: One is out of range.
        """
        timeout = None if items.timeout == math.inf else items.timeout
        options = replace(self.options, return_exceptions=True, timeout=timeout)
        return build(items, self.stages, options, listeners=listeners, recording=keeping)


class Keeping:
    """Keeps what the journal is to have of a shard, for the one who has the file.

    Attributes:
        collected: What was heard of since the last time.
        lots: What was heard of before, in the order in which it is to be written.
    """

    def __init__(self, collected: Collector) -> None:
        self.collected = collected
        self.lots: list[Rows] = []

    def attach(self, job: Coordinator) -> None:
        """Is of that job."""
        self._handing = job.handing
        self.collected.attach(job)
        job.hears.before_message.append(self._keep)

    def _keep(self) -> None:
        if (rows := self.collected.take_rows()) is not None:
            self.lots.append(rows)
        self._handing.recorded(self.collected.take_finished())


def _end(outcome: AnyOutcome, failure: Exception | None) -> End:
    result = None if failure is not None else outcome.result
    return End(outcome.token, result, failure, outcome.token_attempts, outcome.attempts)


def _cancellation() -> Callable[[], bool]:
    """Returns what says whether this shard was cancelled: a Dask worker can, others are waited for."""
    if "distributed" in sys.modules:
        with suppress(Exception):  # this is none
            worker = sys.modules["distributed"].get_worker()
            key, tasks = worker.get_current_task(), worker.state.tasks
            return lambda: key not in tasks or tasks[key].state == "cancelled"
    return bool


class Heard(Observer):
    """Keeps what happens in a shard's job, to be told of where the whole job is."""

    def __init__(self) -> None:
        self.offset = 0.0  # of the clock to the time
        self.attempts: list[Attempt] = []
        self.retries: list[RetryDue] = []
        self.held: list[HeldBack] = []

    def job_began(self, job: JobBegan) -> None:
        self.offset = job.time - job.clock

    def attempt_ended(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)

    def retry_due(self, retry: RetryDue) -> None:
        self.retries.append(retry)

    def held_back(self, held: HeldBack) -> None:
        self.held.append(held)

    def tell(self, listeners: Listeners, offset: float, indices: Sequence[int]) -> None:
        """Tells the whole job's listeners.

        Args:
            listeners: They.
            offset: Of their job's clock to the time.
            indices: Of the shard's items in the whole job.
        """
        later = self.offset - offset
        for attempt in self.attempts:
            event: Any = attempt._replace(
                item_index=indices[attempt.item_index],
                handed_over=attempt.handed_over + later,
                began=attempt.began + later,
                ended=attempt.ended + later,
            )
            listeners.tell(listeners.attempt_ended, event)
        for retry in self.retries:
            index = indices[retry.item_index]
            event = retry._replace(item_index=index, at=retry.at + later, due=retry.due + later)
            listeners.tell(listeners.retry_due, event)
        for held in self.held:
            event = held._replace(at=held.at + later, until=held.until + later)
            listeners.tell(listeners.held_back, event)
