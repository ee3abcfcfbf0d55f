"""What a job would take with other settings, or more items: the same coordinator, on a trace's latencies."""

from __future__ import annotations

import logging
import math
import random
import statistics
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from tenacity import Retrying, retry_if_exception, stop_after_attempt

from twostage.base.checks import positive_int
from twostage.base.kinds import Classified, Kind, RemoteError
from twostage.base.words import STAGES
from twostage.pace.rates import Rate, rates_of
from twostage.run import iter_two_stage
from twostage.stage import Stage
from twostage.testing.virtual import VirtualTime, sleep
from twostage.tracing.timeline import covered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tenacity import RetryCallState

    from twostage.observing.events import StageSettings
    from twostage.observing.record import Record

__all__ = ["Changes", "Foresight", "what_if"]

RUNS = 11
LARGE = 2_000  # items of a run, at most: beyond them it goes on as in the middle of these
LEAST_ALIKE = 10  # attempts of a size, of which alone is drawn then
LEAST_OF_A_SIZE = 3  # of two sizes at least, to tell how the latency depends on it
HOPELESS = 0.9  # share of the attempts that are tried again
OFF = 0.03  # by which share the model is off in itself, over real sockets: tests/benchmarks/foresight.py
UNLIKE = 1.5  # times as long as in virtual time: then something else than the API took the time


class Changes(TypedDict, total=False):
    """Settings of a job that can be other than those of the traced one."""

    token_workers: int
    result_workers: int
    batch_size: int
    rate: float | Rate | None
    token_rate: float | Rate | None


class Foresight(NamedTuple):
    """What a job will take.

    Attributes:
        seconds: Its time, in the median.
        band: Between which times it will be in 8 of 10 cases, as far as the trace can tell.
        calls: How many requests the API gets, retries among them, in the median.
        calls_band: Between which numbers that will be.
    """

    seconds: float
    band: tuple[float, float]
    calls: int
    calls_band: tuple[int, int]

    def __str__(self) -> str:
        (least, most), (fewest, all_) = self.band, self.calls_band
        return (
            f"{self.seconds:,.1f} s ({least:,.1f} to {most:,.1f} s in 8 of 10 cases), "
            f"{self.calls:,} calls ({fewest:,} to {all_:,})"
        )


class DrawnError(RemoteError):
    """A failure that was recorded, and after how many seconds the call was tried again, if it was."""

    wait: float | None


@dataclass(slots=True)
class Recorded:
    """An attempt that was recorded.

    Attributes:
        latency: How long it took.
        size: How many it took.
        answered: The share of those that got an answer; tokens for an item, if it has many.
        error: The type, status and kind of its failure; an empty type for an answer.
        asked: The wait that the failure asks for.
        wait: After how many seconds it, or what was left of it, was tried again; `None`: it was not.
    """

    latency: float
    size: int
    answered: float
    error: tuple[str, int | None, str]
    asked: float
    wait: float | None


def what_if(trace: Record, *, items: int | None = None, **changes: Any) -> Foresight:  # noqa: ANN401 - of `Changes`
    """Returns what a job will take with other settings, or more items, than the traced one."""
    before = trace.begun.stages
    after = _changed(before, cast("Changes", changes))
    records = _recorded(trace, 1), _recorded(trace, 2)
    for stage, (was, is_to_be, recorded) in enumerate(zip(before, after, records, strict=True), 1):
        _check(STAGES[stage], was, is_to_be, recorded)
    assert trace.end is not None  # noqa: S101 - for the type checker
    job = _Job(records, many=trace.begun.many)
    done = trace.end.done
    same = sorted(job.run(before, done, seed).seconds for seed in range(3))[1]
    # The pauses of one run are chance, and in another at other times, or not at all.
    held_back = covered([(since, until) for stage in (1, 2) for since, until, _ in trace.pauses(stage)])
    if trace.seconds - held_back > UNLIKE * same + 0.2:
        raise ValueError(
            f"the job took {trace.seconds:.1f} s and its calls explain {same:.1f} s: the source or the "
            "consumer took the rest, of which the trace does not speak"
        )
    items = done if items is None else positive_int(items, "items")
    runs = [job.run(after, items, seed) for seed in range(RUNS)]
    seconds, calls = sorted(run.seconds for run in runs), sorted(run.calls for run in runs)
    low, middle, high = RUNS // 10, RUNS // 2, RUNS - 1 - RUNS // 10
    band = (1 - OFF) * seconds[low], (1 + OFF) * seconds[high]
    return Foresight(seconds[middle], band, calls[middle], (calls[low], calls[high]))


