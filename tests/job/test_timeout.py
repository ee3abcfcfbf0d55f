"""A run with a timeout: past it nothing starts, what runs counts, and what is left is told of it."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import PATIENCE, books, nothing_collected, ours, source_of, until
from fakes import AnyOutcome, ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, refusing, stage
from forms import Run, each_way, run
from tenacity import Retrying, TryAgain, retry_if_exception, retry_if_result, stop_after_attempt, wait_fixed

from twostage import RunTimeout, Throttled, iter_two_stage, run_two_stage
from twostage.core.coordinator import Coordinator
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

in_each_order = pytest.mark.parametrize("ordered", [False, True])
with_and_without_linger = pytest.mark.parametrize("linger", [None, 1.0])

WORKERS: Final = 3


def persistent(wait: float) -> Retrying:
    """Tries any failure again, five times in all."""
    return Retrying(
        retry=retry_if_exception(lambda _: True), stop=stop_after_attempt(5), wait=wait_fixed(wait)
    )


def stream(*arguments: Any, **settings: Any) -> tuple[list[AnyOutcome], RunTimeout | None]:  # noqa: ANN401 - any job
    """Returns a stream's outcomes, and the timeout that it raises after them, if it does."""
    taken: list[AnyOutcome] = []
    with iter_two_stage(*arguments, **settings) as outcomes:
        try:
            taken.extend(outcomes)  # as far as it comes
        except RunTimeout as error:
            assert next(outcomes, None) is None
            return taken, error
    return taken, None


def late(results: Iterable[Any]) -> list[int]:
    """Returns the indices of the items that were told of the timeout."""
    return [index for index, result in enumerate(results) if isinstance(result, RunTimeout)]


class Source:
    """Numbers, each after a pause; its end as well."""

    def __init__(self, pause: float = 0.0, items: int | None = None, error: Exception | None = None) -> None:
        self.pause = pause
        self.items = items
        self.error = error
        self.read = 0
        self.closed = 0

    def __iter__(self) -> Iterator[int]:
        try:
            for number in count() if self.items is None else range(self.items):
                sleep(self.pause)
                self.read += 1
                yield number
            sleep(self.pause)
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


# --- what becomes of the items


@each_way
def test_past_it_nothing_starts_and_what_runs_counts(job: Run, virtual: VirtualTime) -> None:
    """Tokens come at 1, 2, 3 and 4, results at 3, 4 and 5; the time is over at 3.5."""
    fetch_token = Fake(lambda item: f"token {item}", 1.0, virtual=virtual)
    fetch_result = Fake(str.upper, 2.0, virtual=virtual)
    results = job(range(10), stage(fetch_token, workers=1), fetch_result, timeout=3.5, return_exceptions=True)
    assert results[:3] == ["TOKEN 0", "TOKEN 1", "TOKEN 2"]
    assert late(results) == [3, 4, 5, 6, 7, 8, 9]
    assert [made.began for made in fetch_token.calls] == [0.0, 1.0, 2.0, 3.0]
    assert [made.began for made in fetch_result.calls] == [1.0, 2.0, 3.0]
    assert virtual.now == 5.0


@in_virtual_time
def test_outcome_says_how_far_its_item_came() -> None:
    outcomes = outcomes_of(range(4), stage(Fake(str, 1.0), workers=1), Fake(len, 2.0), timeout=2.5)
    assert [outcome.token for outcome in outcomes] == ["0", "1", "2", None]
    assert [outcome.token_attempts for outcome in outcomes] == [1, 1, 1, 0]
    assert [outcome.result_attempts for outcome in outcomes] == [1, 1, 0, 0]
    assert [outcome.exception is None for outcome in outcomes] == [True, True, False, False]


@in_virtual_time
def test_error_is_a_timeout_and_says_which_without_a_note() -> None:
    (outcome,) = outcomes_of([1], Fake(str, 1.0), str, timeout=0.5)
    assert isinstance(outcome.exception, TimeoutError)
    assert str(outcome.exception) == "the run's timeout of 0.5 s has passed"
    assert notes(outcome.exception) == []
    with pytest.raises(RunTimeout):
        _ = outcome.result


