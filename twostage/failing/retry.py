"""What is to become of a failed attempt: tenacity's policies, asked without ever sleeping."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import tenacity
from tenacity import RetryCallState, Retrying
from tenacity.retry import (
    retry_all,
    retry_any,
    retry_if_exception,
    retry_if_exception_cause_type,
    retry_if_exception_message,
    retry_if_exception_type,
    retry_never,
)
from tenacity.stop import stop_after_attempt, stop_never
from tenacity.wait import wait_random_exponential

from twostage.base.words import warn
from twostage.errors import MissingToken
from twostage.failing.throttling import (
    FIRST_WAIT,
    LONGEST_PAUSE,
    LONGEST_WAIT,
    Throttled,
    retry_after,
    wait_retry_after,
)
from twostage.failing.transient import is_transient

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.base.records import Call

__all__ = [
    "Answer",
    "CallState",
    "End",
    "Fail",
    "Judge",
    "Refresh",
    "Retry",
    "RetryPolicy",
    "Verdict",
    "check_policy",
    "default_policy",
    "repeats",
]

RetryPolicy: TypeAlias = Retrying | int | None
"""A tenacity policy, the default one with that many attempts in all, or none."""

DEFAULT_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Retry:
    """Make another attempt, at `due` on the job's clock; `failure` is what the call else ends with."""

    due: float
    failure: Exception | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Refresh:
    """Get the item a new token, since `error` says that the one it has is no good any more."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Fail:
    """Give up: the call ends with `error`, which may pass if the policy wanted to go on and was to stop."""

    error: Exception
    may_pass: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """Take `value` as what the call returned; with `given` it is a policy's last word in its place."""

    value: Any
    given: bool = False


@dataclass(frozen=True, slots=True)
class Late:
    """Another attempt would come after the run's end; `failure` is what the call ends with, if it has one."""

    failure: Exception | None


Verdict: TypeAlias = Retry | Refresh | Fail | Late | Answer


class End(NamedTuple):
    """How an attempt ended, and in what times.

    Attributes:
        answer: What it returned, if it did.
        error: Its failure, if it has failed.
        now: The time.
        excused: Whether the API's state is to blame: then it does not count for the policy's stop.
        paused: For how many seconds the stage has been held back in all, which do not count there either.
        paused_by: For how many it had been when the attempt began.
    """

    answer: object
    error: Exception | None
    now: float
    excused: bool = False
    paused: float = 0.0
    paused_by: float = 0.0


class CallState(RetryCallState):
    """tenacity's state of a call, and what is not to count in it.

    Attributes:
        excused: How many of its attempts.
        is_excused: Whether the last one is; of a batch, the slot that is asked about.
        excused_last: The number of the last one that is.
        paused: How many seconds of pauses `start_time` knows of.
    """

    excused = 0
    is_excused = False
    excused_last = 0
    paused = 0.0


