"""The two stages of a job: settled, of what is said in them and beside them; and what is made of that."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from twostage.answers.answers import Check, batch_check, checked_result, checked_token
from twostage.answers.splits import Splits
from twostage.base.checks import check_fetch
from twostage.base.options import COROUTINES, RESULT_WORKERS, TOKEN_WORKERS, Default
from twostage.base.runner import Work
from twostage.base.words import STAGES
from twostage.core.lines import Line
from twostage.failing.retry import DEFAULT_ATTEMPTS, Judge, RetryPolicy, check_policy, repeats
from twostage.job.driver import LoopDriver
from twostage.pace.pace import Pace
from twostage.pace.rates import HungGate, RateGate, rates_of
from twostage.running.holding import check_not_held, variables_for
from twostage.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from twostage.answers.refreshing import Refreshing
    from twostage.base.as_completed import Handler
    from twostage.base.gate import Gate
    from twostage.base.options import JobOptions
    from twostage.base.records import Batch
    from twostage.job.driver import Driver
    from twostage.observing.events import Listeners

__all__ = ["Settings", "arguments_of", "executor_of", "line_of", "settled", "work_of"]

ValueT = TypeVar("ValueT")


class Settings(NamedTuple):
    """One stage.

    Attributes:
        number: Which, 1 or 2.
        name: What its function is called in messages.
        stage: What was said in its place.
        batch_size: How many items, or tokens, a call takes at most; `None` if it takes one by itself.
        workers: How many attempts run at once.
        retry: What is tried again.
        many: Whether an item has many tokens; of stage one.
    """

    number: int
    name: str
    stage: Stage[Any, Any]
    batch_size: int | None
    workers: int
    retry: RetryPolicy
    many: bool


def settled(
    fetch_token: Callable[[Any], Any] | Stage[Any, Any],
    fetch_result: Callable[[Any], Any] | Stage[Any, Any],
    options: JobOptions,
) -> tuple[Settings, Settings]:
    """Fills the defaults in.

    Raises:
        TypeError: What stands for a stage is none, or something is said twice.
    """
    first, second = _stage(fetch_token, "fetch_token"), _stage(fetch_result, "fetch_result")
    if second.many is True:
        raise TypeError("fetch_result's Stage has many=True; only items have many tokens, at stage one")
    shorthand = {
        "batch_size": ("batch_size", options.batch_size),
        "workers": ("token_workers", options.token_workers),
        "many": ("many", options.many),
    }
    policy = DEFAULT_ATTEMPTS if isinstance(options.retry, Default) else check_policy(options.retry, "retry")
    return (
        _settings(1, "fetch_token", first, TOKEN_WORKERS, policy, shorthand),
        _settings(
            2,
            "fetch_result",
            second,
            RESULT_WORKERS,
            policy,
            {"workers": ("result_workers", options.result_workers)},
        ),
    )


def _stage(fetch: Callable[[Any], Any] | Stage[Any, Any], name: str) -> Stage[Any, Any]:
    if isinstance(fetch, Stage):
        return fetch
    check_fetch(fetch, name)
    return Stage(fetch)


def _settings(
    number: int,
    name: str,
    stage: Stage[Any, Any],
    workers: int,
    policy: RetryPolicy,
    shorthand: dict[str, tuple[str, Any]],
) -> Settings:
    def said(setting: str, default: ValueT) -> ValueT:
        """Returns what is said of a setting, in the stage or beside it, but not in both places."""
        places = [*([shorthand[setting]] if setting in shorthand else [])]
        places.append((f"{setting} of {name}'s Stage", getattr(stage, setting)))
        given = [(place, value) for place, value in places if not isinstance(value, Default)]
        if len(given) > 1:
            both = " and ".join(f"{place} ({value!r})" for place, value in given)
            raise TypeError(f"{both} are both given; expected one")
        return given[0][1] if given else default

    batch_size = said("batch_size", None)
    if stage.retry_missing and batch_size is None:
        raise TypeError(
            f"{name}'s Stage has retry_missing=True, but no batch_size: one item is never left out"
        )
    return Settings(
        number,
        name,
        stage,
        batch_size,
        said("workers", COROUTINES if stage.awaits else workers),
        policy if isinstance(stage.retry, Default) else stage.retry,
        many=said("many", default=False),
    )


# --- what is made of it


def line_of(
    settings: Settings,
    argument: Callable[[Any], Any],
    listeners: Listeners,
    *,
    ahead: bool,
    refreshing: Refreshing | None = None,
) -> Line:
    """Returns where a stage's calls wait, and what decides on them.

    Args:
        settings: The stage's.
        argument: Gives its function what it takes, of a call.
        listeners: Hear of its pauses.
        ahead: Whether calls may be handed over that no worker is free for.
        refreshing: Which failures want a new token.
    """
    stage, batch_size, workers = settings.stage, settings.batch_size, settings.workers
    one = settings.number == 1
    check: Check = checked_token if one else checked_result
    if batch_size is not None:
        check = batch_check(settings.name, argument)
    gates: list[Gate] = [RateGate(rate, argument) for rate in rates_of(stage.rate, "rate")]
    if stage.attempt_timeout is not None:
        gates.append(HungGate(STAGES[settings.number], workers, stage.patience, keep_places=stage.awaits))
    return Line(
        settings.number,
        workers,
        math.inf if ahead and (stage.executor is None or stage.awaits) and not gates else workers,
        check,
        Judge(
            settings.retry,
            retry_missing=stage.retry_missing,
            refresh_on=None if refreshing is None else refreshing.wants,
        ),
        Pace(
            settings.number,
            workers,
            pause=stage.pause,
            patience=stage.patience,
            adaptive=stage.adaptive,
            tell=lambda held: listeners.tell(listeners.held_back, held),
        ),
        slots=batch_size is not None,
        batch_size=1 if one and batch_size is None else batch_size,
        refusals=Splits.of(stage.bisect) if batch_size is not None and repeats(settings.retry) else None,
        gates=gates,
        timed=stage.attempt_timeout is not None,
        observed=bool(listeners.attempt_ended),
    )


def executor_of(settings: Settings, other: Settings, driver: Driver) -> Executor | None:
    """Returns where a stage's attempts run: coroutines on the other one's loop, as clients belong to one."""
    stage = settings.stage
    shared = stage.executor is None and stage.awaits and other.stage.awaits
    executor = other.stage.executor if shared else stage.executor
    awaited = isinstance(driver, LoopDriver) and stage.awaits  # an attempt that waits holds no worker then
    if executor is not None and not awaited:
        check_not_held(executor, f"the executor of {settings.name}'s Stage")
    return executor


def work_of(
    settings: Settings,
    argument: Callable[[Any], Any],
    ended: Handler,
    executor: Executor | None,
    listeners: Listeners,
) -> Work:
    """Returns what a runner has to know of a stage."""
    stage = settings.stage
    return Work(
        STAGES[settings.number],
        stage.fetch,
        argument,
        ended,
        settings.workers,
        variables_for(executor),
        executor,
        stage.attempt_timeout,
        rated=bool(rates_of(stage.rate, "rate")),
        awaits=stage.awaits,
        context=stage.context,
        observed=bool(listeners.attempt_ended),
    )


def arguments_of(first: Settings, second: Settings) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Returns what gives each stage's function its argument, of a call."""
    return _item if first.batch_size is None else _items, _token if second.batch_size is None else _tokens


_token = attrgetter("token")


def _tokens(batch: Batch) -> list[Any]:
    return [member.token for member in batch.members]  # each attempt's own list, which it may change


def _item(batch: Batch) -> Any:  # noqa: ANN401 - whatever the user's items are
    return batch.members[0].item  # type: ignore[union-attr] # at stage one they are outcomes


def _items(batch: Batch) -> list[Any]:
    return [member.item for member in batch.members]  # type: ignore[union-attr] # as above