@each_way
def test_timeout_before_the_first_call_has_ended_awaits_the_calls(job: Run, virtual: VirtualTime) -> None:
    closed: list[str] = []
    fetch_token, fetch_result = Fake(str, 10.0, virtual=virtual), Fake(str)
    source = source_of(range(100), closed)
    results = job(source, fetch_token, fetch_result, timeout=1e-9, return_exceptions=True)
    assert late(results) == list(range(100))
    assert fetch_token.asked == [0, 1, 2, 3]
    assert fetch_result.calls == []
    assert virtual.now == 10.0
    assert len(closed) == 1


@each_way
@pytest.mark.parametrize("timeout", [2.0, 2, Fraction(2), 1e300])
def test_timeout_that_does_not_pass_changes_nothing(job: Run, timeout: float, virtual: VirtualTime) -> None:
    assert job(range(4), Fake(str, 0.5), Fake(len, 0.5), timeout=timeout) == [1, 1, 1, 1]
    assert virtual.now == 1.0


def test_timeout_begins_with_the_first_next(virtual: VirtualTime) -> None:
    with iter_two_stage(range(4), Fake(str, 1.0), str, timeout=3.0) as outcomes:
        sleep(100)
        assert len(list(outcomes)) == 4
    assert virtual.now == 101.0


# --- the source


@in_virtual_time
def test_list_reads_what_is_left_and_gives_it_to_each_item() -> None:
    source = Source(items=5000)
    results = run(iter(source), Fake(str, 1.0), str, batch_size=None, timeout=2.5, return_exceptions=True)
    assert results[:8] == [str(number) for number in range(8)]
    assert late(results) == list(range(12 - 4, 5000))
    assert source.closed == 1


@in_virtual_time
@in_each_order
@with_and_without_linger
def test_stream_gives_it_to_what_was_read_and_then_raises(linger: float | None, *, ordered: bool) -> None:
    source = Source(0.0 if linger is None else 0.001)
    fetch_token = Fake(each(str), 1.0)
    outcomes, error = stream(
        iter(source),
        fetch_token,
        str,
        batch_size=5,
        window=50,
        ordered=ordered,
        linger=linger,
        timeout=2.5,
        return_exceptions=True,
    )
    assert error is not None
    indices = [outcome.index for outcome in outcomes]
    assert (indices if ordered else sorted(indices)) == list(range(len(indices)))
    assert source.read - (linger is not None) <= len(indices) <= source.read  # one may be on its way
    done = {outcome.index for outcome in outcomes if outcome.exception is None}
    begun = sorted(fetch_token.asked_items)
    assert sorted(done) == begun[: len(done)]  # the calls that ran at the end gave tokens, and no results
    assert {type(outcome.exception) for outcome in outcomes if outcome.index not in done} == {RunTimeout}
    assert source.closed == 1


@in_virtual_time
@in_each_order
def test_thread_that_reads_the_source_stops_when_the_time_is_over(*, ordered: bool) -> None:
    """The consumer is away then; every tenth of a second an item comes."""
    source = Source(0.1)
    settings: dict[str, Any] = {"ordered": ordered, "linger": 1.0, "timeout": 9.95, "return_exceptions": True}
    with iter_two_stage(iter(source), Fake(str, 1.0), str, **settings) as outcomes:
        next(outcomes)
        sleep(100)
        with pytest.raises(RunTimeout):
            list(outcomes)
    assert source.read == 99 + 1  # one was on its way


