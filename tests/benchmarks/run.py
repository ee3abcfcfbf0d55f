"""Runs the benchmarks, or those named, and prints each figure beside the bar that it has to meet."""

from __future__ import annotations

import argparse
import platform
import sys

import batched
import origin
import overhead
import streaming

BENCHMARKS = {
    "origin": origin,
    "batched": batched,
    "overhead": overhead,
    "streaming": streaming,
}


def main() -> int:
    """Returns 1 if a bar is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        choices=[*BENCHMARKS, "all"],
        default="all",
        help=f"{', '.join(BENCHMARKS)} or all (default: all)",
    )
    names = parser.parse_args().names
    if "all" in names:
        names = list(BENCHMARKS)

    print(f"Python {platform.python_version()}; each figure from medians of runs in turns\n")
    print(f"{'':10} {'what':28} {'measured':>8}  {'bar':>7}")
    missed = False
    for name in names:
        for found in BENCHMARKS[name].measure():
            missed |= not found.met
            print(
                f"{name:10} {found.what:28} {found.measured:8.3f}  {found.must_be} {found.bar:<5}"
                f" {'met' if found.met else 'MISSED':6}  {found.remark}",
                flush=True,
            )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
