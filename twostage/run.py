"""The two functions: arguments are checked, and a job is built and driven."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NamedTuple,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from twostage.answers import Check, batch_check, checked_result, checked_token
from twostage.coordinator import LEAST_IN_PROGRESS, Coordinator
from twostage.driver import world
from twostage.errors import brief
from twostage.lines import Line
from twostage.outcomes import Job, Outcomes
from twostage.retry import DEFAULT_ATTEMPTS, Judge, RetryPolicy, check_policy, repeats
from twostage.runners import Work
from twostage.splits import Splits, refuses_batch
from twostage.stage import (
    DEFAULT_RETRY,
    ONE_ITEM_A_CALL,
    ONE_TOKEN_AN_ITEM,
    Answers,
    Default,
    Failures,
    Many,
    Stage,
    check_bool,
    check_function,
    failure_test,
    positive_int,
)
from twostage.twins import Twins

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable
    from concurrent.futures import Executor

    from twostage.calls import Batch, Outcome

__all__ = ["iter_two_stage", "run_two_stage"]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")
ValueT = TypeVar("ValueT")

TOKEN_WORKERS = 4
RESULT_WORKERS = 32
DEFAULT_TOKEN_WORKERS = Default(str(TOKEN_WORKERS))
DEFAULT_RESULT_WORKERS = Default(str(RESULT_WORKERS))
LEAST_WINDOW = 10_000


class Options(TypedDict, Generic[ItemT], total=False):
    """The arguments of both functions that what they return does not depend on."""

    token_workers: int | Default
    result_workers: int | Default
    retry: RetryPolicy | Default
    key: Callable[[ItemT], Hashable] | None
    refresh_token_on: Failures | None
    max_refreshes: int
    window: int | None


@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, TokenT]] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, Collection[TokenT]]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT]]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, TokenT]] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, Collection[TokenT]]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    **options: Unpack[Options[ItemT]],
) -> list[list[ResultT | Exception] | Exception]: ...
def run_two_stage(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any],
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

    Returns:
        A result for each item, in the items' order.

    Raises:
        TypeError: An argument is of the wrong kind, or a shorthand stands beside a `Stage` that sets
            the same. Nothing was called then.
        ValueError: A number is below 1, or the window smaller than a batch.
        Exception: What a function or the source raised, with a note of stage, item and attempts.
        BatchLengthError: A batch call returned more or fewer tokens than it got items.
        MissingToken: It returned a mapping that an item is not in.

    >>> run_two_stage([1, 2, 3], str, len)
    [1, 1, 1]
    >>> run_two_stage(["a", "b", "c"], lambda batch: [item.upper() for item in batch], ord, batch_size=2)
    [65, 66, 67]
    """
    stages = _stages(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry, many=many)
    options = _ItemsOptions(key, refresh_token_on, max_refreshes, window)
    results: list[Any] = []
    job = _job(items, *stages, options, return_exceptions=return_exceptions, results=results)
    try:
        job.advance()  # to the end: with a list to fill, no outcome is handed over
        if job.error is not None:
            raise job.error
    finally:
        job.close()
    return results


