"""`AsCompleted`, the growing `as_completed`: which events there are, when, and in which order."""

from __future__ import annotations

import math
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from common import nothing_collected

from twostage.base.as_completed import AsCompleted

if TYPE_CHECKING:
    from twostage.base.as_completed import Event


def handler(_subject: object, _answer: object, _error: BaseException | None) -> None:
    """Is looked at and never called."""


def event(subject: object) -> Event:
    return (handler, subject, None, None)


def subjects(events: list[Event]) -> list[Any]:
    return [subject for _, subject, _, _ in events]


def done(result: object = None) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


NO_WAIT = [0, 0.0, -1, -1e300, -math.inf]
LONG_WAIT = [None, 3600, 4.6e18, 1e300, math.inf]  # `SimpleQueue.get` refuses the last three


def test_all_events_that_are_there_come_at_once_and_in_order() -> None:
    completions = AsCompleted()
    for timeout in NO_WAIT + LONG_WAIT:
        for number in range(100):
            completions.put(event(number))
        assert subjects(completions.take(timeout)) == list(range(100))
        assert completions.take(0) == []


def test_event_is_the_same_object() -> None:
    completions = AsCompleted()
    mine = event("mine")
    completions.put(mine)
    [taken] = completions.take(None)
    assert taken is mine


def test_wait_that_is_over_gives_nothing() -> None:
    for timeout in NO_WAIT:
        assert AsCompleted().take(timeout) == []


def test_wait_that_passes_gives_nothing() -> None:
    assert AsCompleted().take(0.001) == []


def test_wait_is_cut_to_what_a_queue_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostage.base.as_completed.LONGEST_WAIT", 0.001)
    for timeout in LONG_WAIT:
        assert AsCompleted().take(timeout) == []


def test_wait_ends_with_the_first_event() -> None:
    for timeout in LONG_WAIT:
        completions = AsCompleted()
        with ThreadPoolExecutor(1) as thread:
            taken = thread.submit(completions.take, timeout)
            completions.put(event("first"))
            assert subjects(taken.result()) == ["first"]


# --- futures


@pytest.mark.parametrize("state", ["result", "exception", "cancelled", "cancelled and noticed", "exit"])
@pytest.mark.parametrize("before", [False, True])
def test_future_gives_its_event_however_it_ends(state: str, *, before: bool) -> None:
    completions = AsCompleted()
    future: Future[str] = Future()

    def end() -> None:
        if state == "result":
            future.set_result("result")
        elif state == "exception":
            future.set_exception(ValueError())
        elif state == "exit":
            future.set_exception(SystemExit())
        else:
            assert future.cancel()
            if state == "cancelled and noticed":
                assert not future.set_running_or_notify_cancel()

    if before:
        end()
        completions.add(future, event("a"))
    else:
        completions.add(future, event("a"))
        assert completions.take(0) == []
        end()
    assert subjects(completions.take(None)) == ["a"]
    assert completions.take(0) == []


def test_future_that_runs_gives_nothing_yet() -> None:
    completions = AsCompleted()
    future: Future[str] = Future()
    completions.add(future, event("a"))
    assert future.set_running_or_notify_cancel()
    assert completions.take(0) == []
    assert not future.cancel()  # as it runs
    assert completions.take(0) == []
    future.set_result("result")
    assert subjects(completions.take(0)) == ["a"]


def test_events_come_in_the_order_in_which_futures_end() -> None:
    completions = AsCompleted()
    futures: list[Future[None]] = [Future() for _ in range(5)]
    for number, future in enumerate(futures):
        completions.add(future, event(number))
    for number in (3, 0, 4):
        futures[number].set_result(None)
    assert subjects(completions.take(None)) == [3, 0, 4]
    completions.put(event("told"))
    futures[2].cancel()
    futures[1].set_exception(ValueError())
    assert subjects(completions.take(None)) == ["told", 2, 1]


def test_futures_may_be_added_while_others_are_taken() -> None:
    completions = AsCompleted()
    completions.add(done(), event(0))
    seen: list[int] = []
    while events := completions.take(0):
        for number in subjects(events):
            seen.append(number)
            if number < 100:  # a done one and one that ends later
                later: Future[None] = Future()
                completions.add(done(), event(2 * number + 1))
                completions.add(later, event(2 * number + 2))
                later.set_result(None)
    assert sorted(seen) == list(range(201))


def test_one_future_may_give_two_events() -> None:
    completions = AsCompleted()
    future: Future[None] = Future()
    completions.add(future, event("a"))
    completions.add(future, event("b"))
    future.set_result(None)
    assert subjects(completions.take(0)) == ["a", "b"]


def test_nothing_is_lost_between_threads() -> None:
    completions = AsCompleted()
    seen: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        for number in range(2000):
            completions.add(pool.submit(int), event(number))
            if number % 3 == 0:
                seen += subjects(completions.take(0))
        while len(seen) < 2000:
            events = completions.take(10)
            assert events, "an event was lost"
            seen += subjects(events)
    assert sorted(seen) == list(range(2000))
    assert completions.take(0) == []


def test_nothing_is_kept_of_what_was_taken() -> None:
    class Subject:
        pass

    completions = AsCompleted()
    subject, future = Subject(), done()
    completions.add(future, event(subject))
    kept: list[weakref.ref[object]] = [weakref.ref(subject), weakref.ref(future)]
    assert len(completions.take(None)) == 1
    with nothing_collected():
        del subject, future
        assert [one() for one in kept] == [None, None]