@in_virtual_time
@in_each_order
@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_consumer_that_was_away_reads_no_more_than_was_wanted_of_it(pause: float, *, ordered: bool) -> None:
    source = Source(pause)
    settings: dict[str, Any] = {"ordered": ordered, "timeout": 2.5, "return_exceptions": True}
    with iter_two_stage(iter(source), Fake(each(str), 1.0), str, batch_size=10, **settings) as outcomes:
        next(outcomes)
        sleep(100)
        read = source.read
        with pytest.raises(RunTimeout):
            list(outcomes)
    assert source.read <= read + 256  # a bound's worth


@in_virtual_time
@in_each_order
@with_and_without_linger
def test_stream_whose_source_is_at_its_end_just_ends(linger: float | None, *, ordered: bool) -> None:
    settings: dict[str, Any] = {
        "ordered": ordered,
        "linger": linger,
        "timeout": 2.5,
        "return_exceptions": True,
    }
    outcomes, error = stream(range(100), Fake(str, 1.0), str, **settings)
    assert error is None
    assert len(outcomes) == 100
    assert len([one for one in outcomes if isinstance(one.exception, RunTimeout)]) == 100 - 8


@with_and_without_linger
@pytest.mark.parametrize("return_exceptions", [False, True])
def test_source_that_ends_just_then_is_at_its_end(
    linger: float | None, virtual: VirtualTime, *, return_exceptions: bool
) -> None:
    """Its two items come at 1 and 2 and are done at once, and its end comes at 3."""
    source = Source(1.0, items=2)
    settings: dict[str, Any] = {"linger": linger, "timeout": 3.0, "return_exceptions": return_exceptions}
    outcomes, error = stream(iter(source), str, str, **settings)
    assert [outcome.result for outcome in outcomes] == ["0", "1"]
    assert error is None
    assert virtual.now == 3.0
    assert source.closed == 1


@with_and_without_linger
def test_item_that_comes_just_then_is_late(linger: float | None, virtual: VirtualTime) -> None:
    source = Source(1.0)
    settings: dict[str, Any] = {"linger": linger, "timeout": 3.0, "return_exceptions": True}
    outcomes, error = stream(iter(source), str, str, **settings)
    assert [outcome.token for outcome in outcomes] == ["0", "1", None]
    assert late(outcome.exception for outcome in outcomes) == [2]
    assert error is not None
    assert virtual.now == 3.0
    assert source.closed == 1


def test_source_that_is_read_in_a_thread_is_not_waited_for(virtual: VirtualTime) -> None:
    source = Source(1e6)
    outcomes, error = stream(iter(source), str, str, linger=1.0, timeout=3.0, return_exceptions=True)
    assert outcomes == []
    assert error is not None
    assert virtual.now == 3.0
    assert source.closed == 1


@in_virtual_time
@with_and_without_linger
def test_failure_of_the_source_before_the_end_of_the_time_is_what_is_raised(linger: float | None) -> None:
    failing = iter(Source(1.0, items=2, error=LookupError("the source's")))
    with (
        iter_two_stage(failing, str, str, linger=linger, timeout=3.5, return_exceptions=True) as outcomes,
        pytest.raises(LookupError, match="the source's"),
    ):
        list(outcomes)


@in_virtual_time
def test_failure_of_what_is_left_of_the_source_is_raised_from_the_list() -> None:
    source = Source(1.0, items=20, error=LookupError("the source's"))
    with pytest.raises(LookupError, match="the source's"):
        run(iter(source), str, str, timeout=3.5, return_exceptions=True)
    assert source.closed == 1


@in_virtual_time
@in_each_order
def test_consumer_that_was_away_gets_what_is_done_and_what_is_late(*, ordered: bool) -> None:
    source = Source()
    settings: dict[str, Any] = {"ordered": ordered, "timeout": 2.5, "return_exceptions": True, "window": 20}
    with iter_two_stage(iter(source), Fake(str, 1.0), str, **settings) as outcomes:
        taken = [next(outcomes)]
        sleep(100)
        with pytest.raises(RunTimeout):
            taken.extend(outcomes)
    results = [outcome.exception or outcome.result for outcome in taken]
    assert len(results) == source.read
    assert len(late(results)) == source.read - 8


