"""Building a job: what was said of it is checked, defaults are filled in, and its parts are put together."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterable, Iterable, Sized
from contextvars import ContextVar, copy_context
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from twostage.answers.answers import Check, batch_check, checked_result, checked_token
from twostage.answers.many import Many
from twostage.answers.refreshing import Refreshing
from twostage.answers.splits import Splits, refuses_batch
from twostage.answers.twins import Twins
from twostage.base.checks import (
    check_bool,
    check_fetch,
    check_function,
    failure_test,
    positive_int,
    seconds_or_never,
)
from twostage.base.gate import Gate
from twostage.base.runner import Work
from twostage.base.words import STAGES, brief
from twostage.core.coordinator import LEAST_IN_PROGRESS, Coordinator
from twostage.core.failures import FailureLimit
from twostage.core.handover import HandOver
from twostage.core.lines import Line
from twostage.core.reading import Reading
from twostage.failing.retry import DEFAULT_ATTEMPTS, Judge, RetryPolicy, check_policy, repeats
from twostage.job.driver import LoopDriver, ThreadDriver, world
from twostage.job.outcomes import AsyncJob, Job
from twostage.job.sources import AsyncSource, Source
from twostage.job.telling import Telling
from twostage.journal.journal import Journal
from twostage.journal.recording import Recording
from twostage.journal.rows import Identity
from twostage.journal.values import check_keys, journal_key
from twostage.observing.bar import shower
from twostage.observing.events import JobBegan, Listeners, Observer, StageSettings
from twostage.observing.log import Log
from twostage.pace.pace import Pace
from twostage.pace.rates import HungGate, RateGate, rates_of
from twostage.running.processes import name_of
from twostage.stage import Default, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from concurrent.futures import Executor
    from contextvars import Context

    from twostage.base.as_completed import Handler
    from twostage.base.checks import Failures
    from twostage.base.records import Batch
    from twostage.job.driver import AsyncDriver, Driver
    from twostage.job.sources import Key
    from twostage.journal.journal import JournalLike
    from twostage.journal.recorder import Recorder
    from twostage.observing.bar import ProgressLike

__all__ = [
    "RESULT_WORKERS",
    "TOKEN_WORKERS",
    "ItemsOptions",
    "RunOptions",
    "Settings",
    "Watching",
    "build",
    "build_async",
    "settled",
]

ValueT = TypeVar("ValueT")

TOKEN_WORKERS = 4
RESULT_WORKERS = 32
COROUTINES = 100
"""How many attempts of a coroutine function run at once."""

LEAST_WINDOW = 10_000

STAGE_OF = {"fetch_token": 1, "fetch_result": 2}


class ItemsOptions(NamedTuple):
    """What is said of the items, not checked yet."""

    key: Callable[[Any], Hashable] | None
    refresh_token_on: Failures | None
    max_refreshes: int
    window: int | None
    journal: JournalLike | None


class Watching(NamedTuple):
    """Who is to hear of what happens, not checked yet."""

    progress: ProgressLike
    total: int | None
    trace: Observer | None
    observer: Observer | Iterable[Observer] | None


class RunOptions(NamedTuple):
    """What is said of the run, not checked yet."""

    return_exceptions: bool
    timeout: float | None
    max_failures: float | None
    watching: Watching
    ordered: bool = False
    linger: float | None = None


class Settings(NamedTuple):
    """One stage with nothing left to a default."""

    name: str
    stage: Stage[Any, Any]
    batch_size: int | None
    workers: int
    retry: RetryPolicy
    many: bool


def settled(
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    batch_size: int | Default | None,
    token_workers: int | Default,
    result_workers: int | Default,
    retry: RetryPolicy | Default,
    *,
    many: bool | Default,
) -> tuple[Settings, Settings]:
    """Checks what is said of the stages, in them and beside them, and fills the defaults in."""
    if not isinstance(batch_size, Default | None):
        batch_size = positive_int(batch_size, "batch_size")
    if not isinstance(token_workers, Default):
        token_workers = positive_int(token_workers, "token_workers")
    if not isinstance(result_workers, Default):
        result_workers = positive_int(result_workers, "result_workers")
    if not isinstance(many, Default):
        check_bool(many, "many")
    policy = DEFAULT_ATTEMPTS if isinstance(retry, Default) else check_policy(retry, "retry")
    first, second = _stage(fetch_token, "fetch_token"), _stage(fetch_result, "fetch_result")
    if second.many is True:
        raise TypeError("fetch_result's Stage has many=True; only items have many tokens, at stage one")
    return (
        _settings(
            "fetch_token",
            first,
            _said(
                ("batch_size", batch_size),
                ("batch_size of fetch_token's Stage", first.batch_size),
                default=None,
            ),
            _said(
                ("token_workers", token_workers),
                ("workers of fetch_token's Stage", first.workers),
                default=COROUTINES if first.awaits else TOKEN_WORKERS,
            ),
            policy,
            many=_said(("many", many), ("many of fetch_token's Stage", first.many), default=False),
        ),
        _settings(
            "fetch_result",
            second,
            _said(("batch_size of fetch_result's Stage", second.batch_size), default=None),
            _said(
                ("result_workers", result_workers),
                ("workers of fetch_result's Stage", second.workers),
                default=COROUTINES if second.awaits else RESULT_WORKERS,
            ),
            policy,
            many=False,
        ),
    )


def _stage(fetch: Callable[[Any], Any] | Stage[Any, Any], name: str) -> Stage[Any, Any]:
    if isinstance(fetch, Stage):
        return fetch
    check_fetch(fetch, name)
    return Stage(fetch)


def _settings(
    name: str,
    stage: Stage[Any, Any],
    batch_size: int | None,
    workers: int,
    policy: RetryPolicy,
    *,
    many: bool,
) -> Settings:
    if stage.retry_missing and batch_size is None:
        raise TypeError(
            f"{name}'s Stage has retry_missing=True, but no batch_size: one item is never left out"
        )
    return Settings(
        name, stage, batch_size, workers, policy if isinstance(stage.retry, Default) else stage.retry, many
    )


def _said(*said: tuple[str, ValueT | Default], default: ValueT) -> ValueT:
    """Returns the one value that was given, or `default` if none was."""
    given = [(name, value) for name, value in said if not isinstance(value, Default)]
    if len(given) > 1:
        raise TypeError(
            " and ".join(f"{name} ({value!r})" for name, value in given) + " are both given; expected one"
        )
    return given[0][1] if given else default


def build(
    items: Iterable[Any],
    first: Settings,
    second: Settings,
    items_options: ItemsOptions,
    run_options: RunOptions,
    results: list[Any] | None = None,
    *,
    listeners: Listeners | None = None,
    recorder: Recorder | None = None,
) -> Job:
    """Checks what is left to check, and builds a job of which nothing runs yet.

    Args:
        items: The source.
        first: Stage one.
        second: Stage two.
        items_options: What was said of the items.
        run_options: What was said of the run.
        results: The list to put results in; `None` for a stream.
        listeners: Who hears of what happens, instead of those that were asked for.
        recorder: Keeps what the calls give, instead of a journal.
    """
    driver = world.get()()
    listeners = listeners or listeners_for(items, run_options.watching)
    coordinator = _coordinator(
        driver, first, second, items_options, run_options, listeners, results, recorder=recorder
    )
    return job_of(items, first, second, items_options, run_options, driver, coordinator)


def job_of(
    items: Iterable[Any],
    first: Settings,
    second: Settings,
    items_options: ItemsOptions,
    run_options: RunOptions,
    driver: Driver,
    coordinator: Coordinator,
) -> Job:
    """Opens the source, and returns the job that a coordinator runs."""
    source = Source(items, _key(items, items_options))
    source.open()
    if run_options.linger is not None:
        coordinator.reader = driver.reader(source, coordinator.item_read)
    return Job(source, coordinator, driver)


def build_async(
    items: Iterable[Any] | AsyncIterable[Any],
    first: Settings,
    second: Settings,
    items_options: ItemsOptions,
    run_options: RunOptions,
    results: list[Any] | None = None,
) -> AsyncJob:
    """The same for a consumer on an event loop."""
    driver = LoopDriver() if world.get() is ThreadDriver else cast("AsyncDriver", world.get()())
    listeners = listeners_for(items, run_options.watching)
    coordinator = _coordinator(driver, first, second, items_options, run_options, listeners, results)
    source = _source(items, _key(items, items_options))
    coordinator.reader = driver.reader(source, coordinator.item_read)
    return AsyncJob(source, coordinator, driver)


def listeners_for(items: object, watching: Watching) -> Listeners:
    """Checks who is to hear of what happens."""
    progress, total, trace, observer = watching
    if total:
        total = positive_int(total, "total")
    elif total is None and (progress is not False or type(items) in (list, tuple, range)):
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
    own = (Log(), trace, shower(progress))
    return Listeners([*(one for one in own if one is not None), *given], total=total)


def began(first: Settings, second: Settings, window: int, total: int | None) -> Callable[[float], JobBegan]:
    """Returns what makes the first event of a job."""
    stages = _told(first), _told(second)
    return lambda clock: JobBegan(time.time(), clock, total, stages, first.many, window)


def _told(settings: Settings) -> StageSettings:
    _, stage, batch_size, workers, *_ = settings
    rates = rates_of(stage.rate, "rate")
    return StageSettings(
        name_of(stage.fetch),
        workers,
        batch_size,
        tuple((rate.limit, rate.per) for rate in rates),
        any(rate.cost is not None for rate in rates),
        stage.pause,
        stage.adaptive,
        stage.patience,
        stage.attempt_timeout,
    )


def _key(items: object, options: ItemsOptions) -> Key:
    if options.journal is None:
        return options.key
    if options.key is None and isinstance(items, list | tuple):  # of others it is seen as they come
        check_keys(items)
    return journal_key(options.key)


def _source(items: Iterable[Any] | AsyncIterable[Any], key: Key) -> Source | AsyncSource:
    if isinstance(items, AsyncIterable):
        return AsyncSource(items, key)
    source = Source(items, key)
    if source.in_memory or not isinstance(items, Iterable):
        source.open()  # others are touched in their thread alone
    return source


def _coordinator(
    driver: Driver,
    first: Settings,
    second: Settings,
    items_options: ItemsOptions,
    run_options: RunOptions,
    listeners: Listeners,
    results: list[Any] | None,
    *,
    recorder: Recorder | None = None,
) -> Coordinator:
    """Checks what is left to check, and puts the parts together."""
    key, refresh_token_on, max_refreshes, window, journal = items_options
    batch_size = first.batch_size or 1
    # The batches of one or two workers vary too much: stage two would run dry (tests/scheduling).
    batches = max(TOKEN_WORKERS, first.workers)
    bound = max(LEAST_IN_PROGRESS, 2 * (batches * batch_size + second.workers * (second.batch_size or 1)))
    window = max(LEAST_WINDOW, 10 * bound) if window is None else positive_int(window, "window")
    if window < batch_size:
        raise ValueError(
            f"window is {window}; expected at least the batch_size of {batch_size}: whole batches are read"
        )
    refreshes = None if refresh_token_on is None else failure_test(refresh_token_on, "refresh_token_on")
    max_refreshes = positive_int(max_refreshes, "max_refreshes")
    if key is not None:
        check_function(key, "key")
    timeout = seconds_or_never(run_options.timeout, "timeout")
    linger = seconds_or_never(run_options.linger, "linger")
    failure_limit = failure_limit_of(run_options, many=first.many)
    if not (repeats(first.retry) and repeats(second.retry)):
        refreshes = None  # either stage's calls must not be made twice for an item
    token_argument = _item if first.batch_size is None else _items
    result_argument = _token if second.batch_size is None else _tokens
    # Where calls are made of what waits when a worker is free, none is handed over before.
    token_line = _line(first, token_argument, listeners, ahead=refreshes is None)
    result_line = _line(
        second,
        result_argument,
        listeners,
        ahead=second.batch_size is None and not (first.many and refreshes),
        refreshes=refreshes,
    )
    token_line.pace.partner, result_line.pace.partner = result_line.pace, token_line.pace
    twins = None if key is None and journal is None else Twins()
    if journal is not None and twins is not None:
        journal = journal_of(journal)
        recorder = recorder_for(journal, identity_of(journal, first, second), twins)
    handing = HandOver(
        results=results,
        whole=failure_limit is not None,
        ordered=run_options.ordered,
        forget=None if twins is None else twins.forget,
        many=first.many,
    )
    coordinator = Coordinator(
        token_line,
        result_line,
        bound=bound,
        reading=Reading(batch_size, window, handing, linger),
        handing=handing,
        return_exceptions=run_options.return_exceptions,
        last_first=first.stage.executor is not None
        and first.stage.executor is second.stage.executor
        and not first.stage.awaits,
        timeout=timeout,
    )
    for line in (token_line, result_line):
        if line.splits is not None:
            line.splits.attach(coordinator, line)
    if first.many:
        Many(coordinator)
    parts_of(
        coordinator,
        listeners,
        began(first, second, window, listeners.total),
        twins,
        recorder,
        failure_limit,
        many=first.many,
    )
    if refreshes is not None:
        Refreshing(coordinator, max_refreshes)
    token_line.runner = driver.runner(
        _work(
            first,
            token_argument,
            coordinator.tokens_ended,
            _executor(first, second.stage, driver),
            listeners,
        )
    )
    result_line.runner = driver.runner(
        _work(
            second,
            result_argument,
            coordinator.results_ended,
            _executor(second, first.stage, driver),
            listeners,
        )
    )
    return coordinator


def parts_of(
    job: Coordinator,
    listeners: Listeners,
    begins: Callable[[float], JobBegan],
    twins: Twins | None,
    recorder: Recorder | None,
    failure_limit: FailureLimit | None,
    *,
    many: bool,
) -> None:
    """Gives a job its parts, in the order in which they are told."""
    if twins is not None:
        job.hears.read.append(twins.read_for(job))
    if recorder is not None:
        Recording(job, recorder, many=many)
    Telling(job, listeners, begins)
    if failure_limit is not None:
        job.hears.done.append(failure_limit.ends(job))
    if twins is not None:
        job.hears.done.append(twins.done_for(job))


def journal_of(journal: JournalLike) -> Journal:
    """Returns the journal that was given, if only as its path."""
    return journal if isinstance(journal, Journal) else Journal(journal)


def identity_of(journal: Journal, first: Settings, second: Settings) -> Identity:
    """Returns whose answers a job's journal holds."""
    job = journal.job or f"{name_of(first.stage.fetch)}, {name_of(second.stage.fetch)}"
    return Identity(job, journal.version_text, int(first.many), int(journal.encode is not None))