@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, Many[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Default = ...,
    return_exceptions: bool,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, TokenT]] | Stage[list[ItemT], Answers[ItemT, TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[False] | Default = ...,
    return_exceptions: bool = ...,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, Collection[TokenT]]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: Literal[False] = ...,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT]]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], Collection[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Answers[ItemT, Collection[TokenT]]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    many: Literal[True],
    return_exceptions: bool,
    ordered: bool = ...,
    **options: Unpack[Options[ItemT]],
) -> Outcomes[ItemT, list[TokenT], list[ResultT | Exception]]: ...
def iter_two_stage(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any],
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
    ordered: bool = False,
) -> Outcomes[Any, Any, Any]:
    """Makes two calls for each item, many at once, and hands the outcomes over as they complete.

    Memory does not grow with the input: the source is read only as far ahead as the calls need. The
    job starts at the first `next` and goes on while the consumer is away. Use it in a `with` block, so
    that no call goes on after an exception in the loop.

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
            of it, among those that were read and not handed over. It is called in this thread. Default:
            each item is asked for by itself.
        refresh_token_on: Which failures of stage two mean that a token is no good any more: exception
            types, or a function that takes an exception. The item then gets a new token from stage one.
        max_refreshes: How often that may happen to one item; then the failure is the outcome.
        return_exceptions: Whether a failed item is an outcome like any other, with its `exception` set.
            Off, the first failure is raised from `next`, after the outcomes that were done before it.
        window: How many items may be read and not handed over, at most. Default: the larger of
            10,000 and ten times the calls' own need, which is enough for retries and stragglers.
        ordered: Whether outcomes come in the items' order. Those that are done then wait for the ones
            before them: a straggler holds back up to `window` items, and with a small window the calls.
            If the job ends early, what is done before the failed item is handed over, with gaps.

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
    stages = _stages(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry, many=many)
    options = _ItemsOptions(key, refresh_token_on, max_refreshes, window)
    return Outcomes(_job(items, *stages, options, return_exceptions=return_exceptions, ordered=ordered))


class _ItemsOptions(NamedTuple):
    """What is said of the items, not checked yet."""

    key: Callable[[Any], Hashable] | None
    refresh_token_on: Failures | None
    max_refreshes: int
    window: int | None


class _Settings(NamedTuple):
    """One stage with nothing left to a default."""

    name: str
    fetch: Callable[[Any], Any]
    batch_size: int | None
    workers: int
    executor: Executor | None
    retry: RetryPolicy
    many: bool
    bisect: bool | Failures
    retry_missing: bool


def _stages(
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    batch_size: int | Default | None,
    token_workers: int | Default,
    result_workers: int | Default,
    retry: RetryPolicy | Default,
    *,
    many: bool | Default,
) -> tuple[_Settings, _Settings]:
    """Checks what is said of the stages, in them and beside them, and fills the defaults in."""
    if not isinstance(batch_size, Default | None):
        batch_size = positive_int(batch_size, "batch_size")
    if not isinstance(token_workers, Default):
        token_workers = positive_int(token_workers, "token_workers")
    if not isinstance(result_workers, Default):
        result_workers = positive_int(result_workers, "result_workers")
    if not isinstance(many, Default):
        check_bool(many, "many")
    policy = DEFAULT_ATTEMPTS if isinstance(retry, Default) else check_policy(retry, "retry")
    first, second = _stage(fetch_token, "fetch_token"), _stage(fetch_result, "fetch_result")
    if second.many is True:
        raise TypeError("fetch_result's Stage has many=True; only items have many tokens, at stage one")
    return (
        _settings(
            "fetch_token",
            first,
            _said(
                ("batch_size", batch_size),
                ("batch_size of fetch_token's Stage", first.batch_size),
                default=None,
            ),
            _said(
                ("token_workers", token_workers),
                ("workers of fetch_token's Stage", first.workers),
                default=TOKEN_WORKERS,
            ),
            policy,
            many=_said(("many", many), ("many of fetch_token's Stage", first.many), default=False),
        ),
        _settings(
            "fetch_result",
            second,
            _said(("batch_size of fetch_result's Stage", second.batch_size), default=None),
            _said(
                ("result_workers", result_workers),
                ("workers of fetch_result's Stage", second.workers),
                default=RESULT_WORKERS,
            ),
            policy,
            many=False,
        ),
    )


def _stage(fetch: Callable[[Any], Any] | Stage[Any, Any], name: str) -> Stage[Any, Any]:
    if isinstance(fetch, Stage):
        return fetch
    check_function(fetch, name)
    return Stage(fetch)


def _settings(
    name: str,
    stage: Stage[Any, Any],
    batch_size: int | None,
    workers: int,
    policy: RetryPolicy,
    *,
    many: bool,
) -> _Settings:
    if stage.retry_missing and batch_size is None:
        raise TypeError(
            f"{name}'s Stage has retry_missing=True, but no batch_size: one item is never left out"
        )
    return _Settings(
        name=name,
        fetch=stage.fetch,
        batch_size=batch_size,
        workers=workers,
        executor=stage.executor,
        retry=policy if isinstance(stage.retry, Default) else stage.retry,
        many=many,
        bisect=stage.bisect,
        retry_missing=stage.retry_missing,
    )


def _said(*said: tuple[str, ValueT | Default], default: ValueT) -> ValueT:
    """Returns the one value that was given, or `default` if none was."""
    given = [(name, value) for name, value in said if not isinstance(value, Default)]
    if len(given) > 1:
        raise TypeError(
            " and ".join(f"{name} ({value!r})" for name, value in given) + " are both given; expected one"
        )
    return given[0][1] if given else default


def _job(
    items: Iterable[Any],
    first: _Settings,
    second: _Settings,
    items_options: _ItemsOptions,
    *,
    return_exceptions: bool,
    results: list[Any] | None = None,
    ordered: bool = False,
) -> Job:
    """Checks what is left to check, and builds a job of which nothing runs yet."""
    key, refresh_token_on, max_refreshes, window = items_options
    batch_size = first.batch_size or 1
    # The batches of one or two workers vary too much: stage two would run dry (tests/scheduling).
    batches = max(TOKEN_WORKERS, first.workers)
    bound = max(LEAST_IN_PROGRESS, 2 * (batches * batch_size + second.workers * (second.batch_size or 1)))
    window = max(LEAST_WINDOW, 10 * bound) if window is None else positive_int(window, "window")
    if window < batch_size:
        raise ValueError(
            f"window is {window}; expected at least the batch_size of {batch_size}: whole batches are read"
        )
    refreshes = None if refresh_token_on is None else failure_test(refresh_token_on, "refresh_token_on")
    max_refreshes = positive_int(max_refreshes, "max_refreshes")
    if key is not None:
        check_function(key, "key")
    try:
        source = iter(items)
    except TypeError as error:
        raise TypeError(f"items is {brief(items)}; expected something to iterate over") from error
    if not (repeats(first.retry) and repeats(second.retry)):
        refreshes = None  # either stage's calls must not be made twice for an item
    # Where calls are made of what waits when a worker is free, none is handed over before.
    token_line = _line(first, checked_token, _items, ahead=refreshes is None)
    result_line = _line(
        second,
        checked_result,
        _tokens,
        ahead=second.batch_size is None and not (first.many and refreshes),
        refreshes=refreshes,
    )
    coordinator = Coordinator(
        token_line,
        result_line,
        batch_size=batch_size,
        bound=bound,
        window=window,
        return_exceptions=return_exceptions,
        results=results,
        ordered=ordered,
        tokens_first=first.executor is not None and first.executor is second.executor,
        many=first.many,
        twins=None if key is None else Twins(),
        max_refreshes=max_refreshes,
    )
    driver = world.get()()
    token_line.runner = driver.runner(
        Work(
            "stage one",
            first.fetch,
            _item if first.batch_size is None else _items,
            coordinator.batch_ended,
            first.workers,
            first.executor,
        )
    )
    in_batches = second.batch_size is not None
    result_line.runner = driver.runner(
        Work(
            "stage two",
            second.fetch,
            _tokens if in_batches else _token,
            coordinator.results_ended if in_batches else coordinator.result_ended,
            second.workers,
            second.executor,
        )
    )
    # An iterator was given to be used up here; a list, or what else makes iterators, was not.
    close_source = getattr(items, "close", None) if source is items else None
    return Job(source, close_source, coordinator, driver, key)


def _line(
    stage: _Settings,
    check: Check,
    arguments: Callable[[Batch], list[Any]],
    *,
    ahead: bool,
    refreshes: Callable[[Exception], bool] | None = None,
) -> Line:
    batched = stage.batch_size is not None
    if batched:
        check = batch_check(stage.name, arguments)
    splits = None
    if batched and stage.bisect is not False and repeats(stage.retry):
        splits = Splits(refuses_batch if stage.bisect is True else failure_test(stage.bisect, "bisect"))
    one = stage.name == "fetch_token"
    return Line(
        "stage one" if one else "stage two",
        math.inf if ahead and stage.executor is None else stage.workers,
        check,
        Judge(stage.retry, retry_missing=stage.retry_missing, refresh_on=refreshes),
        slots=batched,
        batch_size=1 if one and not batched else stage.batch_size,
        splits=splits,
    )


_token = attrgetter("token")


def _tokens(batch: Batch) -> list[Any]:
    return [member.token for member in batch.members]  # each attempt's own list, which it may change


def _item(batch: Batch) -> Any:  # noqa: ANN401 - whatever the user's items are
    return cast("Outcome[Any, Any, Any]", batch.members[0]).item


def _items(batch: Batch) -> list[Any]:
    return [cast("Outcome[Any, Any, Any]", member).item for member in batch.members]  # as above