@in_virtual_time
@in_each_order
def test_books_are_in_order_when_all_is_over(*, ordered: bool) -> None:
    first = stage(Fake(list, 1.0), batch_size=2, workers=2)
    second = stage(Fake(str, 1.0), workers=1)
    settings: dict[str, Any] = {"ordered": ordered, "timeout": 2.5, "return_exceptions": True}
    with iter_two_stage(range(400), first, second, **settings) as outcomes:
        assert len(list(outcomes)) == 400
        assert books(outcomes).at_work == 0


# --- failures that would be tried again


@each_way
@pytest.mark.parametrize("wait", [4.0, 4.5, 1e9])
def test_retry_that_would_come_after_it_ends_with_its_own_failure(
    wait: float, job: Run, virtual: VirtualTime
) -> None:
    def answer(token: str) -> str:
        raise LookupError(token)

    results = job(
        range(3), str, Fake(answer, 1.0), timeout=5.0, retry=persistent(wait), return_exceptions=True
    )
    assert [str(error) for error in results] == ["0", "1", "2"]
    assert [notes(error) for error in results] == [
        [f"twostage: stage two, {item}, 1 attempt"] for item in range(3)
    ]
    assert virtual.now == 1.0  # there is nothing to wait for


@each_way
def test_retry_that_comes_before_it_is_made(job: Run, virtual: VirtualTime) -> None:
    fetch = Fake(Failing(LookupError), 1.0, virtual=virtual)
    results = job(range(1), fetch, str, timeout=5.0, retry=persistent(1.0), return_exceptions=True)
    assert [made.began for made in fetch.calls] == [0.0, 2.0, 4.0]
    assert type(results[0]) is LookupError
    assert notes(results[0]) == ["twostage: stage one, 0, 3 attempts"]
    assert virtual.now == 5.0


class Failing:
    """A function that fails always."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error

    def __call__(self, _: object) -> object:
        raise self.error()


@each_way
@pytest.mark.parametrize("stage_one", [False, True])
def test_slots_that_would_be_tried_again_too_late_have_each_their_own_failure(
    job: Run, virtual: VirtualTime, *, stage_one: bool
) -> None:
    failures = [LookupError("a"), None, ApiError(503), LookupError("d")]
    fetch = stage(Fake(lambda _: failures, 1.0), batch_size=4)
    functions = (fetch, str) if stage_one else (stage(list, batch_size=4), fetch)
    results = job(range(4), *functions, timeout=5.0, retry=persistent(4.0), return_exceptions=True)
    assert results[0] is failures[0]
    assert results[1] == ("None" if stage_one else None)
    assert results[2:] == failures[2:]
    assert virtual.now == 1.0


@each_way
def test_slots_that_would_wait_for_a_throttled_one_for_too_long_have_each_their_own_failure(
    job: Run, virtual: VirtualTime
) -> None:
    """They would go again together, when the last of them is due."""
    failures = [LookupError("a"), LookupError("b"), Throttled(100), LookupError("d")]
    fetch = stage(Fake(lambda _: failures, 1.0), batch_size=4)
    results = job(range(4), fetch, str, timeout=5.0, retry=persistent(1.0), return_exceptions=True)
    assert results == failures
    assert virtual.now == 1.0


@in_virtual_time
@each_way
def test_failure_behind_a_try_again_that_comes_too_late_is_the_item_s(job: Run) -> None:
    def fetch(item: str) -> str:
        raise TryAgain from LookupError(item)

    results = job("ab", fetch, str, timeout=5.0, retry=persistent(9.0), return_exceptions=True)
    assert [repr(error) for error in results] == ["LookupError('a')", "LookupError('b')"]


@in_virtual_time
@each_way
def test_retry_that_waits_for_a_worker_at_the_end_is_late(job: Run) -> None:
    """The first item's next attempt is due at 2, but the only worker is busy from 1 to 11."""
    fetch = Fake(lambda item: {}[item] if item == 0 else item, lambda item: 1.0 if item == 0 else 10.0)
    first = stage(fetch, workers=1, retry=persistent(1.0))
    results = job(range(2), first, str, timeout=5.0, return_exceptions=True)
    assert late(results) == [0, 1]  # the second has a token, and no result
    assert fetch.asked == [0, 1]


