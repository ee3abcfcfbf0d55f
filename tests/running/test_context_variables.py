"""The caller's context variables reach all functions of the user's, and each attempt has its own copy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import pytest
from common import AT_ONCE
from forms import each_way, run
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_none

from twostage import Rate, Stage, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forms import Run

    from twostage.testing import VirtualTime

span: ContextVar[str] = ContextVar("span", default="none")


@pytest.fixture(autouse=True)
def _inside_a_span() -> Iterator[None]:
    token = span.set("the caller's")
    yield
    span.reset(token)


def seen(argument: object) -> tuple[object, str]:
    before = span.get()
    span.set(f"of {argument}")
    return argument, before


def seen_after(token: tuple[object, str]) -> tuple[str, str]:
    return token[1], seen(token)[1]


HERE = ("the caller's", "the caller's")


@each_way
def test_each_attempt_has_a_copy_of_the_callers_on_pools_of_our_own(job: Run) -> None:
    assert job(range(200), seen, seen_after) == [HERE] * 200
    assert span.get() == "the caller's"


@each_way
@pytest.mark.parametrize("rate", [None, Rate(1000, per=0.001)])
def test_each_attempt_has_one_on_executors_of_the_users(job: Run, rate: Rate | None) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = (Stage(fetch, executor=pool, rate=rate) for fetch in (seen, seen_after))
        assert job(range(50), first, second) == [HERE] * 50


def test_each_attempt_has_one_in_virtual_time(virtual: VirtualTime) -> None:
    assert run(range(20), seen, seen_after) == [HERE] * 20


def test_second_attempt_sees_nothing_of_the_first() -> None:
    attempts: list[str] = []

    def fails_once(token: int) -> int:
        attempts.append(span.get())
        span.set("the first attempt's")
        if len(attempts) == 1:
            raise ConnectionError
        return token

    run_two_stage([1], int, fails_once, retry=AT_ONCE)
    assert attempts == ["the caller's"] * 2


def test_job_has_the_variables_of_where_it_was_made() -> None:
    outcomes = iter_two_stage([1], seen, seen_after)
    span.set("a later one")
    with outcomes:
        assert [outcome.result for outcome in outcomes] == [HERE]


def test_predicates_and_callbacks_see_them() -> None:
    told: list[str] = []

    def tell(_: object) -> Any:  # noqa: ANN401 - of any use
        told.append(span.get())
        return False

    policy = Retrying(
        retry=retry_if_exception(lambda error: tell(error) is None),
        stop=stop_after_attempt(2),
        wait=wait_none(),
    )

    def fails(_: object) -> None:
        raise ValueError

    run(
        [1, 2],
        Stage(list, batch_size=2),
        Stage(fails, retry=policy, rate=Rate(10, per=0.001, cost=lambda token: 1 + bool(tell(token)))),
        refresh_token_on=tell,
        return_exceptions=True,
    )
    assert len(told) >= 6
    assert set(told) == {"the caller's"}


def test_source_with_a_thread_of_its_own_sees_them() -> None:
    def source() -> Iterator[tuple[str, str]]:
        yield span.get(), threading.current_thread().name

    with iter_two_stage(source(), tuple, tuple, linger=0.1) as outcomes:
        assert [outcome.result for outcome in outcomes] == [("the caller's", "twostage-source")]


# --- jobs inside of attempts


def test_job_on_the_executor_that_its_caller_holds_a_thread_of_is_refused() -> None:
    with ThreadPoolExecutor(1) as pool:

        def nested(token: int) -> list[int]:
            return run_two_stage([token], int, Stage(int, executor=pool))

        with pytest.raises(
            RuntimeError, match="the executor of fetch_result's Stage runs the attempt that starts"
        ):
            run_two_stage([1], int, Stage(nested, executor=pool))

        def deeper(token: int) -> list[list[int]]:
            return run_two_stage([token], abs, nested)

        with pytest.raises(RuntimeError, match="expected another executor"):
            run_two_stage([1], Stage(deeper, executor=pool), len)


def test_job_inside_of_an_attempt_may_have_another_executor_or_none() -> None:
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:

        def nested(token: int) -> list[int]:
            return run_two_stage([token], int, Stage(int, executor=other))

        assert run_two_stage([1], int, Stage(nested, executor=pool)) == [[1]]
        assert run_two_stage([2], int, Stage(nested)) == [[2]]
        assert copy_context().run(nested, 3) == [3]
        assert run_two_stage([4], int, Stage(int, executor=pool)) == [4]
