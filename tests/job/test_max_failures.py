"""A job that returns exceptions, and ends all the same when too many of its items have failed."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS, PATIENCE, nothing_collected, ours, source_of, until
from fakes import AnyOutcome, ExpiredError, Fake, each, in_virtual_time, notes, refusing, stage
from forms import Run, each_way, run
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from twostage import RunTimeout, TooManyFailures, iter_two_stage, run_two_stage
from twostage.core.coordinator import Coordinator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from twostage.testing import VirtualTime

in_each_order = pytest.mark.parametrize("ordered", [False, True])


def failing(bad: Collection[int]) -> Callable[[int], int]:
    """Makes a function that fails for some numbers."""

    def answer(number: int) -> int:
        if number in bad:
            raise LookupError(number)
        return number

    return answer


def one_after_another(answer: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a stage of any job
    return stage(Fake(answer, 1.0), workers=1, retry=None)


def ended(job: Run, items: Iterable[Any], *functions: Any, **settings: Any) -> TooManyFailures:  # noqa: ANN401
    """Returns what a job ends with."""
    with pytest.raises(TooManyFailures) as raised:
        job(items, *functions, return_exceptions=True, **settings)
    return raised.value


def ends(most: float, *kinds: tuple[bool, int]) -> int | None:
    """Returns how many items of these kinds, failed or not, are done when a job ends early, if it does."""
    failed = [one for kind, number in kinds for one in [kind] * number]
    bad = {index for index, one in enumerate(failed) if one}
    done = 0
    second = one_after_another(failing(bad))
    with iter_two_stage(
        range(len(failed)), int, second, max_failures=most, return_exceptions=True
    ) as outcomes:
        try:
            for done, _ in enumerate(outcomes, 1):  # noqa: B007 - how many is the question
                pass
        except TooManyFailures:
            return done
    assert done == len(failed)
    return None


BAD, GOOD = True, False


# --- a number


@in_virtual_time
@each_way
def test_as_many_failures_as_allowed_are_results(job: Run) -> None:
    results = job(
        range(20), int, one_after_another(failing({3, 9, 19})), max_failures=3, return_exceptions=True
    )
    assert [index for index, result in enumerate(results) if isinstance(result, LookupError)] == [3, 9, 19]
    assert [result for result in results if isinstance(result, int)] == [
        number for number in range(20) if number not in {3, 9, 19}
    ]


@each_way
def test_one_more_ends_the_job_with_the_last_of_them_as_its_cause(job: Run, virtual: VirtualTime) -> None:
    closed: list[str] = []
    fetch = Fake(failing({1, 3, 5, 7}), 1.0)
    error = ended(
        job,
        source_of(count(), closed),
        int,
        stage(fetch, workers=1, retry=None),
        max_failures=2,
        window=50,
    )
    assert str(error) == "3 items failed, more than max_failures=2 allows; the last one is 5"
    assert repr(error.__cause__) == "LookupError(5)"
    assert notes(error.__cause__) == ["twostage: stage two, 5, 1 attempt"]
    assert fetch.asked == [0, 1, 2, 3, 4, 5]
    assert virtual.now == 6.0
    assert len(closed) == 1


@in_virtual_time
def test_list_s_error_has_the_outcomes_that_are_done_in_order() -> None:
    """Those that ran when the limit was passed are among them."""
    fetch = Fake(failing({4, 5}), lambda number: 1.0 if number % 2 else 1.5)
    error = ended(run, range(50), int, stage(fetch, workers=2, retry=None), max_failures=1)
    assert [outcome.index for outcome in error.outcomes] == sorted(fetch.asked)
    assert [outcome.item for outcome in error.outcomes if outcome.exception is not None] == [4, 5]
    assert [outcome.result for outcome in error.outcomes if outcome.exception is None] == [
        number for number in sorted(fetch.asked) if number not in {4, 5}
    ]


@in_virtual_time
@in_each_order
def test_stream_hands_over_what_is_done_and_then_raises(*, ordered: bool) -> None:
    """The first item is not done when the second one fails, and is awaited as it runs."""
    fetch = Fake(failing({1, 2}), lambda number: 9.0 if number == 0 else 1.0 + number / 10)
    taken: list[AnyOutcome] = []
    with iter_two_stage(
        range(50),
        int,
        stage(fetch, workers=4, retry=None),
        ordered=ordered,
        max_failures=1,
        return_exceptions=True,
    ) as outcomes:
        with pytest.raises(TooManyFailures) as raised:
            taken.extend(outcomes)
        assert next(outcomes, None) is None
    assert [outcome.index for outcome in taken] == ([0, 1, 2, 3, 4] if ordered else [1, 2, 3, 4, 0])
    assert [outcome.index for outcome in taken if outcome.exception is not None] == [1, 2]
    assert raised.value.__cause__ is next(one for one in taken if one.index == 2).exception
    assert raised.value.outcomes == ()


@in_virtual_time
def test_in_order_what_is_done_behind_a_gap_is_handed_over_too() -> None:
    """The second item waits for its next attempt when the job ends."""

    def answer(number: int) -> int:
        if number == 1:
            raise ConnectionError
        return failing({2, 4})(number)

    hour = Retrying(
        retry=retry_if_exception_type(ConnectionError), stop=stop_after_attempt(2), wait=wait_fixed(3600)
    )
    second = stage(Fake(answer, 1.0), workers=1, retry=hour)
    settings: dict[str, Any] = {"max_failures": 1, "return_exceptions": True, "ordered": True}
    taken: list[AnyOutcome] = []
    with iter_two_stage(range(9), int, second, **settings) as outcomes, pytest.raises(TooManyFailures):
        taken.extend(outcomes)
    assert [outcome.index for outcome in taken] == [0, 2, 3, 4]


# --- a share


@in_virtual_time
def test_share_is_looked_at_from_twenty_outcomes_on() -> None:
    assert ends(0.5, (BAD, 19)) is None
    assert ends(0.5, (BAD, 20)) == 20
    assert ends(0.01, (BAD, 1), (GOOD, 18)) is None


@in_virtual_time
@each_way
def test_share_that_is_passed_when_it_is_first_looked_at_ends_the_job_after_a_success_too(job: Run) -> None:
    assert ends(0.5, (BAD, 10), (GOOD, 10)) is None
    error = ended(job, range(50), int, one_after_another(failing(range(11))), max_failures=0.5)
    assert (
        str(error) == "11 items failed of the last 20, more than max_failures=0.5 allows; the last one is 10"
    )
    assert repr(error.__cause__) == "LookupError(10)"


@in_virtual_time
def test_share_that_is_met_is_not_passed() -> None:
    assert ends(0.5, (BAD, 10), (GOOD, 10), (GOOD, 1), (BAD, 1)) is None
    assert ends(0.5, (GOOD, 10), (BAD, 11)) == 21
    assert ends(0.25, (GOOD, 75), (BAD, 25)) is None
    assert ends(0.25, (GOOD, 75), (BAD, 26)) == 101


@in_virtual_time
def test_share_is_of_the_last_hundred_outcomes() -> None:
    assert ends(0.5, (GOOD, 1000), (BAD, 51)) == 1051
    assert ends(0.5, (GOOD, 1000), (BAD, 50)) is None
    assert ends(0.5, (GOOD, 60), *[(BAD, 50), (GOOD, 50)] * 5) is None
    assert ends(0.5, (GOOD, 60), *[(BAD, 50), (GOOD, 50)] * 5, (GOOD, 1), (BAD, 51)) == 60 + 500 + 1 + 51


@in_virtual_time
@each_way
def test_share_is_said_with_what_it_is_of(job: Run) -> None:
    error = ended(job, range(500), int, one_after_another(failing(range(100, 400))), max_failures=0.25)
    assert (
        str(error)
        == "26 items failed of the last 100, more than max_failures=0.25 allows; the last one is 125"
    )
    assert repr(error.__cause__) == "LookupError(125)"


# --- what is a failed item


@in_virtual_time
@each_way
def test_items_of_a_batch_that_fails_count_each(job: Run) -> None:
    fetch = Fake(failing(set()), 1.0)
    error = ended(job, range(100), stage(fetch, batch_size=10, workers=1, retry=None), str, max_failures=5)
    assert str(error).startswith("6 items failed, ")
    assert isinstance(error.__cause__, TypeError)  # a list is no number that is hashed
    assert len(fetch.calls) == 1
    if job is run:
        assert [outcome.index for outcome in error.outcomes] == list(range(10))


@in_virtual_time
@each_way
def test_failures_in_a_batch_s_answer_count_each(job: Run) -> None:
    first = stage(lambda batch: [LookupError(item) for item in batch], batch_size=4, workers=1, retry=None)
    error = ended(job, range(100), first, str, max_failures=3)
    assert repr(error.__cause__) == "LookupError(3)"


@in_virtual_time
@each_way
def test_only_items_that_stand_alone_in_the_end_count_of_a_refused_batch(job: Run) -> None:
    fetch = Fake(refusing({3, 17, 39}), 1.0)
    settings: dict[str, Any] = {"batch_size": 10, "return_exceptions": True}
    results = job(range(40), fetch, str, max_failures=3, **settings)
    assert [type(results[item]).__name__ for item in (3, 17, 39)] == ["ApiError"] * 3
    error = ended(job, range(40), fetch, str, batch_size=10, max_failures=2)
    assert str(error).startswith("3 items failed, ")


@in_virtual_time
@each_way
def test_failures_that_are_tried_again_do_not_count(job: Run) -> None:
    fails = dict.fromkeys(range(20), 4)

    def answer(number: int) -> int:
        fails[number] -= 1
        if fails[number] >= 0:
            raise LookupError
        return number

    settings: dict[str, Any] = {"retry": ALWAYS, "max_failures": 1, "return_exceptions": True}
    assert job(range(20), int, Fake(answer, 1.0), **settings) == list(range(20))


@in_virtual_time
@each_way
def test_item_that_gets_a_new_token_counts_when_that_has_failed_too(job: Run) -> None:
    def answer(number: int) -> int:
        raise ExpiredError

    fetch = Fake(answer, 1.0)
    second = stage(fetch, workers=1)
    error = ended(job, range(9), int, second, refresh_token_on=ExpiredError, max_failures=1)
    assert str(error).startswith("2 items failed, ")
    assert isinstance(error.__cause__, ExpiredError)


@in_virtual_time
@each_way
def test_of_many_tokens_a_failed_one_is_a_failed_item_and_so_are_two(job: Run) -> None:
    second = one_after_another(failing({10, 11, 31, 52}))
    first = stage(lambda item: [item * 10 + place for place in range(3)], workers=1)
    settings: dict[str, Any] = {"many": True, "return_exceptions": True}
    results = job(range(9), first, second, max_failures=3, **settings)
    assert [type(one) for one in results[1]] == [LookupError, LookupError, int]
    error = ended(job, range(9), first, second, many=True, max_failures=2)
    assert repr(error.__cause__) == "LookupError(52)"


@in_virtual_time
@each_way
def test_empty_lists_of_tokens_are_no_failures(job: Run) -> None:
    settings: dict[str, Any] = {"many": True, "max_failures": 0.1, "return_exceptions": True}
    assert job(range(30), lambda _: [], str, **settings) == [[]] * 30


@in_virtual_time
@each_way
def test_equal_items_count_each(job: Run) -> None:
    second = one_after_another(failing({1}))
    settings: dict[str, Any] = {"key": int, "batch_size": 3, "return_exceptions": True}
    assert len(job([0, 1, 1], each(int), second, max_failures=2, **settings)) == 3
    error = ended(job, [0, 1, 1], each(int), second, key=int, batch_size=3, max_failures=1)
    assert str(error).startswith("2 items failed, ")


@in_virtual_time
@each_way
def test_items_that_are_late_count(job: Run) -> None:
    error = ended(job, range(9), int, one_after_another(int), timeout=4.5, max_failures=3)
    assert isinstance(error.__cause__, RunTimeout)


# --- how it ends


@each_way
@pytest.mark.parametrize("threads", [None, 3])
def test_on_threads_what_runs_is_awaited_and_counts(
    job: Run, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    begun: list[int] = []
    ending, end = threading.Event(), Coordinator.end

    def end_and_tell(coordinator: Coordinator, error: BaseException | None) -> None:
        end(coordinator, error)
        ending.set()

    def fetch(number: int) -> int:
        begun.append(number)
        if number < 2:
            until(lambda: len(begun) >= 3)
            raise LookupError(number)
        assert ending.wait(PATIENCE)
        return number

    monkeypatch.setattr(Coordinator, "end", end_and_tell)
    executor = None if threads is None else ThreadPoolExecutor(threads)
    second = stage(fetch, workers=3, executor=executor, retry=None)
    error = ended(job, source_of(count(), closed), int, second, max_failures=1)
    if executor is not None:
        executor.shutdown()
    assert isinstance(error.__cause__, LookupError)
    if job is run:
        assert [outcome.index for outcome in error.outcomes] == sorted(begun)
        assert [outcome.result for outcome in error.outcomes[2:]] == sorted(begun)[2:]
    assert len(closed) == 1
    assert not ours()


@each_way
def test_error_is_no_reference_cycle(job: Run) -> None:
    class Failure(LookupError):  # noqa: N818 - a class of Python, so that it can be referred to
        pass

    def fetch(number: int) -> int:
        raise Failure

    def fail() -> list[weakref.ref[BaseException]]:
        try:
            job(range(9), int, fetch, retry=None, max_failures=2, return_exceptions=True)
        except TooManyFailures as error:
            return [weakref.ref(error), weakref.ref(error.__cause__ or error)]
        raise AssertionError

    with nothing_collected():
        assert [one() for one in fail()] == [None, None]


def test_failures_are_not_kept_in_a_stream_that_goes_on() -> None:
    class Failure(LookupError):  # noqa: N818 - a class of Python, so that it can be referred to
        pass

    def fetch(number: int) -> int:
        if number % 3 == 0:
            raise Failure
        return number

    failures: list[weakref.ref[Exception]] = []
    settings: dict[str, Any] = {"max_failures": 0.9, "return_exceptions": True, "retry": None, "window": 100}
    with nothing_collected(), iter_two_stage(iter(range(3000)), int, fetch, **settings) as outcomes:
        for outcome in outcomes:
            if outcome.exception is not None:
                failures.append(weakref.ref(outcome.exception))
            del outcome
            assert sum(failure() is not None for failure in failures) <= 100
    assert len(failures) == 1000


# --- arguments

both = pytest.mark.parametrize("function", [run_two_stage, iter_two_stage])


def refused(kind: type[Exception], function: Callable[..., Any], **settings: Any) -> str:  # noqa: ANN401
    with pytest.raises(kind) as raised:
        function([1], failing([1]), str, **settings)
    return str(raised.value)


@both
@pytest.mark.parametrize("return_exceptions", [None, False])
def test_it_needs_return_exceptions(function: Callable[..., Any], return_exceptions: object) -> None:
    settings = {} if return_exceptions is None else {"return_exceptions": return_exceptions}
    assert "max_failures is given without return_exceptions=True" in refused(
        TypeError, function, max_failures=3, **settings
    )


@both
@pytest.mark.parametrize("value", [True, False, "3", "0.5", [3], Decimal("0.5"), Fraction(1, 2)], ids=repr)
def test_what_is_no_number_is_a_type_error(function: Callable[..., Any], value: object) -> None:
    message = refused(TypeError, function, max_failures=value, return_exceptions=True)
    assert message.startswith(f"max_failures is {value!r}; expected ")


@both
@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, 1.0, 1.5, float("nan"), float("inf")], ids=repr)
def test_number_out_of_range_is_a_value_error(function: Callable[..., Any], value: float) -> None:
    message = refused(ValueError, function, max_failures=value, return_exceptions=True)
    assert message.startswith(f"max_failures is {value!r}; expected ")
