"""A trace as Chrome's trace events, which https://ui.perfetto.dev opens.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from twostage.base.words import STAGES
from twostage.tracing.timeline import calls_running, lanes, tokens_waiting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twostage.observing.record import Record

__all__ = ["events_of"]

WHY = {"paused": "paused by the API", "limited": "paused by a limit", "down": "API down"}


def events_of(trace: Record) -> dict[str, Any]:
    """Returns a trace's events, as they stand in a file."""
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(trace))}


def _events(trace: Record) -> Iterator[dict[str, Any]]:
    ids = count(1)
    for stage, settings in enumerate(trace.begun.stages, 1):
        attempts = trace.stage(stage)
        lane_of = lanes(attempts)
        yield _named("process_name", stage, 0, f"{STAGES[stage]}: {settings.function}")
        for lane in sorted(set(lane_of)):
            yield _named("thread_name", stage, lane + 1, f"worker {lane + 1}")
        for place, lane in enumerate(lane_of):
            ending = str(trace.endings[attempts.ending[place]])
            number, size = attempts.number[place], attempts.size[place]
            began, index = attempts.began[place], attempts.item_index[place]
            what = f"item {index}" if size == 1 else f"{size} from item {index}"
            arguments = {"attempt": number, "size": size, "answers": attempts.answers[place]}
            yield {
                "ph": "X",
                "pid": stage,
                "tid": lane + 1,
                "ts": _micro(began),
                "dur": _micro(attempts.ended[place] - began),
                "name": f"{what}: {ending}" if ending else what,
                "cat": "failed" if ending else "retried" if number > 1 else "answered",
                "args": {**arguments, "ending": ending} if ending else arguments,
            }
            yield from _span(stage, next(ids), "wait for a worker", attempts.handed_over[place], began)
        for since, until in trace.retries(stage):
            yield from _span(stage, next(ids), "wait for a retry", since, until)
        for since, until, why in trace.pauses(stage):
            yield from _span(stage, next(ids), WHY[why], since, until)
        for time, running in calls_running(attempts):
            yield _counted(stage, "calls running", time, running)
    for time, waiting in tokens_waiting(trace.stage(1), trace.stage(2)):
        yield _counted(2, "tokens waiting", time, waiting)


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}


def _span(process: int, number: int, name: str, since: float, until: float) -> Iterator[dict[str, Any]]:
    if until > since:
        common = {"pid": process, "tid": 0, "cat": name, "name": name, "id": number}
        yield {"ph": "b", "ts": _micro(since), **common}
        yield {"ph": "e", "ts": _micro(until), **common}


def _counted(process: int, name: str, time: float, number: int) -> dict[str, Any]:
    return {"ph": "C", "pid": process, "tid": 0, "ts": _micro(time), "name": name, "args": {name: number}}
