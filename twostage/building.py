"""Building a job: what was said of it is checked, defaults are filled in, and its parts are put together."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from twostage.answers import Check, batch_check, checked_result, checked_token
from twostage.coordinator import LEAST_IN_PROGRESS, Coordinator
from twostage.driver import world
from twostage.errors import brief
from twostage.handover import FailureLimit, HandOver
from twostage.lines import Line
from twostage.outcomes import Job, Source
from twostage.retry import DEFAULT_ATTEMPTS, Judge, RetryPolicy, check_policy, repeats
from twostage.runners import Work
from twostage.splits import Splits, refuses_batch
from twostage.stage import (
    Default,
    Failures,
    Stage,
    check_bool,
    check_function,
    failure_test,
    positive_int,
    positive_seconds,
)
from twostage.twins import Twins

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from concurrent.futures import Executor

    from twostage.calls import Batch

__all__ = ["RESULT_WORKERS", "TOKEN_WORKERS", "ItemsOptions", "RunOptions", "build", "settled"]

ValueT = TypeVar("ValueT")

TOKEN_WORKERS = 4
RESULT_WORKERS = 32
LEAST_WINDOW = 10_000


class ItemsOptions(NamedTuple):
    """What is said of the items, not checked yet."""

    key: Callable[[Any], Hashable] | None
    refresh_token_on: Failures | None
    max_refreshes: int
    window: int | None


class RunOptions(NamedTuple):
    """What is said of the run, not checked yet."""

    return_exceptions: bool
    timeout: float | None
    max_failures: float | None
    ordered: bool = False
    linger: float | None = None


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


def settled(
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


def build(
    items: Iterable[Any],
    first: _Settings,
    second: _Settings,
    items_options: ItemsOptions,
    run_options: RunOptions,
    results: list[Any] | None = None,
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
    timeout = math.inf if run_options.timeout is None else positive_seconds(run_options.timeout, "timeout")
    linger = math.inf if run_options.linger is None else positive_seconds(run_options.linger, "linger")
    failure_limit = _failure_limit(run_options, many=first.many)
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
    twins = None if key is None else Twins()
    coordinator = Coordinator(
        token_line,
        result_line,
        batch_size=batch_size,
        bound=bound,
        window=window,
        handing=HandOver(
            results=results,
            whole=failure_limit is not None,
            ordered=run_options.ordered,
            twins=twins,
            many=first.many,
        ),
        return_exceptions=run_options.return_exceptions,
        tokens_first=first.executor is not None and first.executor is second.executor,
        many=first.many,
        twins=twins,
        max_refreshes=max_refreshes,
        timeout=timeout,
        too_many=None if failure_limit is None else failure_limit.passed,
        linger=linger,
    )
    driver = world.get()()
    token_line.runner = driver.runner(
        Work(
            token_line.name,
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
            result_line.name,
            second.fetch,
            _tokens if in_batches else _token,
            coordinator.results_ended if in_batches else coordinator.result_ended,
            second.workers,
            second.executor,
        )
    )
    # An iterator was given to be used up here; a list, or what else makes iterators, was not.
    close_source = getattr(items, "close", None) if source is items else None
    reading = Source(source, close_source, key)
    if run_options.linger is not None:
        coordinator.reader = driver.reader(reading, coordinator.item_read)
    return Job(reading, coordinator, driver)


def _failure_limit(options: RunOptions, *, many: bool) -> FailureLimit | None:
    most: object = options.max_failures
    if most is None:
        return None
    if not options.return_exceptions:
        raise TypeError(
            "max_failures is given without return_exceptions=True, so that the first failure ends the job"
        )
    if not isinstance(most, float):
        return FailureLimit(positive_int(most, "max_failures"), many=many)
    if not 0 < most < 1:
        raise ValueError(f"max_failures is {most}; expected a number of failures, or a share between 0 and 1")
    return FailureLimit(most, many=many)


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
    return batch.members[0].item  # type: ignore[union-attr] # at stage one they are outcomes


def _items(batch: Batch) -> list[Any]:
    return [member.item for member in batch.members]  # type: ignore[union-attr] # as above
