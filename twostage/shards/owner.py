"""The job that owns all shards: a coordinator whose calls are shards, sent to an executor of the user's."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tenacity import Retrying

from twostage.answers.splits import Splits
from twostage.answers.twins import Twins
from twostage.base.checks import positive_int, seconds_or_never
from twostage.core.coordinator import Coordinator
from twostage.core.handover import HandOver
from twostage.core.lines import Line
from twostage.core.reading import Reading
from twostage.errors import RunTimeout, TooManyFailures, brief, warn
from twostage.failing.retry import Answer, Fail, Judge, Retry, repeats
from twostage.job.building import (
    check_not_held,
    failure_limit_of,
    identity_of,
    job_of,
    journal_of,
    listeners_for,
    recorder_for,
    variables_for,
)
from twostage.job.driver import world
from twostage.pace.pace import Pace
from twostage.pace.rates import rates_of
from twostage.running.async_executor import AsyncExecutor
from twostage.running.on_executor import Runner, Work
from twostage.running.processes import is_dask, kinds_of, name_of, why_not
from twostage.shards.shard import Shard, ShardAnswer, ShardItems

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor

    from twostage.base.records import Batch, Call
    from twostage.failing.retry import End as AttemptEnd
    from twostage.failing.retry import Verdict
    from twostage.job.building import ItemsOptions, RunOptions, Settings
    from twostage.job.outcomes import Job
    from twostage.journal.journal import Journal
    from twostage.journal.rows import Identity
    from twostage.pace.rates import Rates
    from twostage.shards.shard import End

__all__ = ["Sharding", "build_sharded"]

# Ends of a worker's life that an engine blames on what ran there.
KILLED = {("distributed", "KilledWorker"), ("ray", "WorkerCrashedError"), ("ray", "OutOfMemoryError")}

ALONE = 3
"""How often an item alone may be there when a worker dies: before, it may have been another's fault."""


class Sharding(NamedTuple):
    """What is said of the shards, not checked yet."""

    executor: Executor
    shards: int
    shard_size: int


class Owner(Coordinator):
    """A coordinator of one stage, whose calls are shards.

    Attributes:
        offset: Of its clock to the time.
    """

    offset = 0.0

    def items_of(self, batch: Batch) -> ShardItems:
        """Returns what a shard is to be told, each time that it is sent."""
        outcomes = cast("Sequence[Any]", batch.members)
        items = ShardItems(outcome.item for outcome in outcomes)
        if self.recorder is not None and self.twins is not None:
            items.keys = [cast("str", self.twins.keys[outcome.index]) for outcome in outcomes]
        items.timeout = self.deadline - self.now
        return items

    def shard_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """Takes what became of a shard's items, where their own job has ended."""
        members, ends, _ = self._batch_ended(self.token_line, batch, answer, error)
        if not members:
            return
        _, failure, rows, partial, heard = cast("ShardAnswer", answer)
        indices = [member.index for member in members]
        if self.recorder is not None:
            self.recorder.add(rows, [indices[place] for place in partial])
        heard.tell(self.listeners, self.offset, indices)
        for member, end in zip(members, ends, strict=True):
            if end is not None:
                self._take_end(member, end)
        if isinstance(failure, TooManyFailures):  # whose cause does not travel
            failure.__cause__ = next(filter(None, map(_failure_of, reversed(ends))), None)
        if failure is not None:
            self._end(failure)

    def _take_end(self, outcome: Any, end: End) -> None:  # noqa: ANN401 - an outcome of anything
        outcome.token, outcome.token_attempts, outcome.attempts = end.token, end.token_attempts, end.attempts
        error = end.exception
        if isinstance(error, RunTimeout):
            error = self._time_out()  # the whole job's
        if error is None and self.now < self.deadline:
            outcome.result = end.result
        elif error is None:
            outcome.result = self._in_words_of_the_whole(end.result)
        elif self.return_exceptions:
            outcome.exception = error
        else:
            if error is not self.timed_out:
                self.failed_index = min(self.failed_index, outcome.index)
            self._end(error)
            return
        self._finish(outcome)

    def _in_words_of_the_whole(self, result: object) -> object:
        """Returns a result whose tokens' timeouts, if it is a list, are the whole job's."""
        if type(result) is not list:
            return result
        return [self._time_out() if isinstance(one, RunTimeout) else one for one in result]