@each_way
def test_failure_of_a_call_that_ran_at_the_end_is_its_item_s(job: Run, virtual: VirtualTime) -> None:
    fetch = Fake(Failing(LookupError), 10.0)
    results = job(range(2), fetch, str, timeout=5.0, retry=persistent(0.0), return_exceptions=True)
    assert [type(result) for result in results] == [LookupError, LookupError]
    assert len(fetch.calls) == 2
    assert virtual.now == 10.0


@in_virtual_time
@each_way
def test_answer_that_the_policy_refuses_too_late_is_late(job: Run) -> None:
    until_ready = Retrying(
        retry=retry_if_result(lambda answer: answer is None), stop=stop_after_attempt(9), wait=wait_fixed(2.0)
    )
    fetch = Fake(lambda _: None, 1.0)
    results = job(range(2), str, stage(fetch, retry=until_ready), timeout=5.0, return_exceptions=True)
    assert late(results) == [0, 1]
    assert fetch.asked == ["0", "1", "0", "1"]


# --- without return_exceptions


@each_way
def test_it_is_raised_once_and_what_runs_is_awaited(job: Run, virtual: VirtualTime) -> None:
    fetch_token, fetch_result = Fake(str, 1.0), Fake(str, 10.0)
    source = Source()
    with pytest.raises(RunTimeout, match=r"the run's timeout of 2.5 s has passed") as raised:
        job(iter(source), fetch_token, fetch_result, timeout=2.5)
    assert notes(raised.value) == []
    assert len(fetch_token.calls) == 12
    assert len(fetch_result.calls) == 8
    assert virtual.now == 12.0
    assert source.closed == 1


@each_way
@pytest.mark.parametrize("timeout", [1.5, 2.0])
def test_it_is_not_raised_if_what_runs_is_all_there_is(
    timeout: float, job: Run, virtual: VirtualTime
) -> None:
    assert job(range(4), Fake(str, 1.0), Fake(len, 1.0), timeout=timeout) == [1, 1, 1, 1]
    assert virtual.now == 2.0


@each_way
@pytest.mark.parametrize("many", [False, True])
def test_it_is_raised_when_a_call_that_ran_is_not_the_last_of_its_item(
    job: Run, virtual: VirtualTime, *, many: bool
) -> None:
    fetch_result = Fake(str)
    with pytest.raises(RunTimeout):
        job([1], Fake(lambda item: [item] if many else item, 2.0), fetch_result, many=many, timeout=1.5)
    assert fetch_result.calls == []
    assert virtual.now == 2.0


@in_virtual_time
@in_each_order
def test_it_is_raised_after_the_outcomes_that_are_done(*, ordered: bool) -> None:
    """The first item is late itself, and holds back those after it as long as there is hope."""
    fetch_result = Fake(str, lambda number: 1.0 if int(number) else 9.0)
    first = stage(each(str), batch_size=4)
    settings: dict[str, Any] = {"ordered": ordered, "linger": 1.0, "timeout": 2.5}
    outcomes, error = stream(iter(Source(0.25)), first, fetch_result, **settings)
    assert error is not None
    assert outcomes[0 if ordered else -1].result == "0"
    assert sorted(outcome.index for outcome in outcomes) == list(range(len(outcomes)))
    assert {outcome.exception for outcome in outcomes} == {None}


@in_virtual_time
def test_in_order_what_is_done_behind_a_gap_is_handed_over_too() -> None:
    """The first token comes when the time is over, and is the first of those that do."""
    fetch_token = Fake(str, lambda item: 0.5 if item else 2.2)
    outcomes, error = stream(iter(Source(0.5)), fetch_token, str, ordered=True, linger=1.0, timeout=2.6)
    assert error is not None
    assert [outcome.index for outcome in outcomes] == [1, 2, 3]


