"""The demonstration: one job in four ways, against an HTTP API over real sockets."""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import Retrying, stop_after_attempt, wait_random_exponential

from twostage import MissingToken, Trace, run_two_stage
from twostage.demo import ways
from twostage.demo.answers import (
    FAULTS,
    LASTING,
    MOST_IDS,
    ApiError,
    Faults,
    Item,
    Result,
    orders_of,
    result_of,
    token_of,
)
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import TIMEOUT, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["main"]

SAMPLE = 100  # items of the plain loop: all of them would take longer than the rest together
GIVE_UP = 0.5  # seconds after which a client ends a request, if some hang

DESCRIPTION = f"""
Runs one job in four ways and prints how long each takes: a plain loop, one thread
pool, twostage without and with batches. The job makes two calls for every item: the
first returns its token, the second the token's result. The API is an HTTP server on a
free port of 127.0.0.1 that takes up to {MOST_IDS} items in a first call. It takes up to 10 ms
to answer a first call, up to 5 ms to answer a second one, and a share of the attempts
fails: by status 429, by status 503, or by ending the connection. All four ways retry
what failed, and their results are checked.
"""

EPILOG = f"""
"python -m twostage journal FILE" tells what a job's journal holds, and
"python -m twostage plan TRACE" what a job will take, from a trial run's trace.

faults by name, each with its share, from 0 to below 1:
{"".join(f"  {name:13}{what}{chr(10)}" for name, what in FAULTS.items())}
With other faults than errors the four ways are twostage's: one item a call, tokens by
key, results by key too, and orders, of which an item has none to three.

The server lives in the same process as its callers, so local work counts for more here
than in most jobs. Nothing leaves this machine.
"""

COLUMNS: Final = ("seconds", "attempts", "retries", "speed-up")
COLUMNS_OF_FAULTS: Final = ("seconds", "attempts", "extra")


