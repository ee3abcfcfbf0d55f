"""The four functions, and what a type checker is to know of them.

The rows of `run_two_stage` and `iter_two_stage` stand here once; the two for async code have the same ones,
by way of a `ParamSpec` (mypy from 1.8 on, and pyright, keep all rows of a function that goes through one).
"""

from __future__ import annotations

import asyncio
import inspect
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypeAlias,
    TypedDict,
    TypeVar,
    overload,
)

from twostage.base.options import JobOptions, check_names
from twostage.base.words import warn
from twostage.job.building import build, build_async
from twostage.job.outcomes import AsyncOutcomes, Outcomes
from twostage.job.stages import settled
from twostage.shards.owner import build_sharded, check_shards

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterable,
        Awaitable,
        Callable,
        Collection,
        Coroutine,
        Hashable,
        Iterable,
        Mapping,
    )
    from typing import Unpack

    from twostage.base.checks import Failures
    from twostage.base.options import Default
    from twostage.failing.retry import RetryPolicy
    from twostage.job.outcomes import AsyncJob, Job
    from twostage.journal.journal import JournalLike
    from twostage.observing.bar import ProgressLike
    from twostage.observing.events import Observer
    from twostage.observing.record import Record
    from twostage.shards.owner import Shards
    from twostage.stage import Answers, Many, Stage

__all__ = ["aiter_two_stage", "arun_two_stage", "iter_two_stage", "run_two_stage"]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")
P = ParamSpec("P")

OF_STREAMS = "ordered", "linger"

Later: TypeAlias = "Callable[[ItemT], Awaitable[ResultT]]"
Now: TypeAlias = "Callable[[ItemT], ResultT] | Stage[ItemT, ResultT]"
AnyOne: TypeAlias = "Callable[[ItemT], Awaitable[TokenT] | TokenT] | Stage[ItemT, TokenT]"
Batch: TypeAlias = "Callable[[list[ItemT]], Awaitable[Answers[ItemT, TokenT]] | Answers[ItemT, TokenT]] | Stage[list[ItemT], Answers[ItemT, TokenT]]"
Lists: TypeAlias = "Callable[[ItemT], Awaitable[Collection[TokenT]]] | Callable[[ItemT], Collection[TokenT]]"
BatchOfLists: TypeAlias = "Callable[[list[ItemT]], Awaitable[Answers[ItemT, Collection[TokenT]]] | Answers[ItemT, Collection[TokenT]]]"
One: TypeAlias = "Default | None"
No: TypeAlias = "Literal[False]"


class Options(TypedDict, Generic[ItemT], total=False):
    """The arguments that what is returned does not depend on."""

    token_workers: int | Default
    result_workers: int | Default
    retry: RetryPolicy | Default
    key: Callable[[ItemT], Hashable] | None
    refresh_token_on: Failures | None
    max_refreshes: int
    window: int | None
    timeout: float | None
    max_failures: float | None
    journal: JournalLike | None
    shards: Shards | None
    progress: ProgressLike
    total: int | None
    trace: Record | None
    observer: Observer | Iterable[Observer] | None


class StreamOptions(Options[ItemT], Generic[ItemT], total=False):
    """Those of a stream."""

    ordered: bool
    linger: float | None


