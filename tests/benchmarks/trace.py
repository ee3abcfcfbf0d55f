"""What a trace costs an attempt: jobs whose calls do nothing, with one and without, in turns.

python tests/benchmarks/trace.py
"""

from __future__ import annotations

import time
from typing import Any

from twostage import Observer, Trace, run_two_stage

ITEMS = 50_000
RUNS = 15


class Counting(Observer):
    """The least that an observer of attempts does."""

    def __init__(self) -> None:
        self.attempts = 0

    def attempt_ended(self, attempt: object) -> None:
        self.attempts += 1


def seconds(**settings: Any) -> float:  # noqa: ANN401 - of a job
    begin = time.process_time()
    run_two_stage(range(ITEMS), list, abs, batch_size=100, **settings)
    return time.process_time() - begin


def main() -> None:
    attempts = ITEMS + ITEMS // 100
    without, with_trace, counted = [], [], []
    for _ in range(RUNS):
        without.append(seconds())
        with_trace.append(seconds(trace=Trace()))
        counted.append(seconds(observer=Counting()))
    base = min(without)
    print(f"without: {base / attempts * 1e6:.2f} us an attempt, the fastest of {RUNS} runs")
    for name, times in (("a trace", with_trace), ("an observer that counts", counted)):
        more = (min(times) - base) / attempts * 1e6
        print(f"{name}: {more:.2f} us an attempt more, {min(times) / base:.2f} of the time")


if __name__ == "__main__":
    main()
