"""`Stage`: all that is set for one of the two steps, checked when it is made."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    Literal,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

from tenacity import BaseRetrying

from twostage.base.checks import (
    Check,
    Failures,
    check_fetch,
    check_function,
    checked_bool,
    failure_test,
    is_coroutine_function,
    positive_int,
    positive_seconds,
    unless_none,
)
from twostage.base.options import DEFAULT_RETRY, ONE_ITEM_A_CALL, ONE_TOKEN_AN_ITEM, Default
from twostage.base.words import warn
from twostage.failing.retry import RetryPolicy, check_policy
from twostage.pace.pace import PATIENCE
from twostage.pace.rates import Rates, rates_of
from twostage.running.async_executor import AsyncExecutor
from twostage.running.processes import check_pickling

if TYPE_CHECKING:
    from collections.abc import Collection
    from concurrent.futures import Executor
    from contextlib import AbstractAsyncContextManager

__all__ = ["Answers", "Many", "Stage"]

InT = TypeVar("InT")
OutT = TypeVar("OutT")
ContextT = TypeVar("ContextT")
InT_contra = TypeVar("InT_contra", contravariant=True)
OutT_co = TypeVar("OutT_co", covariant=True)

Answers: TypeAlias = Mapping[InT, OutT | Exception] | Sequence[OutT | Exception]
"""What a function may return for a batch."""


OneByOne: TypeAlias = "Callable[[InT], Awaitable[OutT]] | Callable[[InT], OutT]"
"""A function, or a coroutine function, that takes one item."""

InBatches: TypeAlias = (
    "Callable[[list[InT]], Awaitable[Answers[InT, OutT]]] | Callable[[list[InT]], Answers[InT, OutT]]"
)
"""One that takes a list of them."""


class Many(Generic[OutT_co]):
    """In the type of a `Stage` it stands for a list of tokens of each item; there are no instances."""


class Options(TypedDict, total=False):
    """The arguments of a `Stage` that its type does not depend on."""

    workers: int | Default
    executor: Executor | None
    retry: RetryPolicy | Default
    bisect: bool | Failures
    retry_missing: bool
    rate: Rates
    adaptive: bool
    pause: bool
    patience: float | None
    attempt_timeout: float | None


WORKERS = Default("4 for stage one, 32 for stage two, 100 for coroutine functions")


@dataclass(frozen=True, eq=False)
class Stage(Generic[InT_contra, OutT_co]):
    """One stage of a job: its function, and how it is called.

    A `Stage` holds settings and no state, so two jobs may use the same one. What a call does, one
    item's or one batch's, is `fetch`'s business alone; with threads, set timeouts there: a call that
    runs cannot be stopped from outside.

    Args:
        fetch: The function, plain or a coroutine function. Stage one's takes an item and returns its token,
            or with `batch_size` a `list` of items and returns as many tokens in their order, or a mapping
            from items to tokens. Stage two's takes a token and returns the result, or with `batch_size` a
            `list` of tokens. An exception in a batch's token's place is the failure of that item alone. A
            plain function is called from several threads at once. A coroutine function is awaited on the
            job's event loop, in one thread; so is one that wraps it (`functools.wraps`): give that an
            `executor` if it runs the coroutine by itself.
        batch_size: How many items one call takes at most; at stage two how many of the tokens that wait
            when a worker is free. Default: the function takes one item, not a list.
        workers: How many attempts run at once. Default: 4 for stage one, 32 for stage two, 100 for coroutine
            functions.
        executor: Where attempts run, any `concurrent.futures.Executor`; it is never shut down, and
            `workers` is how much of it is used. For processes `fetch` and all that it takes and returns is
            pickled; an exception that can't be comes back as a `RemoteError`. Coroutine functions take an
            `AsyncExecutor`. Default: a pool of threads of the job's own, or an event loop of the job's own,
            the same for both stages.
        retry: A tenacity `Retrying`, which is taken as it is; a number of attempts for the default
            policy; or `None` for calls that must not be repeated. Default: 10 attempts with growing,
            random waits (up to 20 s, or what the API's answer asks for, see `wait_retry_after`), for
            transient failures only (see `is_transient`).
        many: Whether an item has many tokens (stage one only): what else is a token is then a list of
            them, and the item's result the list of their results. Default: no.
        bisect: Which failures of a batch of several items split it in two, again and again, until the bad
            ones stand alone: exception types, or a function that takes an exception. Default: statuses
            400, 413 and 422, and `ValueError` itself. `False`: none.
        retry_missing: Whether items that are left out of a batch's mapping are asked for again, as often
            as `retry` has it. Off, they fail with `MissingToken`.
        rate: How many attempts begin in a second, or a `Rate`, or several, all of which hold. A whole number
            may begin all at once, others are spaced. Default: any.
        adaptive: Whether the number of attempts at once is found out, up to `workers`: it falls when the API
            says that they are too many, and grows while it does not. Default: no.
        pause: Whether an answer that asks for a wait (by `Retry-After`) holds back the whole stage. Off, it
            holds back its own call.
        patience: For how many seconds an API that has answered before is waited for if it is down or only
            says that calls are too many, before `retry` alone decides; and for how many hung attempts may
            hold all workers, before the job ends. `None`: for ever.
        attempt_timeout: How many seconds an attempt may take. One that takes longer fails with
            `AttemptTimeout`: a coroutine is cancelled; a thread is given up and runs on, so there the
            client's own timeout is the better one. Not with an `executor` of threads. Default: no limit.
        context: For a coroutine function: makes an async context manager, such as a client that belongs to
            an event loop. It is entered once in a job, on the loop where `fetch` runs, before its first
            call, and left there at the end; its value is `fetch`'s second argument. Default: `fetch` has one.

    Raises:
        TypeError: An argument is of the wrong kind, or `fetch` can't be pickled for processes.
        ValueError: A number is below 1.

    >>> Stage(str.upper, workers=8, retry=3).workers
    8
    """

    fetch: Callable[..., Any] = field(repr=False)  # a partial shows its arguments, keys among them
    _: KW_ONLY
    batch_size: int | Default | None = ONE_ITEM_A_CALL
    workers: int | Default = WORKERS
    executor: Executor | None = None
    retry: RetryPolicy | Default = DEFAULT_RETRY
    many: bool | Default = ONE_TOKEN_AN_ITEM
    bisect: bool | Failures = True
    retry_missing: bool = False
    rate: Rates = None
    adaptive: bool = False
    pause: bool = True
    patience: float | None = PATIENCE
    attempt_timeout: float | None = None
    context: Callable[[], AbstractAsyncContextManager[Any]] | None = field(default=None, repr=False)

    if TYPE_CHECKING:
        # Rows as in `run.py`.
        # fmt: off
        @overload
        def __init__(self: Stage[InT, Many[OutT]], fetch: Callable[[list[InT], ContextT], Awaitable[Answers[InT, Collection[OutT]]]], *,
                batch_size: int, many: Literal[True], context: Callable[[], AbstractAsyncContextManager[ContextT]], **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, Many[OutT]], fetch: Callable[[InT, ContextT], Awaitable[Collection[OutT]]], *,
                batch_size: Default | None = ..., many: Literal[True], context: Callable[[], AbstractAsyncContextManager[ContextT]], **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, OutT], fetch: Callable[[list[InT], ContextT], Awaitable[Answers[InT, OutT]]], *,
                batch_size: int, many: Literal[False] | Default = ..., context: Callable[[], AbstractAsyncContextManager[ContextT]], **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, OutT], fetch: Callable[[InT, ContextT], Awaitable[OutT]], *,
                batch_size: Default | None = ..., many: Literal[False] | Default = ..., context: Callable[[], AbstractAsyncContextManager[ContextT]], **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, Many[OutT]], fetch: InBatches[InT, Collection[OutT]], *,
                batch_size: int, many: Literal[True], context: None = ..., **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, Many[OutT]], fetch: OneByOne[InT, Collection[OutT]], *,
                batch_size: Default | None = ..., many: Literal[True], context: None = ..., **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, OutT], fetch: InBatches[InT, OutT], *,
                batch_size: int, many: Literal[False] | Default = ..., context: None = ..., **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, OutT], fetch: Callable[[InT], Awaitable[OutT]], *,
                batch_size: Default | None = ..., many: Literal[False] | Default = ..., context: None = ..., **options: Unpack[Options]) -> None: ...
        @overload
        def __init__(self: Stage[InT, OutT], fetch: Callable[[InT], OutT], *,
                batch_size: Default | None = ..., many: Literal[False] | Default = ..., context: None = ..., **options: Unpack[Options]) -> None: ...
        # fmt: on
        def __init__(self, fetch: Callable[..., Any], **settings: Any) -> None: ...

    def __post_init__(self) -> None:
        """Checks what was given, and keeps numbers as what they are."""
        check_fetch(self.fetch, "fetch")
        if isinstance(getattr(self.fetch, "retry", None), BaseRetrying):
            name = getattr(self.fetch, "__qualname__", "fetch")
            warn(
                f"{name} is already under tenacity's @retry, which sleeps in the worker and hides the "
                "retries; pass the plain function, and the policy as retry="
            )
        _check_executor(self.executor, self.fetch)
        if self.executor is not None:
            check_pickling(self.fetch, self.executor)
        if not isinstance(self.bisect, bool):
            failure_test(self.bisect, "bisect")
        rates_of(self.rate, "rate")
        if self.context is not None and not callable(self.context):
            raise TypeError(
                f"context is {self.context!r}; expected a function that makes an async context manager"
            )
        for name, check in CHECKS.items():
            value = getattr(self, name)
            if not isinstance(value, Default):
                object.__setattr__(self, name, check(value, name))
        self._check_awaited()

    def _check_awaited(self) -> None:
        """Checks what depends on whether `fetch` is awaited."""
        if self.awaits:
            if inspect.isasyncgenfunction(self.context):
                raise TypeError("context is an async generator function; put @asynccontextmanager over it")
            if self.context is not None:
                check_function(self.context, "context")
        elif self.context is not None:
            raise TypeError("context is given, and fetch is no coroutine function; expected one of the two")
        elif self.attempt_timeout is not None and self.executor is not None:
            raise TypeError(
                "attempt_timeout is given beside an executor, whose threads are not ours to replace; "
                "expected one of the two"
            )

    @property
    def awaits(self) -> bool:
        """Whether attempts run on an event loop."""
        if self.executor is None:
            return is_coroutine_function(self.fetch)
        return isinstance(self.executor, AsyncExecutor)


def _check_executor(executor: object, fetch: object) -> None:
    if executor is None:
        return
    if isinstance(executor, type) or not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor is {executor!r}; expected a concurrent.futures.Executor")
    plain = type(executor).__module__.startswith("concurrent.futures")
    if plain and is_coroutine_function(fetch, wrapped=False):
        raise TypeError(
            f"executor is a {type(executor).__name__}, and fetch a coroutine function ({fetch!r}); expected "
            "an AsyncExecutor, or none"
        )


CHECKS: Final[dict[str, Check]] = {
    "batch_size": unless_none(positive_int),
    "workers": positive_int,
    "retry": check_policy,
    "many": checked_bool,
    "retry_missing": checked_bool,
    "adaptive": checked_bool,
    "pause": checked_bool,
    "patience": unless_none(positive_seconds),
    "attempt_timeout": unless_none(positive_seconds),
}
"""What makes a setting what it is kept as."""