def recorder_for(journal: Journal, identity: Identity, twins: Twins) -> Recorder:
    """Returns what keeps a job's answers in its journal."""
    from twostage.journal.recorder import Recorder  # noqa: PLC0415 - for some Pythons, SQLite is an extra

    return Recorder(journal, identity, twins.keys)


def failure_limit_of(options: RunOptions, *, many: bool) -> FailureLimit | None:
    """Returns what ends the job if too many items fail, if that was asked for."""
    most: object = options.max_failures
    if most is None:
        return None
    if not options.return_exceptions:
        raise TypeError(
            "max_failures is given without return_exceptions=True, so that the first failure ends the job"
        )
    if not isinstance(most, float):
        return FailureLimit(positive_int(most, "max_failures"), many=many)
    if not 0 < most < 1:
        raise ValueError(f"max_failures is {most}; expected a number of failures, or a share between 0 and 1")
    return FailureLimit(most, many=many)


def _line(
    settings: Settings,
    argument: Callable[[Any], Any],
    listeners: Listeners,
    *,
    ahead: bool,
    refreshes: Callable[[Exception], bool] | None = None,
) -> Line:
    name, stage, batch_size, workers, retry, _ = settings
    number = STAGE_OF[name]
    one = number == 1
    check: Check = checked_token if one else checked_result
    splits = None
    if batch_size is not None:
        check = batch_check(name, argument)
        if stage.bisect is not False and repeats(retry):
            splits = Splits(refuses_batch if stage.bisect is True else failure_test(stage.bisect, "bisect"))
    gates: list[Gate] = [RateGate(rate, argument) for rate in rates_of(stage.rate, "rate")]
    if stage.attempt_timeout is not None:
        gates.append(HungGate(STAGES[number], workers, stage.patience, keep_places=stage.awaits))
    return Line(
        number,
        workers,
        math.inf if ahead and (stage.executor is None or stage.awaits) and not gates else workers,
        check,
        Judge(retry, retry_missing=stage.retry_missing, refresh_on=refreshes),
        Pace(
            number,
            workers,
            pause=stage.pause,
            patience=stage.patience,
            adaptive=stage.adaptive,
            tell=lambda held: listeners.tell(listeners.held_back, held),
        ),
        slots=batch_size is not None,
        batch_size=1 if one and batch_size is None else batch_size,
        splits=splits,
        gates=gates,
        timed=stage.attempt_timeout is not None,
        observed=bool(listeners.attempt_ended),
    )