def _failure_of(end: End | None) -> Exception | None:
    if end is None or end.exception is not None or type(end.result) is not list:
        return None if end is None else end.exception
    return next((one for one in end.result if isinstance(one, Exception)), None)


class _ShardJudge(Judge):
    """Lets an item that was alone when a worker died try again, as another one may have killed it."""

    def __init__(self) -> None:
        super().__init__(None)

    def judge(self, call: Call, end: AttemptEnd, again: Retry | None = None) -> Verdict:
        del again
        if end.error is None:
            return Answer(end.answer)
        alone = len(cast("Batch", call).members) == 1
        if alone and call.attempts < ALONE and _kills(end.error):
            return Retry(end.now, end.error)
        return Fail(end.error)


class _NoRunner(Runner):
    """Of the stage that there is none of: it happens in the shards."""

    def take_back(self) -> list[Call]:
        return []

    def stop(self) -> None:
        """Has nothing to stop."""


def _kills(error: BaseException) -> bool:
    return not KILLED.isdisjoint(kinds_of(error))


def _splits(error: Exception) -> bool:
    """Whether a part of a shard may do better: one item kills its worker, or can't be sent."""
    return _kills(error) or type(error) is ValueError


def build_sharded(
    items: Iterable[Any],
    first: Settings,
    second: Settings,
    items_options: ItemsOptions,
    run_options: RunOptions,
    sharding: Sharding,
    results: list[Any] | None = None,
) -> Job:
    """Checks what is left to check, and builds a job of shards of which nothing runs yet."""
    executor, shards, size = _checked(sharding)
    for settings in (first, second):
        _check_stage(settings, executor)
    if run_options.watching.trace is not None:
        raise TypeError(
            "trace is given, and a Trace is one machine's; expected None, or an observer, which hears of the "
            "attempts of all shards"
        )
    key, refresh_token_on, max_refreshes, window, journal = items_options
    window = shards * size if window is None else positive_int(window, "window")
    if window < size:
        raise ValueError(f"window is {window}; expected at least the shard_size of {size}")
    failure_limit = failure_limit_of(run_options, many=first.many)
    listeners = listeners_for(items, run_options.watching)
    recorded: tuple[Journal, Identity] | None = None
    if journal is not None:
        journal = journal_of(journal)
        recorded = journal, identity_of(journal, first, second)
    shard = Shard(
        _shared(first, shards),
        _shared(second, shards),
        refresh_token_on,
        max_refreshes,
        run_options.max_failures,
        run_options.return_exceptions,
        recorded,
        bool(listeners.attempt_ended),
    )
    shard.job(ShardItems())  # which sees what is wrong with the rest
    _check_travels(shard, executor)
    _warn_of_deadlock(executor)
    twins = None if key is None and recorded is None else Twins()
    recorder = None
    if recorded is not None and twins is not None:
        # Items go on from where they were in no other place, so that recorded tokens are none to go on with.
        recorder = recorder_for(replace(recorded[0], token_ttl=1e-9), recorded[1], twins)
    driver = world.get()()
    handing = HandOver(
        results=results,
        whole=failure_limit is not None,
        ordered=run_options.ordered,
        twins=twins,
        many=False,
    )
    owner = Owner(
        _line(1, shards, size),
        _line(2, 1, None),
        bound=window,
        reading=Reading(size, window, handing),
        handing=handing,
        listeners=listeners,
        return_exceptions=run_options.return_exceptions,
        twins=twins,
        timeout=seconds_or_never(run_options.timeout, "timeout"),
        too_many=None if failure_limit is None else failure_limit.passed,
        linger=seconds_or_never(run_options.linger, "linger"),
        recorder=recorder,
    )
    owner.token_line.runner = driver.runner(
        Work(
            owner.token_line.name,
            shard.run,
            owner.items_of,
            owner.shard_ended,
            shards,
            variables_for(executor),
            executor,
        )
    )
    owner.result_line.runner = _NoRunner()
    owner.offset = time.time() - driver.clock()
    return job_of(items, first, second, items_options, run_options, driver, owner)