class Row(NamedTuple):
    """What one way to run the job took; `calls` is what it needs if no attempt fails."""

    way: str
    seconds: float
    attempts: float
    calls: float

    def scaled(self, factor: float) -> Row:
        """Returns what `factor` times as many items would take."""
        return Row(self.way, *(factor * figure for figure in self[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs the demonstration and returns 0, or raises `SystemExit` with what went wrong."""
    options = parse(argv)
    options.trace = Trace()
    options.progress = importlib.util.find_spec("tqdm") is not None
    intro = (
        f"{options.items:,} items, two calls each, to an HTTP API on 127.0.0.1: for a token in up to 10 ms,\n"
        "for its result in up to 5 ms; "
    )
    if only_errors(options.faults):
        share = options.faults.get("errors", 0)
        print(f"{intro}{100 * share:.3g} % of the attempts fail and are retried.\n")
        print_table(run_all(options), COLUMNS)
        print("\nAll results right, in order. The last way, as its trace has it:\n")
    else:
        shares = ", ".join(f"{name} {100 * share:.3g} %" for name, share in options.faults.items())
        print(f"{intro}faults by share:\n{shares}.")
        print("A plain loop and a thread pool, as they are commonly written, do not survive these.\n")
        print_table(run_all_with_faults(options), COLUMNS_OF_FAULTS)
        print("\nExtra are the attempts beyond one for each batch and each token that there is.")
        print(f"All outcomes right, in order: {counted_outcomes(options)}.")
        print("The last way, as its trace has it:\n")
    show(options.trace, options)
    return 0


def show(trace: Trace, options: argparse.Namespace) -> None:
    """Prints what a trace says, and writes what is asked for."""
    print(trace)
    print(f"The least time for what the API did is {trace.efficiency():.0%} of the time it took.")
    writers: dict[str, Callable[[str], object]] = {
        "plot": trace.plot,
        "perfetto": trace.to_perfetto,
        "trace_file": trace.save,
    }
    for option, write in writers.items():
        path = getattr(options, option)
        if path is not None:
            try:
                write(path)
            except (ImportError, OSError, ValueError) as error:
                raise SystemExit(f"--{option.partition('_')[0]}: {error}") from error
            print(f"{path} is written.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options, or ends with a message that says what is wrong with one."""
    parser = argparse.ArgumentParser(prog="python -m twostage", description=DESCRIPTION, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the epilog has a table

    def add(name: str, kind: Callable[[str], object], default: object, text: str) -> None:
        metavar = "FAULTS" if kind is faults else "N"
        parser.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s)"
        )

    add("--items", whole_number(1), 1000, "items of the job")
    add("--batch-size", whole_number(1, MOST_IDS), 100, f"items of one first call, at most {MOST_IDS}")
    add("--token-workers", whole_number(1), 4, "first calls at once, in batches")
    add("--result-workers", whole_number(1), 32, "second calls at once, and threads of the pool")
    add(
        "--faults",
        faults,
        "0.02",
        "share of the attempts that fail, from 0 to below 1, or shares by name: errors=0.02,missing=0.01",
    )
    add("--seed", whole_number(0), 7, "seed of the latencies and faults")
    for name, what in (
        ("--plot", "a picture of the last way, as PNG, SVG or PDF (needs matplotlib)"),
        ("--perfetto", "its events, for https://ui.perfetto.dev"),
        ("--trace", 'its trace, for "python -m twostage plan FILE"'),
    ):
        dest = "trace_file" if name == "--trace" else None
        parser.add_argument(name, metavar="FILE", dest=dest, help=f"write {what}")
    return parser.parse_args(argv)


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Returns a converter for `argparse` that accepts whole numbers in this range."""
    expected = f"from {least} to {most}" if most < math.inf else f"of at least {least}"

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"expected a whole number {expected}, not {text!r}")
        return int(text)

    return convert


def faults(text: str) -> dict[str, float]:
    """Converts the faults for `argparse`, a share of errors or shares by name."""
    if "=" not in text:
        return {"errors": share_of(text)}
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if name not in FAULTS:
            raise argparse.ArgumentTypeError(f"no fault is called {name!r}; there are {', '.join(FAULTS)}")
        shares[name] = share_of(share)
    return shares


def only_errors(shares: Mapping[str, float]) -> bool:
    """Whether retries alone are enough, which each of the ways makes."""
    return not any(share for name, share in shares.items() if name != "errors")


def share_of(text: str) -> float:
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


def run_all_with_faults(options: argparse.Namespace) -> list[Row]:
    """Runs the job in each of the ways of twostage, one after the other."""
    items, size = range(options.items), options.batch_size
    alone = f"one item a call, {options.result_workers} + {options.result_workers} workers"
    workers = f"{options.token_workers} + {options.result_workers} workers"
    return [
        measure(alone, ways.one_item_a_call, items, options),
        measure(f"tokens by key, batches of {size}, {workers}", ways.by_key, items, options, size),
        measure(
            f"results by key too, batches of {size} and {size}, {workers}",
            *(ways.both_by_key, items, options, size),
            result_batch_size=size,
        ),
        measure(
            f"orders by key, batches of {size}, {workers}",
            ways.orders_by_key,
            items,
            options,
            size,
            many=True,
        ),
    ]


def measure(
    name: str,
    way: Callable[[Client, Sequence[int], argparse.Namespace], list[Any]],
    items: Sequence[int],
    options: argparse.Namespace,
    batch_size: int = 1,
    *,
    result_batch_size: int = 1,
    many: bool = False,
) -> Row:
    """Runs the job in one way, against an API of its own that draws as that of every other, and checks it."""
    ordered = Faults(options.faults, seed=options.seed)
    right = [right_outcome(ordered, item, many=many) for item in items]
    tokens = sum(
        len(found) if isinstance(found, list) else 1 for found in right if not isinstance(found, int)
    )
    calls = math.ceil(len(items) / batch_size) + math.ceil(tokens / result_batch_size)
    timeout = GIVE_UP if options.faults.get("hangs") else TIMEOUT
    with (
        EmbeddedApi(faults=options.faults, seed=options.seed, outage_after=calls // 2) as api,
        Client(api.url, timeout) as client,
    ):
        begin = time.perf_counter()
        try:
            results = way(client, items, options)
        except (ApiError, OSError, http.client.HTTPException) as error:
            raise SystemExit(f"{name}: {failed_for_good(error)}") from error
        seconds = time.perf_counter() - begin
    outcomes = list(map(outcome_of, results))
    if outcomes != right:
        pairs = zip(results, outcomes, right, strict=False)
        errors = [result for result, *pair in pairs if isinstance(result, Exception) and pair[0] != pair[1]]
        what = failed_for_good(errors[0]) if errors else "wrong results, or not in the order of the items"
        raise SystemExit(f"{name}: {what}")
    return Row(name, seconds, api.attempts.total(), calls)


def failed_for_good(error: Exception) -> str:
    """Returns what to say of a call that used up its attempts."""
    return f"a call failed for good ({error}); try a smaller --faults"


def right_outcome(ordered: Faults, item: Item, *, many: bool) -> Result | list[Result] | int:
    """Returns an item's result, a list of them if it has many, or the status of what keeps it from that."""
    status = ordered.lasting_status(item)
    if status is not None:
        return status
    return [result_of(token) for token in orders_of(item)] if many else result_of(token_of(item))


def outcome_of(result: object) -> object:
    """Returns what `right_outcome` is to be compared with."""
    if isinstance(result, MissingToken):
        return LASTING["missing"]
    return result.status if isinstance(result, ApiError) else result


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
        items,
        client.fetch_token,
        client.fetch_result,
        token_workers=workers,
        result_workers=workers,
        trace=options.trace,
        progress=options.progress,
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
        trace=options.trace,
        progress=options.progress,
    )


def both_calls(client: Client) -> Callable[[int], Result]:
    """Returns both in one function, with retries as they are commonly written: they sleep in the worker."""
    retrying = Retrying(
        wait=wait_random_exponential(multiplier=0.1, max=20), stop=stop_after_attempt(10), reraise=True
    )
    # Called, not as a decorator, which has one set of statistics for all threads and fails at times.
    return lambda item: retrying(client.fetch_result, retrying(client.fetch_token, item))


def counted_outcomes(options: argparse.Namespace) -> str:
    """Returns how many items have a result, and how many failed by which fault."""
    ordered = Faults(options.faults, seed=options.seed)
    counts = Counter(map(ordered.lasting_status, range(options.items)))
    failed = [f"{counts[status]:,} {name}" for name, status in LASTING.items() if counts[status]]
    return f"{counts[None]:,} items have their results" + (
        f", {options.items - counts[None]:,} failed as ordered ({', '.join(failed)})" if failed else ""
    )


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Prints these columns of the rows; speed-ups are against the first row."""
    width = max(len(row.way) for row in rows)
    print(f"{'':{width}}", *columns, sep="  ")
    for row in rows:
        beyond = f"{row.attempts - row.calls:,.0f}"
        cells = {
            "seconds": f"{row.seconds:.2f}",
            "attempts": f"{row.attempts:,.0f}",
            "retries": beyond,
            "extra": beyond,
            "speed-up": f"{rows[0].seconds / row.seconds:.1f}x",
        }
        print(f"{row.way:{width}}", *(f"{cells[name]:>{len(name)}}" for name in columns), sep="  ")
