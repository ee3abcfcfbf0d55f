"""Holds the jobs of many seeds against the contract, and prints the seeds of those that break it.

`python tests/seeds.py --seeds 10000`; `--first` goes on elsewhere, or looks at one again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from contract import check, drawn_plan


def failure(seed: int) -> str | None:
    """Returns what went wrong with a seed's job."""
    try:
        check(drawn_plan(seed))
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        return f"seed {seed}: {drawn_plan(seed)}\n{traceback.format_exc()}"
    return None


def main() -> int:
    """Returns 1 if a job broke the contract, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default: %(default)s)")
    arguments = parser.parse_args()
    began = time.monotonic()
    quiet = partial(logging.disable, logging.WARNING)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), quiet) as pool:
        seeds = range(arguments.first, arguments.first + arguments.seeds)
        failures = [found for found in pool.map(failure, seeds, chunksize=50) if found]
    print(*failures, sep="\n")
    print(f"{arguments.seeds:,} seeds, {len(failures)} failures, {time.monotonic() - began:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