def _executor(settings: Settings, other: Stage[Any, Any], driver: Driver) -> Executor | None:
    """Returns where a stage's attempts run: coroutines on the other one's loop, as clients belong to one."""
    stage = settings.stage
    shared = stage.executor is None and stage.awaits and other.awaits
    executor = other.executor if shared else stage.executor
    awaited = isinstance(driver, LoopDriver) and stage.awaits  # an attempt that waits holds no worker then
    if executor is not None and not awaited:
        check_not_held(executor, f"the executor of {settings.name}'s Stage")
    return executor


def check_not_held(executor: Executor, name: str) -> None:
    """Checks that the attempt that we may be called in holds none of an executor's workers.

    Raises:
        RuntimeError: It does.
    """
    if any(executor is one for one in _running_on.get()):
        raise RuntimeError(
            f"{name} runs the attempt that starts this job, which could then wait for itself for ever; "
            "expected another executor"
        )


def _work(
    settings: Settings,
    argument: Callable[[Any], Any],
    ended: Handler,
    executor: Executor | None,
    listeners: Listeners,
) -> Work:
    stage = settings.stage
    return Work(
        STAGES[STAGE_OF[settings.name]],
        stage.fetch,
        argument,
        ended,
        settings.workers,
        variables_for(executor),
        executor,
        stage.attempt_timeout,
        rated=bool(rates_of(stage.rate, "rate")),
        awaits=stage.awaits,
        context=stage.context,
        observed=bool(listeners.attempt_ended),
    )


def variables_for(executor: Executor | None) -> Context:
    """Returns the context variables of a stage's attempts: the caller's, and where they run."""
    variables = copy_context()
    if executor is not None:
        variables.run(_running_on.set, (*_running_on.get(), executor))
    return variables


_running_on: ContextVar[tuple[Executor, ...]] = ContextVar("running_on", default=())
"""The executors that the current attempt holds a worker of, and those of the jobs around it."""

_token = attrgetter("token")


def _tokens(batch: Batch) -> list[Any]:
    return [member.token for member in batch.members]  # each attempt's own list, which it may change


def _item(batch: Batch) -> Any:  # noqa: ANN401 - whatever the user's items are
    return batch.members[0].item  # type: ignore[union-attr] # at stage one they are outcomes


def _items(batch: Batch) -> list[Any]:
    return [member.item for member in batch.members]  # type: ignore[union-attr] # as above