def _checked(sharding: Sharding) -> Sharding:
    executor: object = sharding.executor
    if isinstance(executor, type | AsyncExecutor) or not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"executor is {brief(executor)}; expected what shards are sent to, such as Dask's "
            "client.get_executor(pure=False), a ProcessPoolExecutor or an MPIPoolExecutor"
        )
    check_not_held(sharding.executor, "executor")
    return Sharding(
        sharding.executor,
        positive_int(sharding.shards, "shards"),
        positive_int(sharding.shard_size, "shard_size"),
    )


def _check_stage(settings: Settings, executor: Executor) -> None:
    if settings.stage.executor is not None:
        raise TypeError(
            f"{settings.name}'s Stage has an executor, which stays in this process; expected none, as each "
            "shard has its own workers"
        )
    if is_dask(executor) and not repeats(settings.retry):
        raise TypeError(
            f"{settings.name}'s calls must not be repeated (retry=None), and Dask runs a shard again if its "
            "worker is lost; expected another executor, such as a ProcessPoolExecutor"
        )


def _warn_of_deadlock(executor: Executor) -> None:
    """Warns of Python's gh-106883, which Dask's profiler meets within minutes where threads begin often."""
    if not is_dask(executor) or sys.version_info >= (3, 11, 9):
        return
    from dask import config  # noqa: PLC0415 - it is there if its executor is

    if config.get("distributed.worker.profile.enabled", default=True):
        warn(
            f"Python {sys.version.split()[0]} can stand still in a Dask worker, as 3.11 up to 3.11.8 does "
            "under Dask's profiler: use a newer one, or switch distributed.worker.profile.enabled off there",
            RuntimeWarning,
        )


def _shared(settings: Settings, shards: int) -> Settings:
    """Returns a stage's settings with its share of each rate."""
    if settings.stage.rate is None:
        return settings
    stage = copy.copy(settings.stage)
    object.__setattr__(stage, "rate", _share(stage.rate, shards))
    return settings._replace(stage=stage)


def _share(rate: Rates, shards: int) -> Rates:
    if isinstance(rate, int | float):
        return rate / shards
    shares = []
    for one in rates_of(rate, "rate"):
        limit = one.limit / shards
        if one.cost is None and limit < 1:
            shares.append(replace(one, limit=1, per=one.per / limit))
        else:
            shares.append(replace(one, limit=limit))
    return shares


def _check_travels(shard: Shard, executor: Executor) -> None:
    error = why_not(shard, executor)
    if error is None:
        return
    journal = None if shard.journal is None else shard.journal[0]
    parts: dict[str, object] = {"refresh_token_on": shard.refresh_token_on}
    for name, stage, _, _, retry, _ in (shard.first, shard.second):
        parts |= {
            name: stage.fetch,
            f"retry of {name}": retry,
            f"context of {name}'s Stage": stage.context,
            f"bisect of {name}'s Stage": stage.bisect,
            f"rate of {name}'s Stage": stage.rate,
        }
    if journal is not None:
        parts |= {"encode of the Journal": journal.encode, "decode of the Journal": journal.decode}
    for name, part in parts.items():
        reason = why_not(part, executor)
        if reason is not None:
            policies = ""
            if isinstance(part, Retrying):
                from importlib.metadata import version  # noqa: PLC0415 - too slow for each start

                policies = f"; policies can from tenacity 9.2 on (this is {version('tenacity')})"
            raise TypeError(
                f"{name} is {name_of(part)}, which can't be pickled for the executor's processes ({reason}); "
                f"expected what can be{policies}"
            ) from reason
    raise error


def _line(stage: int, workers: int, size: int | None) -> Line:
    line = Line(
        stage,
        workers,
        workers,
        _check_answer,
        _ShardJudge(),
        Pace(stage, workers, pause=False, patience=1.0, adaptive=False, tell=_hear_nothing),
        batch_size=size,
        splits=None if size is None else Splits(_splits),
    )
    line.name = "a shard"
    return line


def _check_answer(answer: object, _call: Call) -> Sequence[Any]:
    return cast("ShardAnswer", answer).ends


def _hear_nothing(_held: object) -> None:
    """No API is called here."""