# A row is the function as a checker sees it, for one kind of arguments.
# fmt: off
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[list[ResultT]]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[list[ResultT]]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: AnyOne[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[ResultT]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: AnyOne[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Later[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[ResultT]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Later[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Callable[[ItemT], TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[ResultT]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Callable[[ItemT], TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[ResultT]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Batch[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: No | Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[ResultT]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Batch[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: No | Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Batch[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: No | Default = ..., return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[ResultT]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Batch[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: No | Default = ..., return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[list[ResultT]]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[list[ResultT]]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[list[ResultT]]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: No = ..., **options: Unpack[Options[ItemT]]) -> list[list[ResultT]]: ...
@overload
def run_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: bool, **options: Unpack[Options[ItemT]]) -> list[list[ResultT | Exception] | Exception]: ...
# fmt: on
def run_two_stage(
    items: Iterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    **options: Any,
) -> list[Any]:
    """Makes two calls for each item, many at once, and returns the results in the items' order.

    Each call is made at least once: again after a failure that may pass. The first failure that lasts
    ends the job: nothing more starts, running calls are awaited, and it is raised as the function
    raised it. The same on Ctrl-C. For results one by one, or more of them than fit into memory, use
    `iter_two_stage`.

    Args:
        items: Any iterable; it is read as the job goes on, in this thread, a batch at a time. While a
            slow one is waited for, nothing is handed over. An iterator is closed at the end, if it can be.
        fetch_token: Stage one: takes an item and returns its token. With `batch_size` it takes a fresh
            `list` of items and returns as many tokens, in their order, or a mapping from items to tokens;
            an exception in a token's place fails that item alone. Or a `Stage`.
        fetch_result: Stage two: takes a token and returns the result. Or a `Stage`.
        batch_size: How many items one call of stage one takes at most. Default: one, not in a list.
        token_workers: How many calls of stage one run at once. Default: 4.
        result_workers: How many calls of stage two run at once. Default: 32.
        retry: What is tried again, for stages that do not say it themselves: a tenacity `Retrying`, a
            number of attempts for the default policy, or `None` for calls that must not be repeated.
            Default: 10 attempts over some 22 s, if the failure is transient (see `is_transient`).
        many: Whether an item has many tokens: what else is its token is then a list of them, and its
            result the list of their results, in their order. Default: no.
        key: Gives an item's identity, hashable. Items of equal key are asked for once and share what comes
            of it. It is called in this thread. Default: each item is asked for by itself.
        refresh_token_on: Which failures of stage two mean that a token is no good any more: exception
            types, or a function that takes an exception. The item then gets a new token from stage one.
        max_refreshes: How often that may happen to one item; then the failure is the outcome.
        return_exceptions: Whether the exception of an item that failed takes its result's place in the
            list. Off, it is raised.
        window: How many items may be read and not finished, at most. Default: the larger of
            10,000 and ten times the calls' own need, which is enough for retries and stragglers.
        timeout: Seconds for the whole run, from its start. Past it nothing new starts; calls that run are
            awaited and count. Default: no limit.
        max_failures: How many items may fail before the job ends with `TooManyFailures`: a number, or as a
            `float` below 1 a share of the last 100 outcomes, once there are 20. It needs
            `return_exceptions`. Default: any number.
        journal: A file that records what the calls give, so that the same script run again makes only those
            that are missing: its path, or a `Journal`. Items, or what `key` returns, are then `str`, `int`
            or what JSON can say, and so are tokens and results. Default: nothing is recorded.
        shards: Where, and in what portions, a job on more than one machine runs: a `Shards`. Default: here.
        progress: Whether a bar of tqdm shows how far the job is (`pip install 'twostage[progress]'`): `True`
            if standard error is a terminal, or this is a notebook; "always" in any case. Or a function that
            takes a `Progress`, at most ten times a second. Default: nothing is shown.
        total: How many items there are, for the progress. Default: `len(items)`, if they have one.
        trace: A `Trace` that records each attempt.
        observer: An `Observer` that hears what happens, or several.

    Returns:
        A result for each item, in the items' order.

    Raises:
        TypeError: An argument is of the wrong kind, or a shorthand stands beside a `Stage` that sets
            the same. Nothing was called then.
        ValueError: A number is below 1, or the window smaller than a batch.
        Exception: What a function or the source raised, with a note of stage, item and attempts.
        BatchLengthError: A batch call returned more or fewer tokens than it got items.
        MissingToken: It returned a mapping that an item is not in.
        RunTimeout: The `timeout` has passed, and not all is done. (With `return_exceptions` it stands in the
            place of each item that is not, those that the source still had among them.)
        TooManyFailures: More items failed than `max_failures` allows; its `outcomes` are those that are done.

    >>> run_two_stage([1, 2, 3], str, len)
    [1, 1, 1]
    >>> run_two_stage(["a", "b", "c"], lambda batch: [item.upper() for item in batch], ord, batch_size=2)
    [65, 66, 67]
    """
    results: list[Any] = []
    _check_list(options)
    job: Job = _job("arun_two_stage", items, fetch_token, fetch_result, options, results)
    try:
        job.advance()  # to the end: with a list to fill, no outcome is handed over
        if job.error is not None:
            raise job.error
    finally:
        job.close()
    return results


# fmt: off
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: No = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: bool, **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: No = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, Many[TokenT]], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Default = ..., return_exceptions: bool, **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: AnyOne[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Later[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Callable[[ItemT], TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Stage[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: No | Default = ..., return_exceptions: bool = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Batch[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: No | Default = ..., return_exceptions: bool = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Batch[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: No | Default = ..., return_exceptions: bool = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: No = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: bool, **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: No = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: Lists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: One = ..., many: Literal[True], return_exceptions: bool, **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: No = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Later[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: bool, **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: No = ..., **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(items: Iterable[ItemT], fetch_token: BatchOfLists[ItemT, TokenT], fetch_result: Now[TokenT, ResultT], *,
        batch_size: int, many: Literal[True], return_exceptions: bool, **options: Unpack[StreamOptions[ItemT]]) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
# fmt: on
def iter_two_stage(
    items: Iterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    **options: Any,
) -> Outcomes[Any, Any, Any]:
    """Makes two calls for each item, many at once, and hands the outcomes over as they complete.

    Memory does not grow with the input: the source is read only as far ahead as the calls need. The
    job starts at the first `next` and goes on while the consumer is away. Use it in a `with` block, so
    that no call goes on after an exception in the loop.

    Args:
        items: As for `run_two_stage`; so are the two functions.
        fetch_token: Stage one.
        fetch_result: Stage two.
        **options: What `run_two_stage` takes, and those two. With `return_exceptions` a failed item is an
            outcome like any other, with its `exception` set; off, the first failure is raised from `next`,
            after the outcomes that were done before it.
        ordered: Whether outcomes come in the items' order. Those that are done then wait for the ones
            before them: a straggler holds back up to `window` items, and with a small window the calls.
            If the job ends early, what is done before the failed item is handed over, with gaps.
        linger: For a source that is slower than the API, such as a queue: seconds after which a batch
            leaves though it is not full. The source is then read in a thread of its own, so that outcomes
            come as soon as they are done; closing does not wait for a source that blocks. Default: batches
            are full, and the source is read in the consumer's thread.

    Returns:
        An iterator of `Outcome`, and a context manager.

    Raises:
        TypeError: An argument is of the wrong kind, or a shorthand stands beside a `Stage` that sets
            the same. Nothing was called then.
        ValueError: A number is below 1, or the window smaller than a batch.

    >>> with iter_two_stage(["a", "b"], str.upper, ord, ordered=True) as outcomes:
    ...     for outcome in outcomes:
    ...         print(outcome.index, outcome.item, outcome.token, outcome.result)
    0 a A 65
    1 b B 66
    """
    return Outcomes(_job("aiter_two_stage", items, fetch_token, fetch_result, options))


def _job(
    instead: str,
    items: Any,  # noqa: ANN401 - an iterable, or an async one
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    said: dict[str, Any],
    results: list[Any] | None = None,
) -> Any:  # noqa: ANN401 - a `Job`, or an `AsyncJob`
    """Checks what is said and builds a job, in place of which async code should use the function `instead`."""
    options = JobOptions.of(said)
    stages = settled(fetch_token, fetch_result, options)
    if options.shards is not None:
        check_shards(options.shards, awaited=not instead)
        return build_sharded(items, stages, options, results)
    if not instead:
        return build_async(items, stages, options, results)
    if any(one.stage.awaits for one in stages):
        _warn_of_loop(instead)
    return build(items, stages, options, results)


def _check_list(said: Mapping[str, Any]) -> None:
    """Checks that there are such options, of a job that fills a list."""
    check_names(said)
    for name in OF_STREAMS:
        if name in said:
            raise TypeError(f"{name} is given, and is an option of streams; expected it at iter_two_stage")


def _show(function: Callable[..., Any], name: str, *but: str) -> None:
    """Has a function be known by its name, and by the options that it takes: all but some."""
    taken = list(inspect.signature(run_two_stage).parameters.values())[:3]
    taken += [one for one in inspect.signature(JobOptions).parameters.values() if one.name not in but]
    function.__name__ = function.__qualname__ = name
    function.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined] # `inspect` looks there first


def _warn_of_loop(instead: str) -> None:
    """Warns if the caller's event loop stands still while coroutines are awaited on another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    warn(
        "coroutine functions are run on another event loop, and the one that runs here waits for them "
        f"meanwhile: what belongs to it, such as a client, can't be used. Use {instead}"
    )


# --- for async code


def _awaited(
    _: Callable[Concatenate[Iterable[ItemT], P], list[ResultT]],
) -> Callable[Concatenate[Iterable[ItemT] | AsyncIterable[ItemT], P], Coroutine[Any, Any, list[ResultT]]]:
    def run(
        items: Any,  # noqa: ANN401 - `_show` says what it takes
        fetch_token: Any,  # noqa: ANN401
        fetch_result: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> Coroutine[Any, Any, list[Any]]:
        """Is `run_two_stage` for async code: the caller's event loop goes on meanwhile.

        Coroutine functions run on that loop, so that clients made there can be used; plain functions run in
        threads. A cancellation ends the job as its first failure does: nothing more starts, running calls are
        awaited; a second one gives up the waiting.

        Args:
            items: An async iterable, which is read by a task on the loop; a list, a tuple or a range; or any
                other iterable, which is read by a thread of its own: what is bound to its thread, such as a
                `sqlite3` cursor, has to be made an async iterable.
            fetch_token: Stage one, as for `run_two_stage`.
            fetch_result: Stage two.
            **options: What `run_two_stage` takes.

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
        _check_list(options)
        return _to_the_end(items, fetch_token, fetch_result, options)

    return run  # type: ignore[return-value] # it takes what its rows take


async def _to_the_end(items: object, fetch_token: Any, fetch_result: Any, said: dict[str, Any]) -> list[Any]:  # noqa: ANN401
    results: list[Any] = []
    job: AsyncJob = _job("", items, fetch_token, fetch_result, said, results)
    try:
        await job.advance()  # with a list to fill, no outcome is handed over
        if job.error is not None:
            raise job.error
    finally:
        await job.close()
    return results


def _async(
    _: Callable[Concatenate[Iterable[ItemT], P], Outcomes[ItemT, TokenT, ResultT]],
) -> Callable[Concatenate[Iterable[ItemT] | AsyncIterable[ItemT], P], AsyncOutcomes[ItemT, TokenT, ResultT]]:
    def iterate(
        items: Any,  # noqa: ANN401 - as above
        fetch_token: Any,  # noqa: ANN401
        fetch_result: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> AsyncOutcomes[Any, Any, Any]:
        """Is `iter_two_stage` for async code: an async iterator, best used in an `async with` block.

        Items are as for `arun_two_stage`, and the source is always read beside the consumer.
        """
        return AsyncOutcomes(_job("", items, fetch_token, fetch_result, options))

    return iterate  # type: ignore[return-value] # as above


arun_two_stage = _awaited(run_two_stage)
aiter_two_stage = _async(iter_two_stage)

_show(run_two_stage, "run_two_stage", *OF_STREAMS)
_show(arun_two_stage, "arun_two_stage", *OF_STREAMS)
_show(aiter_two_stage, "aiter_two_stage")
_show(iter_two_stage, "iter_two_stage")