@each_way
def test_failure_that_would_be_tried_again_too_late_is_raised_as_it_is(
    job: Run, virtual: VirtualTime
) -> None:
    error = LookupError()
    fetch = Fake(Failing(lambda: error), 1.0)
    with pytest.raises(LookupError) as raised:
        job(range(3), fetch, str, timeout=5.0, retry=persistent(4.0))
    assert raised.value is error
    assert virtual.now == 1.0


# --- each kind of call


@in_virtual_time
@each_way
def test_batches_that_run_give_tokens_and_the_others_nothing(job: Run) -> None:
    fetch_tokens = Fake(each(str), 1.0)
    first = stage(fetch_tokens, batch_size=10, workers=1)
    results = job(range(95), first, Fake(str, 0.25), timeout=3.5, return_exceptions=True)
    assert results[:30] == [str(number) for number in range(30)]
    assert late(results) == list(range(30, 95))
    assert fetch_tokens.sizes == [10, 10, 10, 10]


@in_virtual_time
@each_way
def test_batches_of_tokens_that_run_count(job: Run) -> None:
    fetch_results = Fake(each(str.upper), 2.0)
    second = stage(fetch_results, batch_size=4, workers=1)
    results = job("abcdefghijkl", each(str), second, batch_size=12, timeout=3.0, return_exceptions=True)
    assert results[:8] == list("ABCDEFGH")
    assert late(results) == [8, 9, 10, 11]
    assert fetch_results.sizes == [4, 4]


@in_virtual_time
@each_way
def test_of_many_tokens_each_has_what_became_of_it(job: Run) -> None:
    """Of the first item's five tokens two are done and two run; the second item's tokens come too late."""
    first = Fake(lambda item: [f"{item}{place}" for place in range(5)], lambda item: float(item == "b") * 9)
    second = stage(Fake(str.upper, 2.0), workers=2)
    results = job("abcdef", first, second, many=True, token_workers=2, timeout=3.0, return_exceptions=True)
    assert results[0][:4] == ["A0", "A1", "A2", "A3"]
    assert late(results[0]) == [4]
    assert late(results[1]) == [0, 1, 2, 3, 4]


@in_virtual_time
@each_way
def test_item_whose_list_of_tokens_is_not_asked_for_is_late_itself(job: Run) -> None:
    results = job(
        range(3),
        stage(Fake(lambda _: [], 2.0), workers=1),
        str,
        many=True,
        timeout=3.0,
        return_exceptions=True,
    )
    assert results[:2] == [[], []]
    assert late(results) == [2]


@in_virtual_time
@each_way
def test_equal_items_are_late_together(job: Run) -> None:
    fetch = Fake(str, 1.0)
    settings: dict[str, Any] = {"key": str, "timeout": 2.5, "return_exceptions": True}
    results = job([0, 1, 2, 3] * 5, stage(fetch, workers=1), str, **settings)
    assert results == ["0", "1", *results[2:4]] * 5
    assert late(results[:4]) == [2, 3]
    assert fetch.asked == [0, 1, 2]


@in_virtual_time
def test_item_equal_to_one_that_is_done_is_not_late_in_a_list() -> None:
    source = Source(1.0, items=10)
    results = run((number % 2 for number in source), str, str, key=str, timeout=5.5, return_exceptions=True)
    assert results == ["0", "1"] * 5


@each_way
def test_refused_batches_that_wait_for_another_one_keep_their_refusal(job: Run, virtual: VirtualTime) -> None:
    """Of three that are refused at 1 the first is split, and its halves are refused at 2."""
    fetch = Fake(refusing(set(range(12))), 1.0, virtual=virtual)
    settings: dict[str, Any] = {"batch_size": 4, "timeout": 1.5, "return_exceptions": True}
    results = job(range(12), fetch, str, **settings)
    assert late(results) == [0, 1, 2, 3]
    assert [result.status for result in results[4:]] == [400] * 8
    assert fetch.sizes == [4, 4, 4, 2, 2]
    assert virtual.now == 2.0


