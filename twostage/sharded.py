"""The two functions for more than one machine, and what a type checker is to know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, Required, TypeVar, Unpack, overload

from twostage.job.building import ItemsOptions, RunOptions, Watching, settled
from twostage.job.outcomes import Outcomes
from twostage.run import DEFAULT_RESULT_WORKERS, DEFAULT_TOKEN_WORKERS, Options
from twostage.shards.owner import Sharding, build_sharded
from twostage.stage import (
    DEFAULT_RETRY,
    ONE_ITEM_A_CALL,
    ONE_TOKEN_AN_ITEM,
    Answers,
    Default,
    InBatches,
    Many,
    OneByOne,
    Stage,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable
    from concurrent.futures import Executor

    from twostage.base.checks import Failures
    from twostage.failing.retry import RetryPolicy
    from twostage.journal.journal import JournalLike
    from twostage.observing.bar import ProgressLike
    from twostage.observing.events import Observer
    from twostage.tracing.trace import Trace

__all__ = ["iter_sharded", "run_sharded"]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")

SHARDS = 8
SHARD_SIZE = 1000


class ShardOptions(Options[ItemT], Generic[ItemT], total=False):
    """The arguments of both functions that what they return does not depend on."""

    executor: Required[Executor]
    shards: int
    shard_size: int


@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, TokenT] | Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, TokenT] | Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Awaitable[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Awaitable[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[ShardOptions[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
def run_sharded(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    *,
    executor: Executor,
    shards: int = SHARDS,
    shard_size: int = SHARD_SIZE,
    batch_size: int | Default | None = ONE_ITEM_A_CALL,
    token_workers: int | Default = DEFAULT_TOKEN_WORKERS,
    result_workers: int | Default = DEFAULT_RESULT_WORKERS,
    retry: RetryPolicy | Default = DEFAULT_RETRY,
    many: bool | Default = ONE_TOKEN_AN_ITEM,
    key: Callable[[Any], Hashable] | None = None,
    refresh_token_on: Failures | None = None,
    max_refreshes: int = 1,
    return_exceptions: bool = False,
    window: int | None = None,
    timeout: float | None = None,
    max_failures: float | None = None,
    journal: JournalLike | None = None,
    progress: ProgressLike = False,
    total: int | None = None,
    trace: Trace | None = None,
    observer: Observer | Iterable[Observer] | None = None,
) -> list[Any]:
    """Does what `run_two_stage` does on several machines, and returns the results in the items' order.

    What travels is a shard: some consecutive items, for which a job of its own runs, with its own workers,
    wherever the executor has it run. Results, order and errors are those of `run_two_stage`. Each call is
    made at least once: those of a shard whose worker was lost are made again, if the executor does that.

    Args:
        items: Any iterable; it is read in this thread, a shard at a time, for the shards that are out.
        fetch_token: As in `run_two_stage`. It runs in another process: it is pickled, as all is that it takes
            and returns.
        fetch_result: The same.
        executor: Where shards run: Dask's `client.get_executor(pure=False)`, a `ProcessPoolExecutor`,
            mpi4py's `MPIPoolExecutor` or any other `concurrent.futures.Executor`. It is never shut down.
        shards: How many are out at once: best as many as the executor runs at once, and one or two more.
        shard_size: How many items a shard has. A lost worker costs the calls of its shard; a small one keeps
            the workers of its job less busy, as each begins and ends with a few calls.
        batch_size: This and the next ones are as in `run_two_stage`, in each shard.
        token_workers: So many calls of stage one run at once in each shard.
        result_workers: So many of stage two.
        retry: Policies are pickled, too. On Dask it can't be `None`: a lost worker's shard runs again.
        many: As there.
        key: As there, over all shards.
        refresh_token_on: As there.
        max_refreshes: As there.
        return_exceptions: As there. Off, the shards that run are awaited when one item has failed; Dask's
            are told to end.
        window: How many items may be read and not finished, at most. Default: those of the shards that are
            out.
        timeout: Seconds for the whole run.
        max_failures: Of the whole run. A shard with as many failures by itself ends early.
        journal: The file is here, and written when a shard has ended: the next run asks for no item that was
            done by then. (One of which only the token was recorded begins again.)
        progress: Counts shards as calls of stage one, and items as their shards end.
        total: As there.
        trace: None: it is one machine's.
        observer: Hears of what happens in a shard when that has ended.

    Returns:
        A result for each item, in the items' order.

    Raises:
        TypeError: An argument is of the wrong kind, or can't be pickled. Nothing was called then.
        ValueError: A number is out of range.
        BrokenExecutor: The executor's processes are gone.
        Exception: As from `run_two_stage`. Of an item that kills its worker, Dask's `KilledWorker`.

    >>> from concurrent.futures import ProcessPoolExecutor
    >>> from multiprocessing import get_context
    >>> with ProcessPoolExecutor(2, get_context("spawn")) as pool:
    ...     run_sharded(range(8), str, len, executor=pool, shards=2, shard_size=2)
    [1, 1, 1, 1, 1, 1, 1, 1]
    """
    stages = settled(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry, many=many)
    options = ItemsOptions(key, refresh_token_on, max_refreshes, window, journal)
    results: list[Any] = []
    run_options = RunOptions(
        return_exceptions, timeout, max_failures, Watching(progress, total, trace, observer)
    )
    sharding = Sharding(executor, shards, shard_size)
    job = build_sharded(items, *stages, options, run_options, sharding, results)
    try:
        job.advance()  # to the end: with a list to fill, no outcome is handed over
        if job.error is not None:
            raise job.error
    finally:
        job.close()
    return results


@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, TokenT] | Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Awaitable[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_sharded(
    items: Iterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[ShardOptions[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
def iter_sharded(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    *,
    executor: Executor,
    shards: int = SHARDS,
    shard_size: int = SHARD_SIZE,
    batch_size: int | Default | None = ONE_ITEM_A_CALL,
    token_workers: int | Default = DEFAULT_TOKEN_WORKERS,
    result_workers: int | Default = DEFAULT_RESULT_WORKERS,
    retry: RetryPolicy | Default = DEFAULT_RETRY,
    many: bool | Default = ONE_TOKEN_AN_ITEM,
    key: Callable[[Any], Hashable] | None = None,
    refresh_token_on: Failures | None = None,
    max_refreshes: int = 1,
    return_exceptions: bool = False,
    window: int | None = None,
    timeout: float | None = None,
    max_failures: float | None = None,
    journal: JournalLike | None = None,
    progress: ProgressLike = False,
    total: int | None = None,
    trace: Trace | None = None,
    observer: Observer | Iterable[Observer] | None = None,
    ordered: bool = False,
    linger: float | None = None,
) -> Outcomes[Any, Any, Any]:
    """Does what `iter_two_stage` does on several machines: hands the outcomes over, shard by shard.

    See `run_sharded` for what a shard is. Use it in a `with` block, so that no shard goes on after an
    exception in the loop.

    Args:
        items: Any iterable; it is read in this thread, a shard at a time, for the shards that are out.
        fetch_token: As in `run_two_stage`. It runs in another process: it is pickled, as all is that it takes
            and returns.
        fetch_result: The same.
        executor: Where shards run: Dask's `client.get_executor(pure=False)`, a `ProcessPoolExecutor`,
            mpi4py's `MPIPoolExecutor` or any other `concurrent.futures.Executor`. It is never shut down.
        shards: How many are out at once: best as many as the executor runs at once, and one or two more.
        shard_size: How many items a shard has. A lost worker costs the calls of its shard; a small one keeps
            the workers of its job less busy, as each begins and ends with a few calls.
        batch_size: This and the next ones are as in `run_two_stage`, in each shard.
        token_workers: So many calls of stage one run at once in each shard.
        result_workers: So many of stage two.
        retry: Policies are pickled, too. On Dask it can't be `None`: a lost worker's shard runs again.
        many: As there.
        key: As there, over all shards.
        refresh_token_on: As there.
        max_refreshes: As there.
        return_exceptions: Whether a failed item is an outcome like any other, with its `exception` set. Off,
            the first failure is raised from `next`, when the shards that run have ended; Dask's are told to.
        window: How many items may be read and not handed over, at most. Default: those of the shards that are
            out.
        timeout: Seconds for the whole run.
        max_failures: Of the whole run. A shard with as many failures by itself ends early.
        journal: The file is here, and written when a shard has ended: the next run asks for no item that was
            done by then. (One of which only the token was recorded begins again.)
        progress: Counts shards as calls of stage one, and items as their shards end.
        total: As there.
        trace: None: it is one machine's.
        observer: Hears of what happens in a shard when that has ended.
        ordered: Whether outcomes come in the items' order: then a shard that is slow keeps back those after
            it, and once the `window` is full no other is sent.
        linger: Seconds after which a shard leaves though it is not full, for a slow source, which is then
            read in a thread of its own.

    Returns:
        An iterator of `Outcome`, and a context manager.

    Raises:
        TypeError: An argument is of the wrong kind, or can't be pickled. Nothing was called then.
        ValueError: A number is out of range.

    >>> from concurrent.futures import ProcessPoolExecutor
    >>> from multiprocessing import get_context
    >>> with ProcessPoolExecutor(2, get_context("spawn")) as pool:
    ...     with iter_sharded("ab", str.upper, ord, executor=pool, shard_size=1, ordered=True) as outcomes:
    ...         for outcome in outcomes:
    ...             print(outcome.index, outcome.item, outcome.token, outcome.result)
    0 a A 65
    1 b B 66
    """
    stages = settled(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry, many=many)
    options = ItemsOptions(key, refresh_token_on, max_refreshes, window, journal)
    run_options = RunOptions(
        return_exceptions, timeout, max_failures, Watching(progress, total, trace, observer), ordered, linger
    )
    sharding = Sharding(executor, shards, shard_size)
    return Outcomes(build_sharded(items, *stages, options, run_options, sharding))
