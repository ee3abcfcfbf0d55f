"""The two functions for async code, and what a type checker is to know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

from twostage.job.building import ItemsOptions, RunOptions, Watching, build_async, settled
from twostage.job.outcomes import AsyncOutcomes
from twostage.run import DEFAULT_RESULT_WORKERS, DEFAULT_TOKEN_WORKERS, Options
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
    from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Hashable, Iterable

    from twostage.base.checks import Failures
    from twostage.failing.retry import RetryPolicy
    from twostage.journal.journal import JournalLike
    from twostage.observing.bar import ProgressLike
    from twostage.observing.events import Observer
    from twostage.tracing.trace import Trace

__all__ = ["aiter_two_stage", "arun_two_stage"]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")


@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, TokenT] | Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, TokenT] | Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Callable[[ItemT], Awaitable[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Callable[[ItemT], Awaitable[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
async def arun_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
async def arun_two_stage(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any] | AsyncIterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    *,
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
    """Makes two calls for each item, many at once, and returns the results in the items' order.

    It is `run_two_stage` for async code: the caller's event loop goes on meanwhile. Coroutine functions run
    on that loop, so that clients made there can be used; plain functions run in threads. A cancellation
    ends the job as its first failure does: nothing more starts, running calls are awaited; a second one
    gives up the waiting.

    Args:
        items: An async iterable, which is read by a task on the loop; a list, a tuple or a range; or any
            other iterable, which is read by a thread of its own: what is bound to its thread, such as a
            `sqlite3` cursor, has to be made an async iterable.
        fetch_token: Stage one, as for `run_two_stage`; so are all arguments below.
        fetch_result: Stage two.
        batch_size: How many items one call of stage one takes at most. Default: one, not in a list.
        token_workers: How many calls of stage one run at once. Default: 4; coroutine functions: 100.
        result_workers: How many calls of stage two run at once. Default: 32; coroutine functions: 100.
        retry: What is tried again. Default: up to 10 attempts, if the failure is transient.
        many: Whether an item has many tokens. Default: no.
        key: Gives an item's identity; it is called where the source is read. Default: each is itself.
        refresh_token_on: Which failures of stage two want a new token. Default: none.
        max_refreshes: How often one item may have that.
        return_exceptions: Whether the exception of an item that failed takes its result's place.
        window: How many items may be read and not finished, at most.
        timeout: Seconds for the whole run. Default: no limit.
        max_failures: How many items, or which share, may fail before the job ends. Default: any number.
        journal: A file that records what the calls give, so that another run makes only the missing ones.
            Default: nothing is recorded.
        progress: Whether a bar shows how far the job is, or a function that takes a `Progress`. Default: no.
        total: How many items there are, for the progress. Default: `len(items)`, if they have one.
        trace: A `Trace` that records each attempt.
        observer: An `Observer` that hears what happens, or several.

    Returns:
        A result for each item, in the items' order.

    Raises:
        Exception: What `run_two_stage` raises.

    >>> import asyncio
    >>> async def fetch_token(item):
    ...     return item.upper()
    >>> async def fetch_result(token):
    ...     return ord(token)
    >>> asyncio.run(arun_two_stage(["a", "b"], fetch_token, fetch_result))
    [65, 66]
    """
    stages = settled(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry, many=many)
    options = ItemsOptions(key, refresh_token_on, max_refreshes, window, journal)
    results: list[Any] = []
    run_options = RunOptions(
        return_exceptions, timeout, max_failures, Watching(progress, total, trace, observer)
    )
    job = build_async(items, *stages, options, run_options, results)
    try:
        await job.advance()  # to the end: with a list to fill, no outcome is handed over
        if job.error is not None:
            raise job.error
    finally:
        await job.close()
    return results


@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, TokenT] | Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, TokenT, ResultT]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, TokenT, ResultT]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], Awaitable[ResultT]],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Callable[[ItemT], Awaitable[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, TokenT, ResultT]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, TokenT, ResultT]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, TokenT, ResultT]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, TokenT] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, TokenT, ResultT]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: OneByOne[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def aiter_two_stage(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    fetch_token: InBatches[ItemT, Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    linger: float | None = ...,
    **options: Unpack[Options[ItemT]],
) -> AsyncOutcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
def aiter_two_stage(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any] | AsyncIterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    *,
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
) -> AsyncOutcomes[Any, Any, Any]:
    """Makes two calls for each item, many at once, and hands the outcomes over as they complete.

    It is `iter_two_stage` for async code, and not awaited itself. All that is said of `arun_two_stage` holds.
    Use it in an `async with` block, so that no call goes on after an exception in the loop; a cancellation
    there, or `aclose`, ends the job.

    Args:
        items: As for `arun_two_stage`.
        fetch_token: Stage one, as for `iter_two_stage`; so are all arguments below.
        fetch_result: Stage two.
        batch_size: How many items one call of stage one takes at most. Default: one, not in a list.
        token_workers: How many calls of stage one run at once. Default: 4; coroutine functions: 100.
        result_workers: How many calls of stage two run at once. Default: 32; coroutine functions: 100.
        retry: What is tried again. Default: up to 10 attempts, if the failure is transient.
        many: Whether an item has many tokens. Default: no.
        key: Gives an item's identity; it is called where the source is read. Default: each is itself.
        refresh_token_on: Which failures of stage two want a new token. Default: none.
        max_refreshes: How often one item may have that.
        return_exceptions: Whether a failed item is an outcome like any other, with its `exception` set.
        window: How many items may be read and not handed over, at most.
        timeout: Seconds for the whole run, from the first `anext`. Default: no limit.
        max_failures: How many items, or which share, may fail before the job ends. Default: any number.
        journal: A file that records what the calls give, so that another run makes only the missing ones.
            Default: nothing is recorded.
        progress: Whether a bar shows how far the job is, or a function that takes a `Progress`. Default: no.
        total: How many items there are, for the progress. Default: `len(items)`, if they have one.
        trace: A `Trace` that records each attempt.
        observer: An `Observer` that hears what happens, or several.
        ordered: Whether outcomes come in the items' order.
        linger: Seconds after which a batch leaves though it is not full. Default: batches are full.

    Returns:
        An async iterator of `Outcome`, and an async context manager.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A number is below 1, or the window smaller than a batch.

    >>> import asyncio
    >>> async def main():
    ...     async with aiter_two_stage(["a", "b"], str.upper, ord, ordered=True) as outcomes:
    ...         async for outcome in outcomes:
    ...             print(outcome.index, outcome.item, outcome.token, outcome.result)
    >>> asyncio.run(main())
    0 a A 65
    1 b B 66
    """
    stages = settled(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry, many=many)
    options = ItemsOptions(key, refresh_token_on, max_refreshes, window, journal)
    run_options = RunOptions(
        return_exceptions, timeout, max_failures, Watching(progress, total, trace, observer), ordered, linger
    )
    return AsyncOutcomes(build_async(items, *stages, options, run_options))
