"""The job that owns all shards: a coordinator whose calls are shards, sent to an executor of the user's."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tenacity import Retrying

from twostage.answers.splits import Splits
from twostage.answers.twins import Twins
from twostage.base.checks import positive_int
from twostage.base.options import JobOptions
from twostage.base.runner import Work
from twostage.base.words import brief, warn
from twostage.core.coordinator import Coordinator
from twostage.core.failures import FailureLimit
from twostage.core.handover import HandOver
from twostage.core.lines import Line
from twostage.core.reading import Reading
from twostage.errors import RunTimeout, TooManyFailures
from twostage.failing.retry import Answer, Fail, Judge, Retry, repeats
from twostage.job.building import job_of, parts_of
from twostage.job.driver import world
from twostage.job.telling import began, listeners_of
from twostage.journal.recording import Recording, identity_of, journal_of, recorder_for
from twostage.pace.pace import Pace
from twostage.pace.rates import rates_of
from twostage.running.async_executor import AsyncExecutor
from twostage.running.holding import check_not_held, variables_for
from twostage.running.processes import is_dask, kinds_of, name_of, why_not
from twostage.shards.shard import Shard, ShardAnswer, ShardItems

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor

    from twostage.base.records import Batch, Call
    from twostage.failing.retry import End as AttemptEnd
    from twostage.failing.retry import Verdict
    from twostage.job.outcomes import Job
    from twostage.job.stages import Settings
    from twostage.journal.journal import Journal
    from twostage.journal.recorder import Recorder
    from twostage.journal.rows import Identity
    from twostage.observing.events import Listeners
    from twostage.pace.rates import Rates
    from twostage.shards.shard import End

__all__ = ["Shards", "build_sharded", "check_shards"]

# Ends of a worker's life that an engine blames on what ran there.
KILLED = {("distributed", "KilledWorker"), ("ray", "WorkerCrashedError"), ("ray", "OutOfMemoryError")}

ALONE = 3
"""How often an item alone may be there when a worker dies: before, it may have been another's fault."""


@dataclass(frozen=True)
class Shards:
    """Has a job run in shards: some consecutive items each, for which a job of its own runs elsewhere.

    Results, order and errors are those of a job without them. Each call is made at least once: those of a
    shard whose worker was lost are made again, if the executor does that. What travels is pickled: the two
    functions, policies, items, tokens and results.

    Attributes:
        executor: Where shards run: Dask's `client.get_executor(pure=False)`, a `ProcessPoolExecutor`,
            mpi4py's `MPIPoolExecutor` or any other `concurrent.futures.Executor`. It is never shut down.
        at_once: How many are out at once: best as many as the executor runs at once, and one or two more.
        size: How many items a shard has. A lost worker costs the calls of its shard; a small one keeps the
            workers of its job less busy, as each begins and ends with a few calls.

    Raises:
        TypeError: The executor takes no calls, or none of plain functions, or a number is none.
        ValueError: A number is below 1.

    >>> from concurrent.futures import ProcessPoolExecutor
    >>> from multiprocessing import get_context
    >>> from twostage import Shards, run_two_stage
    >>> with ProcessPoolExecutor(2, get_context("spawn")) as pool:
    ...     run_two_stage(range(8), str, len, shards=Shards(pool, at_once=2, size=2))
    [1, 1, 1, 1, 1, 1, 1, 1]
    """

    executor: Executor
    at_once: int = 8
    size: int = 1000

    def __post_init__(self) -> None:
        executor: object = self.executor
        if isinstance(executor, type | AsyncExecutor) or not callable(getattr(executor, "submit", None)):
            raise TypeError(
                f"executor is {brief(executor)}; expected what shards are sent to, such as Dask's "
                "client.get_executor(pure=False), a ProcessPoolExecutor or an MPIPoolExecutor"
            )
        positive_int(self.at_once, "at_once")
        positive_int(self.size, "size")


class ShardEnds:
    """Tells shards what they are to do, and takes what has become of their items.

    Args:
        job: The one that owns them.
        line: Its only stage.
        listeners: Its own.
        twins: Know the items' keys, if there are any.
        recorder: Keeps what the shards have, if there is one.
        offset: Of its clock to the time.
    """

    def __init__(
        self,
        job: Coordinator,
        line: Line,
        listeners: Listeners,
        twins: Twins | None,
        recorder: Recorder | None,
        offset: float,
    ) -> None:
        self._recorder = recorder
        self._job = job
        self._line = line
        self._listeners = listeners
        self._twins = twins
        self._offset = offset

    def items_of(self, batch: Batch) -> ShardItems:
        """Returns what a shard is to be told, each time that it is sent."""
        outcomes = cast("Sequence[Any]", batch.members)
        items = ShardItems(outcome.item for outcome in outcomes)
        if self._recorder is not None and self._twins is not None:
            items.keys = [cast("str", self._twins.keys[outcome.index]) for outcome in outcomes]
        items.timeout = self._job.deadline - self._job.now
        return items

    def ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """Takes what became of a shard's items, where their own job has ended."""
        members, ends, _ = self._job.ended(self._line, batch, answer, error)
        if not members:
            return
        _, failure, rows, partial, heard = cast("ShardAnswer", answer)
        indices = [member.index for member in members]
        if self._recorder is not None:
            self._recorder.add(rows, [indices[place] for place in partial])
        heard.tell(self._listeners, self._offset, indices)
        for member, end in zip(members, ends, strict=True):
            if end is not None:
                self._take(member, end)
        if isinstance(failure, TooManyFailures):  # whose cause does not travel
            failure.__cause__ = next(filter(None, map(_failure_of, reversed(ends))), None)
        if failure is not None:
            self._job.end(failure)

    def _take(self, outcome: Any, end: End) -> None:  # noqa: ANN401 - an outcome of anything
        job = self._job
        outcome.token, outcome.token_attempts, outcome.attempts = end.token, end.token_attempts, end.attempts
        error = job.time_out() if isinstance(end.exception, RunTimeout) else end.exception  # the whole job's
        if error is None:
            result = end.result if job.now < job.deadline else self._in_words_of_the_whole(end.result)
            job.settle(outcome.answer(result))
        elif job.return_exceptions:
            outcome.exception = error
            job.settle(outcome)
        else:
            if error is not job.timed_out:
                job.failed_index = min(job.failed_index, outcome.index)
            job.end(error)

    def _in_words_of_the_whole(self, result: object) -> object:
        """Returns a result whose tokens' timeouts, if it is a list, are the whole job's."""
        if type(result) is not list:
            return result
        return [self._job.time_out() if isinstance(one, RunTimeout) else one for one in result]


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