class Judge:
    """Gives the verdict on the ends of a stage's attempts, as its tenacity policy has it.

    Only the decision is tenacity's: `Retrying.iter` is asked once for each end, with the times and
    the attempt number that the coordinator knows. Its sleep and its `before` are never called.

    Args:
        policy: Of the stage.
        retry_missing: Whether what a batch's answer has left out is asked for again.
        refresh_on: Which failures ask for a new token; `None` for none.

    Attributes:
        judges_results: Whether the policy has to see what calls return. If not, a success costs nothing.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        retry_missing: bool = False,
        refresh_on: Callable[[Exception], bool] | None = None,
    ) -> None:
        if isinstance(policy, int):
            policy = default_policy(policy)
        # A copy, since tenacity keeps what it is doing on the policy, and jobs may share one.
        self._policy = policy.copy() if isinstance(policy, Retrying) and repeats(policy) else None
        if self._policy is not None and retry_missing:
            self._policy.retry = retry_any(retry_if_exception_type(MissingToken), self._policy.retry)
        if self._policy is not None:
            self._policy.stop = partial(_stops, self._policy.stop)
        self._refresh_on = refresh_on
        self.judges_results = self._policy is not None and not _sees_exceptions_only(self._policy.retry)

    def judge(self, call: Call, end: End, again: Retry | None = None) -> Verdict:
        """Returns what is to become of `call`, whose last attempt has ended.

        Args:
            call: It, or the batch of which this is one slot.
            end: How.
            again: The verdict on another slot of the same answer. This one would go with it, so neither
                is its wait drawn again, unless the slot itself asks for one, nor are callbacks called twice.
        """
        error = end.error
        if error is not None and self._refresh_on is not None and self._refresh_on(error):
            return Refresh(error)
        if self._policy is None:
            return Answer(end.answer) if error is None else Fail(error)
        if isinstance(error, Throttled):
            due = end.now + min(error.seconds, LONGEST_PAUSE)
            return Retry(due if again is None else max(due, again.due), error)
        return self._ask(self._policy, call, end, again)

    def _ask(self, policy: Retrying, call: Call, end: End, again: Retry | None) -> Verdict:
        answer, error, now, excused, paused, paused_by = end
        state = call.retry_state
        if state is None:
            state = call.retry_state = CallState(policy, None, (), {})
            state.start_time = call.began  # the first attempt's
            state.paused = paused_by
        state.start_time += paused - state.paused
        state.paused = paused
        state.is_excused = excused
        if excused and state.excused_last != call.attempts:  # once, in however many slots of an answer
            state.excused += 1
            state.excused_last = call.attempts
        failure = None if error is None else _asked_for(error)
        traceback = None if failure is None else failure.__traceback__
        state.attempt_number = call.attempts
        state.outcome = tenacity.Future.construct(
            call.attempts, answer if error is None else error, error is not None
        )
        state.outcome_timestamp = now
        policy.begin()  # `iter` counts in statistics that are each thread's own
        try:
            if again is not None:
                if isinstance(error, tenacity.TryAgain) or policy.retry(state):
                    asks = error is not None and retry_after(error)
                    due = max(again.due, _due(now, policy.wait(state))) if asks else again.due
                    return Retry(due, failure)
                return Answer(answer) if failure is None else Fail(failure)
            verdict = policy.iter(state)
            retry = Retry(_due(now, verdict), failure) if isinstance(verdict, tenacity.DoSleep) else None
        except Exception as raised:
            if failure is not None and (raised is failure or raised is error):
                state_now = policy.iter_state
                may_pass = state_now.is_explicit_retry or state_now.retry_run_result
                return Fail(failure.with_traceback(traceback), may_pass)  # without tenacity's frames
            if not isinstance(raised, policy.retry_error_cls):
                raise  # the policy is broken, not the call
            # Its traceback holds it: a cycle that would keep the call until the collector runs.
            raised.__traceback__ = None
            return Fail(raised if failure is None else failure, may_pass=True)
        finally:
            state.outcome = None  # what a call returned is kept by nobody but its outcome
            del error, failure, answer, end
        return Answer(verdict) if retry is None else retry


def _due(now: float, wait: float) -> float:
    if not math.isfinite(wait):
        raise ValueError(f"the retry policy's wait is {wait}; expected a finite number of seconds")
    return now + wait


def _stops(stop: Callable[[RetryCallState], bool], state: CallState) -> bool:
    """Whether a policy stops, as if attempts that are excused had not been."""
    if state.is_excused:
        return False
    state.attempt_number -= state.excused
    try:
        return stop(state)
    finally:
        state.attempt_number += state.excused


def repeats(policy: RetryPolicy) -> bool:
    """Whether calls under `policy` may be made again, by whatever rule."""
    return policy is not None and getattr(policy, "enabled", True)


def _asked_for(error: Exception) -> Exception:
    """Returns the failure behind a `raise TryAgain`, as tenacity's `reraise` does."""
    behind = error.__cause__ or error.__context__
    return behind if isinstance(error, tenacity.TryAgain) and isinstance(behind, Exception) else error


def _sees_exceptions_only(predicate: object) -> bool:
    """Whether `predicate` is sure to let every result pass.

    Exact types, since many a subclass of `retry_if_exception` asks for a retry of each success.
    """
    if type(predicate) in (retry_any, retry_all):
        retries = predicate.retries  # type: ignore[attr-defined] # narrowed by type, not by isinstance
        return all(map(_sees_exceptions_only, retries))
    return predicate is retry_never or type(predicate) in (
        retry_if_exception,
        retry_if_exception_type,
        retry_if_exception_message,
        retry_if_exception_cause_type,
    )


def default_policy(attempts: int = DEFAULT_ATTEMPTS) -> Retrying:
    """Returns the policy for transient failures: `attempts` in all, with growing waits between them.

    Where the API's answer asks for a wait, it is that one.
    """
    return Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(attempts),
        wait=wait_retry_after(wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)),
    )


def check_policy(policy: object, name: str) -> RetryPolicy:
    """Returns `policy` if it can be one.

    Args:
        policy: What the user gave.
        name: How the argument is called, for messages.

    Raises:
        TypeError: It is none of those that `RetryPolicy` names, or has coroutine functions in it.
        ValueError: It is a number below 1.
    """
    expected = "a tenacity Retrying, a number of attempts, or None"
    if policy is None:
        return None
    if isinstance(policy, int) and not isinstance(policy, bool):
        if policy < 1:
            raise ValueError(f"{name} is {policy}; expected at least 1 attempt (1 means no retry)")
        return policy
    if isinstance(policy, tenacity.AsyncRetrying):
        raise TypeError(f"{name} is an AsyncRetrying, which decides in coroutines; pass a Retrying instead")
    if not isinstance(policy, Retrying):
        raise TypeError(f"{name} is {policy!r}; expected {expected}")
    for part in ("retry", "stop", "wait", "after", "before_sleep", "retry_error_callback"):
        if _is_async(getattr(policy, part)):
            raise TypeError(f"{name} has a coroutine function as its {part}; expected a plain function there")
    if policy.stop is stop_never and getattr(policy, "enabled", True):
        warn(f"{name} has no stop: what always fails is tried for ever; add e.g. stop=stop_after_attempt(8)")
    return policy


def _is_async(part: object) -> bool:
    inner = (*getattr(part, "retries", ()), getattr(part, "predicate", None))
    return (
        inspect.iscoroutinefunction(part)
        or inspect.iscoroutinefunction(getattr(type(part), "__call__", None))  # noqa: B004 - not "is it callable?"
        or any(_is_async(one) for one in inner if one is not None)
    )
