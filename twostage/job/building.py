"""Building a job: of its options, its stages and its source the parts are made, and put together."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

from twostage.answers.many import Many
from twostage.answers.refreshing import Refreshing
from twostage.answers.twins import Twins
from twostage.base.options import TOKEN_WORKERS
from twostage.core.coordinator import LEAST_IN_PROGRESS, Coordinator
from twostage.core.failures import FailureLimit
from twostage.core.handover import HandOver
from twostage.core.reading import Reading
from twostage.failing.retry import repeats
from twostage.job.driver import LoopDriver, ThreadDriver, world
from twostage.job.outcomes import AsyncJob, Job
from twostage.job.sources import AsyncSource, Source
from twostage.job.stages import arguments_of, executor_of, line_of, work_of
from twostage.job.telling import Telling, began, listeners_of
from twostage.journal.recording import Recording, identity_of, journal_of, recorder_for
from twostage.journal.values import check_keys, journal_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.base.options import JobOptions
    from twostage.job.driver import AsyncDriver, Driver
    from twostage.job.sources import Key
    from twostage.job.stages import Settings
    from twostage.observing.events import JobBegan, Listeners

__all__ = ["build", "build_async", "job_of", "parts_of"]

LEAST_WINDOW = 10_000


class Part(Protocol):
    """What some jobs need; it hears of what it wants to hear of."""

    def attach(self, job: Coordinator) -> None:
        """Is of that job."""


def build(
    items: Iterable[Any],
    stages: tuple[Settings, Settings],
    options: JobOptions,
    results: list[Any] | None = None,
    *,
    listeners: Listeners | None = None,
    recording: Part | None = None,
) -> Job:
    """Checks what is left to check, and builds a job of which nothing runs yet.

    Args:
        items: The source.
        stages: The two.
        options: Of the job.
        results: The list to put results in; `None` for a stream.
        listeners: Who hears of what happens, instead of those that were asked for.
        recording: Keeps what the calls give, instead of a journal.
    """
    driver = world.get()()
    coordinator = _coordinator(
        driver, stages, options, listeners or listeners_of(options, items), results, recording
    )
    return job_of(items, options, driver, coordinator)


def job_of(items: Iterable[Any], options: JobOptions, driver: Driver, coordinator: Coordinator) -> Job:
    """Opens the source, and returns the job that a coordinator runs."""
    source = Source(items, _key(items, options))
    source.open()
    if options.linger is not None:
        coordinator.reader = driver.reader(source, coordinator.item_read)
    return Job(source, coordinator, driver)


def build_async(
    items: Iterable[Any] | AsyncIterable[Any],
    stages: tuple[Settings, Settings],
    options: JobOptions,
    results: list[Any] | None = None,
) -> AsyncJob:
    """The same for a consumer on an event loop."""
    driver = LoopDriver() if world.get() is ThreadDriver else cast("AsyncDriver", world.get()())
    coordinator = _coordinator(driver, stages, options, listeners_of(options, items), results, None)
    source = _source(items, _key(items, options))
    coordinator.reader = driver.reader(source, coordinator.item_read)
    return AsyncJob(source, coordinator, driver)


def _key(items: object, options: JobOptions) -> Key:
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
    stages: tuple[Settings, Settings],
    options: JobOptions,
    listeners: Listeners,
    results: list[Any] | None,
    recording: Part | None,
) -> Coordinator:
    """Puts the parts together."""
    first, second = stages
    batch_size = first.batch_size or 1
    # The batches of one or two workers vary too much: stage two would run dry (tests/scheduling).
    batches = max(TOKEN_WORKERS, first.workers)
    bound = max(LEAST_IN_PROGRESS, 2 * (batches * batch_size + second.workers * (second.batch_size or 1)))
    window = options.window or max(LEAST_WINDOW, 10 * bound)
    if window < batch_size:
        raise ValueError(
            f"window is {window}; expected at least the batch_size of {batch_size}: whole batches are read"
        )
    limit, refreshing = FailureLimit.of(options, many=first.many), None
    if repeats(first.retry) and repeats(second.retry):  # else no item's calls may be made twice
        refreshing = Refreshing.of(options)
    arguments = arguments_of(first, second)
    # Where calls are made of what waits when a worker is free, none is handed over before.
    lines = (
        line_of(first, arguments[0], listeners, ahead=refreshing is None),
        line_of(
            second,
            arguments[1],
            listeners,
            ahead=second.batch_size is None and not (first.many and refreshing),
            refreshing=refreshing,
        ),
    )
    lines[0].pace.partner, lines[1].pace.partner = lines[1].pace, lines[0].pace
    twins = Twins.of(options)
    if options.journal is not None and twins is not None:
        journal = journal_of(options)
        identity = identity_of(journal, first.stage.fetch, second.stage.fetch, many=first.many)
        recording = Recording(recorder_for(journal, identity, twins.keys, many=first.many))
    handing = HandOver.of(options, results, forget=None if twins is None else twins.forget, many=first.many)
    coordinator = Coordinator(
        *lines,
        bound=bound,
        reading=Reading(batch_size, window, handing, options.linger),
        handing=handing,
        return_exceptions=options.return_exceptions,
        last_first=first.stage.executor is not None
        and first.stage.executor is second.stage.executor
        and not first.stage.awaits,
        timeout=options.timeout,
    )
    for line in lines:
        if line.refusals is not None:
            line.refusals.attach(coordinator, line)
    if first.many:
        Many(coordinator)
    parts_of(
        coordinator,
        listeners,
        began(stages, window, listeners.total),
        twins,
        recording,
        limit,
        refreshing,
    )
    ended = coordinator.tokens_ended, coordinator.results_ended
    for one, other, line, argument, hear in zip(stages, stages[::-1], lines, arguments, ended, strict=True):
        line.runner = driver.runner(work_of(one, argument, hear, executor_of(one, other, driver), listeners))
    return coordinator


def parts_of(
    job: Coordinator,
    listeners: Listeners,
    begins: Callable[[float], JobBegan],
    twins: Twins | None,
    recording: Part | None,
    limit: FailureLimit | None,
    refreshing: Refreshing | None = None,
) -> None:
    """Gives a job its parts, in the order in which they hear of what happens.

    Of items that are read the equal ones are sorted out first, so that the journal is asked once for each.
    What is done is recorded before anybody is told of it; observers hear of an outcome before the one failure
    too many ends the job, and equal items have theirs last, when the first one has been counted.
    """
    if twins is not None:
        twins.sorts_out(job)
    if recording is not None:
        recording.attach(job)
    Telling(job, listeners, begins)
    if limit is not None:
        limit.attach(job)
    if twins is not None:
        twins.hands_over(job)
    if refreshing is not None:
        refreshing.attach(job)
