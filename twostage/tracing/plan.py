"""`python -m twostage plan TRACE`: what a job will take, from the trace of a trial run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from twostage.tracing.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

NUMBERS = ("items", "token-workers", "result-workers", "batch-size")
RATES = ("token-rate", "rate")
ALL = (1, 10, 100)  # times as many items as the trial had, if it is not said how many


def main(argv: Sequence[str]) -> int:
    """Prints the plan, or raises `SystemExit` with what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m twostage plan",
        description="Tells what a job will take: its time and the API's calls, from a trial run's trace.",
        epilog="trace.save(path) writes such a file. Settings that are not given are the trial's.",
    )
    parser.add_argument("trace", metavar="TRACE", help="the file that Trace.save has written")
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, metavar="N")
    for name in RATES:
        parser.add_argument(f"--{name}", type=float, metavar="R", help="calls a second that may begin")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        print("\n".join(plan(Trace.load(given.pop("trace")), **given)))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    return 0


def plan(trace: Trace, items: int | None = None, **changes: Any) -> list[str]:  # noqa: ANN401 - of `Changes`
    """Returns the plan's lines: for so many items, or for more and more of them."""
    done = trace.summary().done
    numbers = [items] if items is not None else [done * times for times in ALL]
    width = max(len(f"{number:,}") for number in numbers)
    lines = [f"{number:>{width},} items: {trace.foretell(number, **changes)}" for number in numbers]
    return [f"from {len(trace):,} attempts for {done:,} items in {trace.seconds:.1f} s:", *lines]