def _changed(stages: tuple[StageSettings, StageSettings], changes: Changes) -> tuple[StageSettings, ...]:
    known = Changes.__annotations__
    for name in changes:
        if name not in known:
            raise TypeError(f"{name} can't be asked about; expected one of {', '.join(known)}")
    first, second = stages
    for name in ("token_workers", "result_workers", "batch_size"):
        if name in changes:
            positive_int(changes[name], name)  # type: ignore[literal-required] # one of those
    first = first._replace(workers=changes.get("token_workers", first.workers))
    second = second._replace(workers=changes.get("result_workers", second.workers))
    if "batch_size" in changes:
        if first.batch_size is None:
            raise ValueError("batch_size is asked about, and stage one took one item a call, not in a list")
        first = first._replace(batch_size=changes["batch_size"])
    if "token_rate" in changes:
        first = _rated(first, changes["token_rate"], "token_rate")
    if "rate" in changes:
        second = _rated(second, changes["rate"], "rate")
    return first, second


def _rated(stage: StageSettings, rate: float | Rate | None, name: str) -> StageSettings:
    rates = rates_of(rate, name)
    if any(one.cost is not None for one in rates):
        raise ValueError(f"{name} has a cost, of which the trace does not speak; expected a number of starts")
    return stage._replace(rates=tuple((one.limit, one.per) for one in rates), weighs=False)


def _recorded(trace: Record, stage: int) -> list[Recorded]:
    """Returns a stage's attempts; without those that a limit held back, or made while the API was down."""
    attempts, many = trace.stage(stage), trace.begun.many and stage == 1
    down = [(since, until) for since, until, why in trace.pauses(stage) if why == "down"]
    recorded = []
    for _, size, _, _, began, ended, answers, ending, asked, wait in zip(*attempts, strict=True):
        error = trace.endings[ending]
        if error.name == "Throttled" or any(since <= ended <= until for since, until in down):
            continue
        answered = answers / size if many else min(answers / size, 1.0)
        recorded.append(Recorded(ended - began, size, answered, error, asked, wait or None))
    return recorded


def _check(name: str, before: StageSettings, after: StageSettings, recorded: Sequence[Recorded]) -> None:
    """Checks that the trace can speak for a stage."""
    if not recorded:
        raise ValueError(f"{name} has no attempts that the trace could speak of")
    if before.weighs and after.weighs:
        raise ValueError(f"{name} has a rate with a cost, of which the trace does not speak")
    again = sum(one.wait is not None and bool(one.error[0]) for one in recorded)
    if again > HOPELESS * len(recorded):
        raise ValueError(
            f"{again} of {len(recorded)} attempts of {name} failed: the trace speaks of little else"
        )
    throttled = any(one.error[2] == Kind.THROTTLED.name for one in recorded)
    more = after.workers > before.workers or (before.rates and after.rates != before.rates)
    if throttled and more:
        raise ValueError(
            f"{name}'s API has asked to slow down: the trace can't tell what it does with more calls at once"
        )
    size = after.batch_size
    if size is not None and size != before.batch_size and not any(one.size == size for one in recorded):
        seen = _sizes(recorded)
        if len(seen) < 2:  # noqa: PLR2004 - a line
            raise ValueError(
                f"batch_size is {size}, the trace has {', '.join(map(str, seen)) or 'few of any size'}: "
                "expected a size that it has, or a trace with two of them"
            )


def _sizes(recorded: Sequence[Recorded]) -> list[int]:
    """Returns the sizes that answered attempts had often enough to tell how long they take."""
    latencies = defaultdict(list)
    for one in recorded:
        if not one.error[0]:
            latencies[one.size].append(one.latency)
    return sorted(size for size, those in latencies.items() if len(those) >= LEAST_OF_A_SIZE)


class _Draws:
    """Draws attempts of a stage.

    Args:
        recorded: What is drawn from: a sample of what was recorded.
        many: Whether it gives lists of tokens.
        speed: What latencies are multiplied by.
    """

    def __init__(self, recorded: Sequence[Recorded], *, many: bool, speed: float) -> None:
        self.made = 0
        self._recorded = recorded
        self._speed = speed
        self._many = many
        self._by_size: dict[int, list[Recorded]] = defaultdict(list)
        for one in recorded:
            self._by_size[one.size].append(one)
        self._base, self._slope = _line(recorded)

    def attempt(self, rng: random.Random, size: int) -> list[Any]:
        """Makes an attempt for so many; returns their answers.

        Raises:
            DrawnError: It fails.
        """
        self.made += 1
        alike = self._by_size.get(size, ())
        one = rng.choice(alike if len(alike) >= LEAST_ALIKE else self._recorded)
        sleep(self._speed * one.latency * self._expected(size) / self._expected(one.size))
        if one.error[0]:
            raise _error(one)
        if self._many:
            return [["token"] * _rounded(one.answered, rng) for _ in range(size)]
        lacking = _rounded(size * (1 - one.answered), rng)
        return [_error(one)] * lacking + ["token"] * (size - lacking)

    def _expected(self, size: int) -> float:
        return self._base + self._slope * size