def _kills(error: BaseException) -> bool:
    return not KILLED.isdisjoint(kinds_of(error))


def _splits(error: Exception) -> bool:
    """Whether a part of a shard may do better: one item kills its worker, or can't be sent."""
    return _kills(error) or type(error) is ValueError


def check_shards(shards: object, *, awaited: bool) -> None:
    """Checks that a job can be made of shards.

    Raises:
        TypeError: They are none, or the job is one of async code.
    """
    if not isinstance(shards, Shards):
        raise TypeError(f"shards is {brief(shards)}; expected Shards(executor), or None")
    if awaited:
        raise TypeError(
            "shards is given, and can't be awaited; expected run_two_stage or iter_two_stage, in async code "
            "by asyncio.to_thread"
        )


def build_sharded(
    items: Iterable[Any],
    stages: tuple[Settings, Settings],
    options: JobOptions,
    results: list[Any] | None = None,
) -> Job:
    """Checks what is left to check, and builds a job of shards of which nothing runs yet."""
    executor, at_once, size = options.shards.executor, options.shards.at_once, options.shards.size
    first, second = stages
    check_not_held(executor, "executor")
    for settings in stages:
        _check_stage(settings, executor)
    if options.trace is not None:
        raise TypeError(
            "trace is given, and a Trace is one machine's; expected None, or an observer, which hears of the "
            "attempts of all shards"
        )
    window = options.window or at_once * size
    if window < size:
        raise ValueError(f"window is {window}; expected at least the size of a shard, {size}")
    limit = FailureLimit.of(options, many=first.many)
    listeners = listeners_of(options, items)
    recorded: tuple[Journal, Identity] | None = None
    if options.journal is not None:
        journal = journal_of(options)
        recorded = journal, identity_of(journal, first.stage.fetch, second.stage.fetch, many=first.many)
    shard = Shard(
        (_shared(first, at_once), _shared(second, at_once)),
        JobOptions(
            refresh_token_on=options.refresh_token_on,
            max_refreshes=options.max_refreshes,
            max_failures=options.max_failures,
            return_exceptions=options.return_exceptions,
        ),
        recorded,
        bool(listeners.attempt_ended),
    )
    shard.job(ShardItems())  # which sees what is wrong with the rest
    _check_travels(shard, executor)
    _warn_of_deadlock(executor)
    twins, recorder = Twins.of(options), None
    if recorded is not None and twins is not None:
        # Items go on from where they were in no other place, so that recorded tokens are none to go on with.
        recorder = recorder_for(*recorded, twins.keys, many=first.many, goes_on=False)
    driver = world.get()()
    handing = HandOver.of(options, results, forget=None if twins is None else twins.forget, many=False)
    splits = Splits(_splits)
    line = Line(
        1,
        at_once,
        at_once,
        _check_answer,
        _ShardJudge(),
        Pace(1, at_once, pause=False, patience=1.0, adaptive=False, tell=_hear_nothing),
        batch_size=size,
        refusals=splits,
    )
    line.name = "a shard"
    owner = Coordinator(
        line,
        bound=window,
        reading=Reading(size, window, handing, options.linger),
        handing=handing,
        return_exceptions=options.return_exceptions,
        timeout=options.timeout,
    )
    splits.attach(owner, line)
    parts_of(
        owner,
        listeners,
        began(stages, window, listeners.total),
        twins,
        None if recorder is None else Recording(recorder),
        limit,
    )
    ends = ShardEnds(owner, line, listeners, twins, recorder, time.time() - driver.clock())
    line.runner = driver.runner(
        Work(line.name, shard.run, ends.items_of, ends.ended, at_once, variables_for(executor), executor)
    )
    return job_of(items, options, driver, owner)


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
    share = _share(settings.stage.rate, shards)
    return settings._replace(stage=replace(settings.stage, rate=share))


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
    parts: dict[str, object] = {"refresh_token_on": shard.options.refresh_token_on}
    for settings in shard.stages:
        name, stage = settings.name, settings.stage
        parts |= {
            name: stage.fetch,
            f"retry of {name}": settings.retry,
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


def _check_answer(answer: object, _call: Call) -> Sequence[Any]:
    return cast("ShardAnswer", answer).ends


def _hear_nothing(_held: object) -> None:
    """No API is called here."""