@each_way
def test_refused_batches_that_wait_are_the_end_without_return_exceptions(
    job: Run, virtual: VirtualTime
) -> None:
    fetch = Fake(refusing(set(range(12))), lambda batch: 1.0 if len(batch) == 4 else 9.0, virtual=virtual)
    with pytest.raises(ApiError, match="status 400") as raised:
        job(range(12), fetch, str, batch_size=4, timeout=1.5)
    assert notes(raised.value) == ["twostage: stage one, 4 items from 4, 1 attempt"]
    assert virtual.now == 10.0


@in_virtual_time
@each_way
def test_halves_that_run_at_the_end_count(job: Run) -> None:
    fetch = Fake(refusing({1}), 1.0)
    results = job(range(8), fetch, str, batch_size=8, timeout=1.5, return_exceptions=True)
    assert late(results) == list(range(8))  # the second half has tokens, and the first one is in quarters
    assert fetch.sizes == [8, 4, 4]


@in_virtual_time
@each_way
def test_item_that_wants_a_new_token_too_late_is_late(job: Run) -> None:
    def answer(token: str) -> str:
        if not int(token):
            raise ExpiredError
        return token

    fetch_token = Fake(str, 1.0)
    results = job(
        range(2),
        fetch_token,
        Fake(answer, 1.0),
        refresh_token_on=ExpiredError,
        timeout=1.5,
        return_exceptions=True,
    )
    assert late(results) == [0]
    assert results[1] == "1"
    assert fetch_token.asked == [0, 1]


@in_virtual_time
@each_way
@pytest.mark.parametrize("many", [False, True])
def test_new_token_that_comes_too_late_is_not_used(job: Run, *, many: bool) -> None:
    def answer(token: str) -> str:
        raise ExpiredError

    fetch_token, fetch_result = Fake(list if many else str, 1.0), Fake(answer, 1.0)
    settings: dict[str, Any] = {
        "refresh_token_on": ExpiredError,
        "many": many,
        "timeout": 2.5,
        "return_exceptions": True,
    }
    results = job(["ab"], fetch_token, fetch_result, **settings)
    assert late(results[0] if many else results) == ([0, 1] if many else [0])
    assert len(fetch_token.calls) == 2
    assert len(fetch_result.calls) == (2 if many else 1)


# --- on threads


class Clock:
    """The time of the threads' driver, which goes on when it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("twostage.job.driver.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when a coordinator has seen that the time is over."""
    event, give_up = threading.Event(), Coordinator._give_up

    def give_up_and_tell(coordinator: Coordinator) -> None:
        give_up(coordinator)
        event.set()

    monkeypatch.setattr(Coordinator, "_give_up", give_up_and_tell)
    return event


class LateWorkers:
    """A function whose calls all run when the time runs out, and return after that."""

    def __init__(self, clock: Clock, over: threading.Event) -> None:
        self.begun: list[int] = []
        self.done: list[int] = []
        self._clock = clock
        self._over = over

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        if number == 0:
            until(lambda: len(self.begun) == WORKERS)
            self._clock.now += 100
        else:
            assert self._over.wait(PATIENCE)
        self.done.append(number)
        return number


@each_way
@pytest.mark.parametrize("threads", [None, WORKERS])
@pytest.mark.parametrize("stage_one", [False, True])
def test_on_threads_what_runs_is_awaited_and_nothing_starts(
    job: Run, clock: Clock, over: threading.Event, threads: int | None, *, stage_one: bool
) -> None:
    closed: list[str] = []
    calls = LateWorkers(clock, over)
    executor = None if threads is None else ThreadPoolExecutor(threads)
    slow = stage(calls, workers=WORKERS, executor=executor)
    functions: tuple[Any, Any] = (slow, int) if stage_one else (stage(list, batch_size=50), slow)
    results = job(source_of(range(50), closed), *functions, timeout=10, return_exceptions=True)
    if executor is not None:
        executor.shutdown()
    assert sorted(calls.begun) == sorted(calls.done) == list(range(WORKERS))
    assert len(results) == 50
    assert late(results) == list(range(0 if stage_one else WORKERS, 50))
    assert len(closed) == 1
    assert not ours()


