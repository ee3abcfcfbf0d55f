"""Figures of a trace: what each stage did, which of them limits the job, and what to change."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from twostage.base.words import STAGES
from twostage.tracing.timeline import area, covered, tokens_waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twostage.observing.record import Attempts, Record

__all__ = ["StageSummary", "Summary", "efficiency", "summary"]

BUSY = 0.8  # share of the workers' time above which they are what limits the job
MUCH = 0.2  # share of the time, or of the attempts, that is worth a word
AT_RATE = 0.9


class StageSummary(NamedTuple):
    """Figures of one stage. Times are in seconds.

    Attributes:
        stage: 1 or 2.
        workers: How many calls may run at once.
        calls: How many calls began.
        attempts: How many attempts they took.
        retries: How many of those were not a call's first.
        failures: How many attempts failed, by type and status.
        p50: The latency that half of the attempts with an answer were not above.
        p90: That of nine in ten.
        p99: That of 99 in 100.
        longest: The longest.
        waited: How long a call waited for a worker, on average.
        utilisation: The share of the workers' time in which they had an attempt.
        throughput: Answers a second: tokens, or results.
        held_back: For how long the stage paused, or waited for an API that was down.
    """

    stage: int
    workers: int
    calls: int
    attempts: int
    retries: int
    failures: Counter[str]
    p50: float
    p90: float
    p99: float
    longest: float
    waited: float
    utilisation: float
    throughput: float
    held_back: float


class Summary(NamedTuple):
    """Figures of a job; as a text, a table of them.

    Attributes:
        seconds: How long it took.
        done: How many items have their outcome.
        failed: How many of them are failures.
        stages: Figures of both.
        tokens_waiting: How many tokens waited for a worker, on average over the job's time.
        limit: What limits the job: "stage one", "stage two", or what else.
        advice: What to change, in a sentence.
        left_out: How many attempts the trace did not record.
    """

    seconds: float
    done: int
    failed: int
    stages: tuple[StageSummary, StageSummary]
    tokens_waiting: float
    limit: str
    advice: str
    left_out: int

    def __str__(self) -> str:
        rows = [("", "stage one", "stage two")]
        for name, show in ROWS:
            rows.append((name, show(self.stages[0]), show(self.stages[1])))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows
        ]
        for one in self.stages:
            for name, number in one.failures.most_common():
                lines.append(f"{STAGES[one.stage]} failed {number:,} times with {name}")
        if self.left_out:
            lines.append(f"{self.left_out:,} attempts were not recorded")
        failed = f", {self.failed:,} of them failed" if self.failed else ""
        lines.append(f"{self.done:,} items in {self.seconds:.2f} s{failed}")
        return "\n".join([*lines, "", f"limit: {self.limit}", self.advice])


ROWS: Sequence[tuple[str, Callable[[StageSummary], str]]] = (
    ("calls", lambda one: f"{one.calls:,}"),
    ("attempts", lambda one: f"{one.attempts:,}"),
    ("retries", lambda one: f"{one.retries:,}"),
    ("latency p50", lambda one: _duration(one.p50)),
    ("latency p90", lambda one: _duration(one.p90)),
    ("latency p99", lambda one: _duration(one.p99)),
    ("latency max", lambda one: _duration(one.longest)),
    ("wait for a worker", lambda one: _duration(one.waited)),
    ("workers", lambda one: f"{one.workers:,}"),
    ("busy", lambda one: f"{one.utilisation:.0%}"),
    ("answers a second", lambda one: f"{one.throughput:,.1f}"),
    ("held back", lambda one: _duration(one.held_back)),
)


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.1f} ms"


def summary(trace: Record) -> Summary:
    """Returns the figures of a trace."""
    trace.begun  # noqa: B018 - it says so if there is none
    end = trace.end
    assert end is not None  # noqa: S101 - for the type checker
    if not len(trace):
        raise ValueError("the trace has no attempts: nothing was asked for")
    attempts = trace.stage(1), trace.stage(2)
    seconds = max(end.seconds, *(max(one.ended, default=0.0) for one in attempts))
    first, second = (_stage(trace, stage, one, seconds) for stage, one in enumerate(attempts, 1))
    waiting = area(tokens_waiting(*attempts), seconds) / seconds if seconds else 0.0
    limit, advice = next(_limits(trace, (first, second), waiting, seconds))
    return Summary(end.seconds, end.done, end.failed, (first, second), waiting, limit, advice, trace.left_out)


def _stage(trace: Record, stage: int, attempts: Attempts, seconds: float) -> StageSummary:
    workers = trace.begun.stages[stage - 1].workers
    names = list(map(str, trace.endings))
    spans = list(zip(attempts.began, attempts.ended, attempts.ending, strict=True))
    latencies = sorted(ended - began for began, ended, ending in spans if not ending)
    failures = Counter(names[ending] for ending in attempts.ending if ending)
    # An attempt that a limit of the user's has held back has used none.
    calls = sum(
        number == 1 and names[ending] != "Throttled"
        for number, ending in zip(attempts.number, attempts.ending, strict=True)
    )
    waits = [began - handed for handed, began in zip(attempts.handed_over, attempts.began, strict=True)]
    busy = sum(ended - began for began, ended, _ in spans)
    return StageSummary(
        stage,
        workers,
        calls,
        len(spans),
        len(spans) - calls,
        failures,
        _quantile(latencies, 0.5),
        _quantile(latencies, 0.9),
        _quantile(latencies, 0.99),
        _quantile(latencies, 1),
        sum(waits) / len(waits) if waits else 0.0,
        busy / (workers * seconds) if seconds else 0.0,
        sum(attempts.answers) / seconds if seconds else 0.0,
        covered([(since, until) for since, until, _ in trace.pauses(stage)]),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the smallest of the values that so great a share of them is not above."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def _limits(
    trace: Record, stages: tuple[StageSummary, StageSummary], waiting: float, seconds: float
) -> Iterator[tuple[str, str]]:
    """Gives what limits the job, the first of it most of all, each with what to do about that."""
    held = max(stages, key=lambda one: one.held_back)
    name = STAGES[held.stage]
    if held.held_back > MUCH * seconds:
        share = f"{held.held_back / seconds:.0%} of the time"
        if any(why == "down" for *_, why in trace.pauses(held.stage)):
            yield f"the API of {name}", f"{name} waited {share} for an API that did not answer"
        yield (
            f"the API of {name}",
            f"{name} paused {share}, as the API asked: give it a rate that the API bears",
        )
    for one, settings in zip(stages, trace.begun.stages, strict=True):
        allowed = min((limit / per for limit, per in settings.rates), default=math.inf)
        begun = one.attempts / seconds if seconds else 0.0
        if begun >= AT_RATE * allowed and not settings.weighs:
            name = STAGES[one.stage]
            advice = f"{name} began {begun:.1f} calls a second, and its rate allows {allowed:g}"
            yield (
                f"the rate of {name}",
                f"{advice}: a higher one, or larger batches, would make the job faster",
            )
    first, second = stages
    ones, twos = f"{first.utilisation:.0%}", f"{second.utilisation:.0%}"
    if second.utilisation >= max(BUSY, first.utilisation):
        advice = f"stage two's workers were busy {twos} of the time while {waiting:,.0f} tokens waited"
        yield STAGES[2], f"{advice}: raise result_workers"
    if first.utilisation >= BUSY:
        batches = trace.begun.stages[0].batch_size is not None
        advice = f"stage one's workers were busy {ones} of the time, stage two's {twos}"
        yield STAGES[1], f"{advice}: raise token_workers{' or batch_size' if batches else ', or use batches'}"
    attempts, retries = first.attempts + second.attempts, first.retries + second.retries
    if retries > MUCH * attempts:
        yield (
            "failures",
            f"{retries:,} of {attempts:,} attempts were retries, that wait first: see what fails",
        )
    advice = (
        f"the workers were busy {ones} and {twos} of the time: the source or the consumer kept them waiting"
    )
    yield "neither stage", f"{advice}, or the job is too short to fill them"


def efficiency(trace: Record) -> float:
    """Returns the least time that a trace's attempts take in any schedule, by the time that they took."""
    begun = trace.begun
    if trace.left_out:
        raise ValueError(f"the trace has not all attempts: {trace.left_out:,} were left out")
    if not len(trace):
        raise ValueError("the trace has no attempts: nothing was asked for")
    least = []
    for stage in (1, 2):
        attempts, other = trace.stage(stage), trace.stage(3 - stage)
        busy = sum(_latencies(attempts)) / begun.stages[stage - 1].workers
        least.append(max(busy, max(_latencies(attempts), default=0.0)) + min(_latencies(other), default=0.0))
    return min(1.0, max(least) / trace.seconds) if trace.seconds else 1.0


def _latencies(attempts: Attempts) -> list[float]:
    return [ended - began for began, ended in zip(attempts.began, attempts.ended, strict=True)]
