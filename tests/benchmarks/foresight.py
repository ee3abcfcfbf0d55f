"""Whether a trace foretells what other settings take, and a trial what a job takes: over real sockets.

Each of 8 jobs runs against the demonstration's API with some settings, of which the trace foretells what
others take; with those others; and several times with the first ones for 50 items, as trials of the job. One
trial is chance: a band is to be right in 8 of 10 cases.

    python tests/benchmarks/foresight.py
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any, NamedTuple

from twostage import Stage, Trace, run_two_stage
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import Client

ITEMS = 1000
TRIAL = 50
TRIALS = 5
MEDIAN_BAR, WORST_BAR, INSIDE_BAR = 0.05, 0.12, 6 / 8


class Job(NamedTuple):
    """A job: how it is traced, and what is then changed."""

    name: str
    traced: dict[str, Any]
    changes: dict[str, Any]
    faults: dict[str, float] | None = None


BASE = {"batch_size": 10, "token_workers": 8, "result_workers": 16}
JOBS = [
    Job("more result workers", BASE, {"result_workers": 32}),
    Job("fewer result workers", {**BASE, "result_workers": 32}, {"result_workers": 20}),
    Job("more token workers", {**BASE, "token_workers": 4, "result_workers": 64}, {"token_workers": 10}),
    Job("fewer token workers", {**BASE, "result_workers": 64}, {"token_workers": 5}),
    Job(
        "one item a call",
        {"token_workers": 24, "result_workers": 16},
        {"token_workers": 64, "result_workers": 32},
    ),
    Job("a rate", BASE, {"rate": 60.0, "result_workers": 32}),
    Job("lost connections", BASE, {"result_workers": 32}, faults={"resets": 0.03}),
    Job("spikes", BASE, {"token_workers": 12, "result_workers": 28}, faults={"spikes": 0.01}),
]


def run(job: Job, items: int, seed: int, settings: dict[str, Any]) -> tuple[Trace, float]:
    """Runs a job; returns its trace and its time."""
    settings = dict(settings)
    batch_size, rate = settings.pop("batch_size", None), settings.pop("rate", None)
    trace = Trace()
    with (
        EmbeddedApi(token_latency=1.0, result_latency=0.4, faults=job.faults or {}, seed=seed) as api,
        Client(api.url) as client,
    ):
        fetch: Any = client.fetch_token if batch_size is None else client.fetch_tokens
        first: Any = Stage(fetch, batch_size=batch_size, workers=settings["token_workers"])
        second = Stage(client.fetch_result, workers=settings["result_workers"], rate=rate)
        begin = time.perf_counter()
        run_two_stage(range(items), first, second, trace=trace)
        return trace, time.perf_counter() - begin


def main() -> None:
    logging.getLogger("twostage").setLevel(logging.ERROR)
    errors, inside = [], 0
    for number, job in enumerate(JOBS):
        trace, _ = run(job, ITEMS, 3 * number, job.traced)
        _, seconds = run(job, ITEMS, 3 * number + 2, {**job.traced, **job.changes})
        foresight = trace.what_if(**job.changes)
        error = foresight.seconds / seconds - 1
        errors.append(abs(error))
        print(
            f"{job.name:20} took {seconds:5.2f} s, foretold {foresight.seconds:5.2f} ({error:+.1%})", end=""
        )
        print("; from trials", end="")
        for place in range(TRIALS):
            trial, _ = run(job, TRIAL, 3 * number + 1 + 100 * place, job.traced)
            planned = trial.foretell(ITEMS, **job.changes)
            low, high = planned.band
            is_inside = low <= seconds <= high
            inside += is_inside
            print(f" {low:.1f}-{high:.1f}{'' if is_inside else '!'}", end="", flush=True)
        print()
    middle, worst = statistics.median(errors), max(errors)
    print(
        f"error {middle:.1%} in the median (bar {MEDIAN_BAR:.0%}), {worst:.1%} at worst (bar {WORST_BAR:.0%})"
    )
    trials = len(JOBS) * TRIALS
    print(f"inside the band of {inside} of {trials} trials: {inside / trials:.0%} (bar {INSIDE_BAR:.0%})")


if __name__ == "__main__":
    main()