@each_way
def test_on_threads_what_waits_for_a_busy_executor_is_late(
    job: Run, clock: Clock, over: threading.Event
) -> None:
    """The executor has fewer threads than the stage has workers, so futures wait in it."""
    begun: list[int] = []

    def fetch_tokens(batch: list[int]) -> list[int]:
        if batch == [8]:
            until(lambda: len(begun) == WORKERS)
            clock.now += 100
        return batch

    def fetch_result(token: int) -> int:
        begun.append(token)
        assert over.wait(PATIENCE)
        return token

    with ThreadPoolExecutor(WORKERS) as executor:
        second = stage(fetch_result, workers=WORKERS + 5, executor=executor)
        results = job(range(9), fetch_tokens, second, batch_size=8, timeout=10, return_exceptions=True)
    assert sorted(begun) == results[:WORKERS] == list(range(WORKERS))
    assert late(results) == list(range(WORKERS, 9))


@each_way
def test_on_threads_the_end_of_the_time_needs_nothing_else_to_happen(job: Run, over: threading.Event) -> None:
    def fetch(number: int) -> int:
        assert over.wait(PATIENCE)
        return number

    results = job(range(3), fetch, int, timeout=0.02, return_exceptions=True)
    assert late(results) == [0, 1, 2]
    assert not ours()


@in_each_order
def test_after_a_timeout_nothing_is_kept(clock: Clock, over: threading.Event, *, ordered: bool) -> None:
    class Item:
        """Can be referred to weakly."""

        def __init__(self, number: int) -> None:
            self.number = number

    items: list[weakref.ref[Item]] = []

    def source() -> Iterator[Item]:
        for number in count():
            item = Item(number)
            items.append(weakref.ref(item))
            yield item

    calls = LateWorkers(clock, over)
    first = stage(lambda batch: [item.number for item in batch], batch_size=100)
    second = stage(calls, workers=WORKERS)
    settings: dict[str, Any] = {"timeout": 10, "ordered": ordered, "return_exceptions": True, "window": 1000}
    outcomes = iter_two_stage(source(), first, second, **settings)
    taken = 0
    with nothing_collected():
        try:
            for outcome in outcomes:
                taken += 1
                del outcome
                assert sum(one() is not None for one in items[-1100:]) <= 1000
        except RunTimeout:
            pass
        assert taken == len(items) > 100
        assert [one() for one in items if one() is not None] == []
    gc.collect()
    assert not ours()


# --- arguments


@pytest.mark.parametrize("function", [run_two_stage, iter_two_stage])
@pytest.mark.parametrize("value", [True, "3", Decimal(3), [3], 3j], ids=repr)
def test_timeout_that_is_no_number_is_a_type_error(function: Callable[..., Any], value: object) -> None:
    with pytest.raises(TypeError) as raised:
        function([1], Failing(AssertionError), str, timeout=value)
    assert str(raised.value) == f"timeout is {value!r}; expected a number of seconds"


@pytest.mark.parametrize("function", [run_two_stage, iter_two_stage])
@pytest.mark.parametrize("value", [0, 0.0, -1, float("nan"), float("inf"), float("-inf")], ids=repr)
def test_timeout_out_of_range_is_a_value_error(function: Callable[..., Any], value: float) -> None:
    with pytest.raises(ValueError, match=r"^timeout is ") as raised:
        function([1], Failing(AssertionError), str, timeout=value)
    assert str(raised.value).startswith(f"timeout is {value!r}; expected a number of seconds above 0")
