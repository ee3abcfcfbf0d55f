"""The two functions: arguments are checked, and a job is built and driven."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

from twostage.answers import checked_result, checked_token, checked_tokens
from twostage.coordinator import LEAST_IN_PROGRESS, Coordinator
from twostage.driver import world
from twostage.errors import brief
from twostage.lines import Line
from twostage.outcomes import Job, Outcomes
from twostage.retry import DEFAULT_ATTEMPTS, Judge, RetryPolicy, check_policy
from twostage.runners import Work
from twostage.stage import DEFAULT_RETRY, ONE_ITEM_A_CALL, Default, Stage, check_function, positive_int

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Executor

    from twostage.calls import Batch

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


@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: Literal[False] = ...,
    window: int | None = ...,
) -> list[ResultT]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: Literal[False] = ...,
    window: int | None = ...,
) -> list[ResultT]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: bool,
    window: int | None = ...,
) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: bool,
    window: int | None = ...,
) -> list[ResultT | Exception]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Sequence[TokenT]] | Stage[list[ItemT], Sequence[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: Literal[False] = ...,
    window: int | None = ...,
) -> list[ResultT]: ...
@overload
def run_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Sequence[TokenT]] | Stage[list[ItemT], Sequence[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: bool,
    window: int | None = ...,
) -> list[ResultT | Exception]: ...
def run_two_stage(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    *,
    batch_size: int | Default | None = ONE_ITEM_A_CALL,
    token_workers: int | Default = DEFAULT_TOKEN_WORKERS,
    result_workers: int | Default = DEFAULT_RESULT_WORKERS,
    retry: RetryPolicy | Default = DEFAULT_RETRY,
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
            `list` of items and returns as many tokens, in their order. Or a `Stage`.
        fetch_result: Stage two: takes a token and returns the result. Or a `Stage`.
        batch_size: How many items one call of stage one takes at most. Default: one, not in a list.
        token_workers: How many calls of stage one run at once. Default: 4.
        result_workers: How many calls of stage two run at once. Default: 32.
        retry: What is tried again, for stages that do not say it themselves: a tenacity `Retrying`, a
            number of attempts for the default policy, or `None` for calls that must not be repeated.
            Default: 10 attempts over some 22 s, if the failure is transient (see `is_transient`).
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

    >>> run_two_stage([1, 2, 3], str, len)
    [1, 1, 1]
    >>> run_two_stage(["a", "b", "c"], lambda batch: [item.upper() for item in batch], ord, batch_size=2)
    [65, 66, 67]
    """
    stages = _stages(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry)
    results: list[Any] = []
    job = _job(items, *stages, window, return_exceptions=return_exceptions, results=results)
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
    fetch_token: Callable[[ItemT], TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: bool = ...,
    window: int | None = ...,
    ordered: bool = ...,
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Stage[ItemT, TokenT],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: Default | None = ...,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: bool = ...,
    window: int | None = ...,
    ordered: bool = ...,
) -> Outcomes[ItemT, TokenT, ResultT]: ...
@overload
def iter_two_stage(
    items: Iterable[ItemT],
    fetch_token: Callable[[list[ItemT]], Sequence[TokenT]] | Stage[list[ItemT], Sequence[TokenT]],
    fetch_result: Callable[[TokenT], ResultT] | Stage[TokenT, ResultT],
    *,
    batch_size: int,
    token_workers: int | Default = ...,
    result_workers: int | Default = ...,
    retry: RetryPolicy | Default = ...,
    return_exceptions: bool = ...,
    window: int | None = ...,
    ordered: bool = ...,
) -> Outcomes[ItemT, TokenT, ResultT]: ...
def iter_two_stage(  # noqa: PLR0913 - a job's settings
    items: Iterable[Any],
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    *,
    batch_size: int | Default | None = ONE_ITEM_A_CALL,
    token_workers: int | Default = DEFAULT_TOKEN_WORKERS,
    result_workers: int | Default = DEFAULT_RESULT_WORKERS,
    retry: RetryPolicy | Default = DEFAULT_RETRY,
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
            `list` of items and returns as many tokens, in their order. Or a `Stage`.
        fetch_result: Stage two: takes a token and returns the result. Or a `Stage`.
        batch_size: How many items one call of stage one takes at most. Default: one, not in a list.
        token_workers: How many calls of stage one run at once. Default: 4.
        result_workers: How many calls of stage two run at once. Default: 32.
        retry: What is tried again, for stages that do not say it themselves: a tenacity `Retrying`, a
            number of attempts for the default policy, or `None` for calls that must not be repeated.
            Default: 10 attempts over some 22 s, if the failure is transient (see `is_transient`).
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
    stages = _stages(fetch_token, fetch_result, batch_size, token_workers, result_workers, retry)
    return Outcomes(_job(items, *stages, window, return_exceptions=return_exceptions, ordered=ordered))


class _Settings(NamedTuple):
    """One stage with nothing left to a default."""

    fetch: Callable[[Any], Any]
    batch_size: int | None
    workers: int
    executor: Executor | None
    retry: RetryPolicy


def _stages(
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    batch_size: int | Default | None,
    token_workers: int | Default,
    result_workers: int | Default,
    retry: RetryPolicy | Default,
) -> tuple[_Settings, _Settings]:
    """Checks what is said of the stages, in them and beside them, and fills the defaults in."""
    if not isinstance(batch_size, Default | None):
        batch_size = positive_int(batch_size, "batch_size")
    if not isinstance(token_workers, Default):
        token_workers = positive_int(token_workers, "token_workers")
    if not isinstance(result_workers, Default):
        result_workers = positive_int(result_workers, "result_workers")
    policy = DEFAULT_ATTEMPTS if isinstance(retry, Default) else check_policy(retry, "retry")
    first, second = _stage(fetch_token, "fetch_token"), _stage(fetch_result, "fetch_result")
    if not isinstance(second.batch_size, Default | None):
        raise TypeError(f"fetch_result has batch_size={second.batch_size}; stage two takes one token a call")
    return (
        _Settings(
            first.fetch,
            _said(None, ("batch_size", batch_size), ("batch_size of fetch_token's Stage", first.batch_size)),
            _said(
                TOKEN_WORKERS,
                ("token_workers", token_workers),
                ("workers of fetch_token's Stage", first.workers),
            ),
            first.executor,
            policy if isinstance(first.retry, Default) else first.retry,
        ),
        _Settings(
            second.fetch,
            None,
            _said(
                RESULT_WORKERS,
                ("result_workers", result_workers),
                ("workers of fetch_result's Stage", second.workers),
            ),
            second.executor,
            policy if isinstance(second.retry, Default) else second.retry,
        ),
    )


def _stage(fetch: Callable[[Any], Any] | Stage[Any, Any], name: str) -> Stage[Any, Any]:
    if isinstance(fetch, Stage):
        return fetch
    check_function(fetch, name)
    return Stage(fetch)


def _said(default: ValueT, *said: tuple[str, ValueT | Default]) -> ValueT:
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
    window: int | None,
    *,
    return_exceptions: bool,
    results: list[Any] | None = None,
    ordered: bool = False,
) -> Job:
    """Checks what is left to check, and builds a job of which nothing runs yet."""
    batch_size = first.batch_size or 1
    # The batches of one or two workers vary too much: stage two would run dry (tests/scheduling).
    batches = max(TOKEN_WORKERS, first.workers)
    bound = max(LEAST_IN_PROGRESS, 2 * (batches * batch_size + second.workers))
    window = max(LEAST_WINDOW, 10 * bound) if window is None else positive_int(window, "window")
    if window < batch_size:
        raise ValueError(
            f"window is {window}; expected at least the batch_size of {batch_size}: whole batches are read"
        )
    try:
        source = iter(items)
    except TypeError as error:
        raise TypeError(f"items is {brief(items)}; expected something to iterate over") from error
    argument, check = (_item, checked_token) if first.batch_size is None else (_items, checked_tokens)
    token_line = Line("stage one", first.workers if first.executor else math.inf, check, Judge(first.retry))
    result_line = Line(
        "stage two", second.workers if second.executor else math.inf, checked_result, Judge(second.retry)
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
    )
    driver = world.get()()
    token_line.runner = driver.runner(
        Work(first.fetch, argument, coordinator.batch_ended, first.workers, first.executor)
    )
    result_line.runner = driver.runner(
        Work(second.fetch, _token, coordinator.result_ended, second.workers, second.executor)
    )
    # An iterator was given to be used up here; a list, or what else makes iterators, was not.
    close_source = getattr(items, "close", None) if source is items else None
    return Job(source, close_source, coordinator, driver)


_token = attrgetter("token")


def _item(batch: Batch) -> Any:  # noqa: ANN401 - whatever the user's items are
    return batch.outcomes[0].item


def _items(batch: Batch) -> list[Any]:
    return [outcome.item for outcome in batch.outcomes]  # each attempt's own, which it may change