def _line(recorded: Sequence[Recorded]) -> tuple[float, float]:
    """Returns the least squares of answers' latencies over their sizes, as base and slope; else 1 and 0."""
    sizes = set(_sizes(recorded))
    points = [(one.size, one.latency) for one in recorded if not one.error[0] and one.size in sizes]
    if len(sizes) < 2:  # noqa: PLR2004 - a line
        return 1.0, 0.0
    at, latencies = zip(*points, strict=True)
    x, y = statistics.fmean(at), statistics.fmean(latencies)
    slope = statistics.linear_regression(at, latencies).slope
    slope = min(max(slope, 0.0), y / x)
    return (y - slope * x, slope) if y else (1.0, 0.0)


def _rounded(number: float, rng: random.Random) -> int:
    """Returns one of the two integers around a number, so that it is their mean."""
    return int(number + rng.random())


def _error(one: Recorded) -> DrawnError:
    name, status, kind = one.error
    # A part of an answer has no failure of its own in a trace: whether it is tried again is known.
    known = Kind[kind] if kind else Kind.LASTING if one.wait is None else Kind.PASSING
    error = DrawnError(
        name or "Exception", "", status, Classified(known, late=False, retry_after=one.asked or None)
    )
    error.wait = one.wait
    return error


def _doubt(latencies: Sequence[float]) -> float:
    """Returns how much less sure a mean of few values is than samples of them say, as a share of it.

    The mean of samples (the bootstrap) has (n - 1) / n of the variance that is estimated for the mean, and
    Student's t, which knows that the variance is an estimate, (n - 1) / (n - 3) of it.
    """
    n, mean = len(latencies), statistics.fmean(latencies)
    if n < 2 or not mean:  # noqa: PLR2004 - for a variance
        return 0.5 if mean else 0.0
    few = max(n, 4)
    missing = (few - 1) / (few - 3) - (n - 1) / n
    return math.sqrt(missing * statistics.variance(latencies) / n) / mean


class _Run(NamedTuple):
    seconds: float
    calls: int


class _Job:
    """Runs a traced job again, with settings and a number of items."""

    def __init__(self, records: tuple[list[Recorded], list[Recorded]], *, many: bool) -> None:
        self._records = records
        self._many = many

    def run(self, stages: Sequence[StageSettings], items: int, seed: int) -> _Run:
        """Runs it once, on a sample of what was recorded: that is as likely as what was."""
        rng = random.Random(seed)  # noqa: S311 - no secret
        first, second = (
            _Draws(
                rng.choices(one, k=len(one)),
                many=self._many and not place,
                speed=math.exp(rng.gauss(0.0, _doubt([each.latency for each in one]))),
            )
            for place, one in enumerate(self._records)
        )
        large = min(items, max(LARGE, 10 * stages[0].workers * (stages[0].batch_size or 1)))
        with _silence(), VirtualTime(seed) as virtual:
            times: list[float] = []
            iterate: Any = iter_two_stage  # which stages these are is known as it runs
            with iterate(
                range(large),
                _stage(stages[0], first, rng),
                _stage(stages[1], second, rng),
                return_exceptions=True,
                many=self._many,
            ) as outcomes:
                times += (virtual.now for _ in outcomes)
            seconds = virtual.now
        # It goes on as in its middle half: the beginning and the end are there once.
        more = 0.0
        if items > large:
            quarter = large // 4
            more = (items - large) * (times[3 * quarter] - times[quarter]) / (2 * quarter)
        return _Run(seconds + more, round((first.made + second.made) * items / large))


def _stage(settings: StageSettings, draws: _Draws, rng: random.Random) -> Stage[Any, Any]:
    def in_batches(arguments: list[Any]) -> list[Any]:
        return draws.attempt(rng, len(arguments))

    def one_by_one(_: object) -> Any:  # noqa: ANN401 - a token or a result
        (answer,) = draws.attempt(rng, 1)
        return answer

    return Stage(
        one_by_one if settings.batch_size is None else in_batches,
        batch_size=settings.batch_size,
        workers=settings.workers,
        retry=Retrying(
            retry=retry_if_exception(_is_tried_again), wait=_wait_of, stop=stop_after_attempt(1_000_000)
        ),
        rate=[Rate(limit, per=per) for limit, per in settings.rates],
        pause=settings.pause,
        adaptive=settings.adaptive,
        patience=None,
        bisect=False,
    )


def _is_tried_again(error: BaseException) -> bool:
    return isinstance(error, DrawnError) and error.wait is not None


def _wait_of(state: RetryCallState) -> float:
    error = None if state.outcome is None else state.outcome.exception()
    return error.wait if isinstance(error, DrawnError) and error.wait is not None else 0.0


@contextmanager
def _silence() -> Iterator[None]:
    """Has nothing in the log that happens in this thread: it is none of a real job."""
    mine = threading.get_ident()
    log = logging.getLogger("twostage")

    def others_alone(record: logging.LogRecord) -> bool:
        return record.thread != mine

    log.addFilter(others_alone)
    try:
        yield
    finally:
        log.removeFilter(others_alone)
