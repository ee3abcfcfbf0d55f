"""The demonstration, `python -m twostage`: one job in four ways, against an HTTP API over real sockets."""

from __future__ import annotations

import argparse
import http.client
import logging
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from tenacity import Retrying, stop_after_attempt, wait_random_exponential

from twostage import run_two_stage
from twostage._embedded_api import MOST_IDS, ApiError, Client, EmbeddedApi, Result, result_of, token_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

SAMPLE = 100  # items of the plain loop: all of them would take longer than the rest together

DESCRIPTION = f"""
Runs one job in four ways and prints how long each takes: a plain loop, one thread pool, twostage without and
with batches. The job makes two calls for every item: the first returns its token, the second the token's
result. The API is an HTTP server on a free port of 127.0.0.1 that takes up to {MOST_IDS} items in a first
call. It takes up to 10 ms to answer a first call, up to 5 ms to answer a second one, and a share of the
attempts fails: by status 429, by status 503, or by ending the connection. All four ways retry what failed,
and their results are checked.
"""

EPILOG = """
The server lives in the same process as its callers, so local work counts for more here than in most jobs.
Nothing leaves this machine.
"""


class Row(NamedTuple):
    """What one way to run the job took; `calls` is what it needs if no attempt fails."""

    way: str
    seconds: float
    attempts: float
    calls: float

    def scaled(self, factor: float) -> Row:
        """Returns what `factor` times as many items would take."""
        return Row(self.way, *(factor * figure for figure in self[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration and returns 0, or raises `SystemExit` with what went wrong.

    Args:
        argv: The arguments of the command line; those of this process if not given.
    """
    options = parse(argv)
    print(
        f"{options.items:,} items, two calls each, to an HTTP API on 127.0.0.1: for a token in up to 10 ms,\n"
        f"for its result in up to 5 ms; {100 * options.faults:.3g} % of the attempts fail and are retried.\n"
    )
    print_table(run_all(options))
    print("\nAll results right, in order.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, or ends with a message that says what is wrong with one."""
    parser = argparse.ArgumentParser(prog="python -m twostage", description=DESCRIPTION, epilog=EPILOG)

    def add(name: str, kind: Callable[[str], float], default: float, text: str) -> None:
        metavar = "SHARE" if kind is share else "N"
        parser.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s)"
        )

    add("--items", whole_number(1), 1000, "items of the job")
    add("--batch-size", whole_number(1, MOST_IDS), 100, f"items of one first call, at most {MOST_IDS}")
    add("--token-workers", whole_number(1), 4, "first calls at once, in batches")
    add("--result-workers", whole_number(1), 32, "second calls at once, and threads of the pool")
    add("--faults", share, 0.02, "share of the attempts that fail, from 0 to below 1")
    add("--seed", whole_number(0), 7, "seed of the latencies and faults")
    return parser.parse_args(argv)


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Returns a converter for `argparse` that accepts whole numbers in this range."""
    expected = f"from {least} to {most}" if most < math.inf else f"of at least {least}"

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"expected a whole number {expected}, not {text!r}")
        return int(text)

    return convert


def share(text: str) -> float:
    """Converts a share for `argparse`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, not {text!r}")
    return value


def run_all(options: argparse.Namespace) -> list[Row]:
    """Runs the job in each of the ways, one after the other."""
    items = range(options.items)
    sample = items[:SAMPLE]
    loop = "plain loop" if sample == items else f"plain loop (measured on {SAMPLE} items, scaled)"
    pool = f"one thread pool, {options.result_workers} threads"
    unbatched = f"twostage, one item a call, {options.result_workers} + {options.result_workers} workers"
    size = options.batch_size
    batched = f"twostage, batches of {size}, {options.token_workers} + {options.result_workers} workers"
    return [
        measure(loop, plain_loop, sample, options).scaled(len(items) / len(sample)),
        measure(pool, thread_pool, items, options),
        measure(unbatched, one_item_a_call, items, options),
        measure(batched, in_batches, items, options, size),
    ]


def measure(
    name: str,
    way: Callable[[Client, Sequence[int], argparse.Namespace], list[Result]],
    items: Sequence[int],
    options: argparse.Namespace,
    batch_size: int = 1,
) -> Row:
    """Runs the job in one way, against an API of its own that draws as that of every other, and checks it."""
    with EmbeddedApi(faults=options.faults, seed=options.seed) as api, Client(api.url) as client:
        begin = time.perf_counter()
        try:
            results = way(client, items, options)
        except (ApiError, OSError, http.client.HTTPException) as error:
            raise SystemExit(f"{name}: a call failed for good ({error}); try a smaller --faults") from error
        seconds = time.perf_counter() - begin
    if results != [result_of(token_of(item)) for item in items]:
        raise SystemExit(f"{name}: wrong results, or not in the order of the items")
    calls = math.ceil(len(items) / batch_size) + len(items)
    return Row(name, seconds, api.attempts.total(), calls)


def plain_loop(client: Client, items: Sequence[int], _: argparse.Namespace) -> list[Result]:
    """One item after the other."""
    return list(map(both_calls(client), items))


def thread_pool(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[Result]:
    """Both calls of an item in one function, which a pool maps over the items."""
    with ThreadPoolExecutor(options.result_workers) as pool:
        return list(pool.map(both_calls(client), items))


def one_item_a_call(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[Result]:
    """The two stages without batches: the first has as many calls as the second, and gets as many workers."""
    workers = options.result_workers
    return run_two_stage(
        items, client.fetch_token, client.fetch_result, token_workers=workers, result_workers=workers
    )


def in_batches(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[Result]:
    """The two stages, the first in batches."""
    return run_two_stage(
        items,
        client.fetch_tokens,
        client.fetch_result,
        batch_size=options.batch_size,
        token_workers=options.token_workers,
        result_workers=options.result_workers,
    )


def both_calls(client: Client) -> Callable[[int], Result]:
    """Returns both in one function, with retries as they are commonly written: they sleep in the worker."""
    retrying = Retrying(
        wait=wait_random_exponential(multiplier=0.1, max=20), stop=stop_after_attempt(10), reraise=True
    )
    # Called, not as a decorator, which has one set of statistics for all threads and fails at times.
    return lambda item: retrying(client.fetch_result, retrying(client.fetch_token, item))


def print_table(rows: Sequence[Row]) -> None:
    """Prints the rows, each with its speed-up against the first."""
    width = max(len(row.way) for row in rows)
    print(f"{'':{width}}  seconds  attempts  retries  speed-up")
    for row in rows:
        speed_up = rows[0].seconds / row.seconds
        retries = row.attempts - row.calls
        print(
            f"{row.way:{width}}  {row.seconds:7.2f}  {row.attempts:8,.0f}  {retries:7,.0f}  {speed_up:7.1f}x"
        )


if __name__ == "__main__":
    # The faults are ordered and the table counts them: a warning for each would bury it.
    logging.getLogger("twostage").setLevel(logging.ERROR)
    sys.exit(main())
