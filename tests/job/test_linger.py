"""Sources slower than the API: outcomes come at once, part-full batches leave, and closing never hangs."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from decimal import Decimal
from queue import SimpleQueue
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS, PATIENCE, LeaveError, WeakItems, nothing_collected, ours, source_of, until
from fakes import AnyOutcome, ExpiredError, Fake, each, in_virtual_time, refusing, stage
from scripts import ran

from twostage import RunTimeout, iter_two_stage, run_two_stage
from twostage.testing import VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twostage import Outcomes

in_each_order = pytest.mark.parametrize("ordered", [False, True])


def slow(
    *pauses: float, closed: list[float] | None = None, virtual: VirtualTime | None = None
) -> Iterator[int]:
    """Yields numbers, each after its pause."""
    try:
        for number, pause in enumerate(pauses):
            sleep(pause)
            yield number
    finally:
        if closed is not None:
            closed.append(0.0 if virtual is None else virtual.now)


def fail(argument: object) -> None:
    raise KeyError(argument)


def times(virtual: VirtualTime, *arguments: Any, **settings: Any) -> dict[int, float]:  # noqa: ANN401 - any job
    """Returns when each item's outcome was handed over, by its index."""
    with iter_two_stage(*arguments, **settings) as outcomes:
        return {outcome.index: virtual.now for outcome in outcomes}


# --- outcomes come at once


@in_each_order
def test_outcome_is_handed_over_as_soon_as_it_is_done(virtual: VirtualTime, *, ordered: bool) -> None:
    source = slow(10, 10, 10)
    handed = times(virtual, source, Fake(str, 1.0), Fake(str, 1.0), linger=5.0, ordered=ordered)
    assert handed == {0: 12.0, 1: 22.0, 2: 32.0}


def test_without_linger_outcomes_come_when_the_source_has_been_read(virtual: VirtualTime) -> None:
    handed = times(virtual, slow(10, 10, 10), Fake(str, 1.0), Fake(str, 1.0))
    assert handed == {0: 20.0, 1: 30.0, 2: 32.0}


def test_calls_go_on_and_the_source_is_read_while_the_consumer_is_away(virtual: VirtualTime) -> None:
    fetch = Fake(str, 1.0, virtual=virtual)
    with iter_two_stage(slow(*[10] * 5), fetch, str, linger=5.0) as outcomes:
        assert next(outcomes).index == 0
        sleep(100)
        assert [outcome.index for outcome in outcomes] == [1, 2, 3, 4]
    assert [made.began for made in fetch.calls] == [10.0, 20.0, 30.0, 40.0, 50.0]


# --- batches


def test_part_full_batch_leaves_when_its_first_item_has_waited_for_long_enough(virtual: VirtualTime) -> None:
    fetch = Fake(each(str), 1.0, virtual=virtual)
    handed = times(virtual, slow(*[1] * 10), fetch, str, batch_size=10, linger=3.5)
    assert [(made.began, made.argument) for made in fetch.calls] == [
        (4.5, [0, 1, 2, 3]),
        (8.5, [4, 5, 6, 7]),
        (10.0, [8, 9]),  # the source is at its end
    ]
    assert sorted(set(handed.values())) == [5.5, 9.5, 11.0]


def test_full_batch_leaves_at_once(virtual: VirtualTime) -> None:
    fetch = Fake(each(str), 1.0, virtual=virtual)
    times(virtual, slow(*[1] * 7, 50), fetch, str, batch_size=3, linger=10)
    assert [(made.began, made.argument) for made in fetch.calls] == [
        (3.0, [0, 1, 2]),
        (6.0, [3, 4, 5]),
        (17.0, [6]),
        (57.0, [7]),
    ]


def test_items_that_come_together_leave_together(virtual: VirtualTime) -> None:
    fetch = Fake(each(str), 1.0, virtual=virtual)
    times(virtual, slow(1, 0, 0, 50, 0), fetch, str, batch_size=10, linger=2)
    assert [(made.began, made.size) for made in fetch.calls] == [(3.0, 3), (51.0, 2)]


def test_batch_waits_for_others_while_the_workers_are_busy(virtual: VirtualTime) -> None:
    """The workers of an executor of one's own are counted here, and have no calls put by for them."""
    fetch = Fake(each(str), lambda batch: 20.0 if 0 in batch else 1.0, virtual=virtual)
    first = stage(fetch, batch_size=10, workers=1)
    settings: dict[str, Any] = {"refresh_token_on": ExpiredError, "linger": 2.0}
    times(virtual, slow(*[1] * 12), first, str, **settings)
    assert [(made.began, made.size) for made in fetch.calls] == [(3.0, 3), (23.0, 9)]


def test_linger_needs_no_batches(virtual: VirtualTime) -> None:
    fetch = Fake(str, 1.0, virtual=virtual)
    times(virtual, slow(1, 1, 1), fetch, str, linger=100)
    assert [made.began for made in fetch.calls] == [1.0, 2.0, 3.0]


def test_window_of_no_two_batches_is_enough(virtual: VirtualTime) -> None:
    """The others of the first batch stand in order behind the first one, which takes long."""
    fetch = Fake(each(str), virtual=virtual)
    second = Fake(str, lambda token: 0.0 if int(token) else 100.0)
    settings: dict[str, Any] = {"batch_size": 4, "window": 6, "linger": 1000, "ordered": True}
    handed = times(virtual, slow(*[1] * 12), fetch, second, **settings)
    assert list(handed) == list(range(12))
    assert [(made.began, made.size) for made in fetch.calls] == [(4.0, 4), (108.0, 4), (112.0, 4)]


# --- each kind of job


@in_virtual_time
@in_each_order
def test_each_kind_of_answer_is_as_ever(*, ordered: bool) -> None:
    pauses = [0.3] * 40

    def job(*functions: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
        with iter_two_stage(
            slow(*pauses), *functions, linger=1.0, ordered=ordered, return_exceptions=True, **settings
        ) as outcomes:
            results = {outcome.index: outcome.exception or outcome.result for outcome in outcomes}
        assert not ordered or list(results) == sorted(results)
        return [results[index] for index in range(40)]

    numbers = [str(number) for number in range(40)]
    assert job(Fake(str, 1.0), Fake(str, 1.0)) == numbers
    assert job(Fake(each(str), 1.0), stage(Fake(each(str), 1.0), batch_size=3), batch_size=7) == numbers
    assert job(lambda item: [item] * (item % 3), str, many=True) == [
        [str(number)] * (number % 3) for number in range(40)
    ]
    refused = job(refusing({3, 17}), str, batch_size=7)
    assert [index for index, result in enumerate(refused) if isinstance(result, Exception)] == [3, 17]
    expired = iter([True, False] * 20)

    def answer(token: str) -> str:
        if next(expired, False):
            raise ExpiredError
        return token

    assert job(each(str), answer, batch_size=7, refresh_token_on=ExpiredError, max_refreshes=9) == numbers


@in_virtual_time
def test_equal_items_are_asked_for_once() -> None:
    fetch = Fake(each(str), 1.0)
    items = (number % 3 for number in slow(*[0.1] * 9))
    with iter_two_stage(items, fetch, Fake(str, 5.0), key=str, batch_size=4, linger=0.5) as outcomes:
        assert sorted(outcome.result for outcome in outcomes) == sorted("012" * 3)
    assert sorted(fetch.asked_items) == [0, 1, 2]


@in_each_order
@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_source_is_read_no_further_than_the_window(
    pause: float, virtual: VirtualTime, *, ordered: bool
) -> None:
    read = taken = most = 0

    def source() -> Iterator[int]:
        nonlocal read, most
        for number in itertools.count():
            sleep(pause)
            read += 1
            most = max(most, read - taken)
            yield number

    settings: dict[str, Any] = {"batch_size": 10, "window": 50, "linger": 0.1, "ordered": ordered}
    with iter_two_stage(source(), Fake(each(str), 1.0), Fake(str, 1.0), **settings) as outcomes:
        for _ in itertools.islice(outcomes, 500):
            taken += 1
            sleep(0.1)
    assert 10 <= most <= 50


# --- the end


@in_virtual_time
@in_each_order
def test_failure_of_the_source_comes_after_the_outcomes_that_are_done(*, ordered: bool) -> None:
    def source() -> Iterator[int]:
        yield from slow(1, 1, 1)
        sleep(10)
        raise LookupError("the source's")

    taken: list[AnyOutcome] = []
    with iter_two_stage(source(), str, str, linger=1.0, ordered=ordered) as outcomes:
        with pytest.raises(LookupError, match="the source's"):
            taken.extend(outcomes)
        assert next(outcomes, None) is None
    assert [outcome.result for outcome in taken] == ["0", "1", "2"]


@in_virtual_time
def test_source_is_read_no_more_after_a_failure() -> None:
    closed: list[float] = []
    source = slow(*[1] * 1000, closed=closed)
    with iter_two_stage(source, str, fail, retry=None, linger=1.0) as outcomes:
        with pytest.raises(KeyError):
            next(outcomes)
        assert len(closed) == 1
    assert list(source) == []
    assert len(closed) == 1


def test_source_is_not_waited_for_when_it_is_closed(virtual: VirtualTime) -> None:
    closed: list[float] = []
    with iter_two_stage(slow(1, 1e6, closed=closed, virtual=virtual), str, str, linger=1.0) as outcomes:
        next(outcomes)
    assert virtual.now == closed[0] == 1.0


@in_virtual_time
def test_empty_source_is_no_outcome() -> None:
    with iter_two_stage(slow(), str, str, linger=1.0) as outcomes:
        assert list(outcomes) == []


def test_timeout_does_not_wait_for_the_source(virtual: VirtualTime) -> None:
    fetch = Fake(each(str))
    settings: dict[str, Any] = {"batch_size": 10, "linger": 100, "timeout": 5.0, "return_exceptions": True}
    taken: list[AnyOutcome] = []
    with iter_two_stage(slow(1, 1, 1e6), fetch, str, **settings) as outcomes, pytest.raises(RunTimeout):
        taken.extend(outcomes)
    assert [(one.index, type(one.exception)) for one in taken] == [(0, RunTimeout), (1, RunTimeout)]
    assert fetch.calls == []
    assert virtual.now == 5.0


# --- on threads


class Items:
    """An iterator over what a queue has, which says where it is read and closed."""

    def __init__(self, *items: int) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.readers: set[threading.Thread] = set()
        self.closers: list[threading.Thread] = []
        self.waiting = threading.Event()
        for item in items:
            self.queue.put(item)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.readers.add(threading.current_thread())
        if self.queue.empty():
            self.waiting.set()
        item = self.queue.get()
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        self.closers.append(threading.current_thread())


def let_go(items: Items) -> None:
    """Gives a thread that waits for an item the source's end, and waits for its own."""
    items.queue.put(None)
    for reader in items.readers:
        reader.join(PATIENCE)
        assert not reader.is_alive()


def ends_of(how: str, outcomes: Outcomes[Any, Any, Any]) -> None:
    if how == "close":
        outcomes.close()
    elif how == "leave":
        with outcomes:
            pass
    else:
        with pytest.raises(LeaveError), outcomes:
            raise LeaveError


@in_each_order
@pytest.mark.parametrize("how", ["close", "leave", "raise"])
def test_closing_does_not_wait_for_a_source_that_blocks(how: str, *, ordered: bool) -> None:
    items = Items(1, 2)
    outcomes = iter_two_stage(items, str, str, linger=1.0, ordered=ordered)
    assert sorted(next(outcomes).result for _ in range(2)) == ["1", "2"]
    assert items.waiting.wait(PATIENCE)
    ends_of(how, outcomes)
    assert next(outcomes, None) is None
    assert [thread.name for thread in ours()] == ["twostage-source"]
    assert items.closers == []  # it is in use
    let_go(items)
    assert items.closers == list(items.readers)
    assert not ours()


def test_item_that_comes_after_closing_is_dropped_and_the_next_is_not_read() -> None:
    items = Items(1)
    outcomes = iter_two_stage(items, str, str, linger=1.0)
    next(outcomes)
    assert items.waiting.wait(PATIENCE)
    outcomes.close()
    items.queue.put(2)
    items.queue.put(3)
    until(lambda: items.closers)
    until(lambda: not ours())
    assert items.queue.get() == 3


def test_job_whose_call_fails_does_not_wait_for_a_source_that_blocks() -> None:
    items = Items(1)
    outcomes = iter_two_stage(items, int, fail, retry=None, linger=1.0)
    with pytest.raises(KeyError):
        next(outcomes)
    let_go(items)
    assert len(items.closers) == 1


def test_timeout_on_threads_does_not_wait_for_a_source_that_blocks() -> None:
    items = Items()
    outcomes = iter_two_stage(items, int, int, linger=1.0, timeout=0.02)
    with pytest.raises(RunTimeout):
        next(outcomes)
    if items.readers:
        let_go(items)


def test_iterator_that_is_dropped_does_not_wait_for_a_source_that_blocks() -> None:
    items = Items(1)
    outcomes = iter_two_stage(items, int, int, linger=1.0)
    next(outcomes)
    assert items.waiting.wait(PATIENCE)
    del outcomes
    until(lambda: [thread.name for thread in ours()] == ["twostage-source"])
    let_go(items)
    assert len(items.closers) == 1


def test_outcome_comes_while_the_source_blocks() -> None:
    items = Items()
    with iter_two_stage(items, each(str), str, batch_size=100, linger=0.001) as outcomes:
        for number in range(5):
            items.queue.put(number)
            assert next(outcomes).item == number
        items.queue.put(None)
        assert next(outcomes, None) is None
    assert len(items.readers) == 1
    assert items.closers == list(items.readers)


def test_source_is_read_and_closed_in_one_thread_of_its_own() -> None:
    closed: list[str] = []
    readers = set()

    def key(item: int) -> int:
        readers.add(threading.current_thread().name)
        return item

    with iter_two_stage(source_of(range(100), closed), str, str, key=key, linger=1.0) as outcomes:
        assert len(list(outcomes)) == 100
    assert closed == ["twostage-source"]
    assert readers == {"twostage-source"}
    assert not ours()


@in_virtual_time
@pytest.mark.parametrize("linger", [None, 1.0])
def test_stop_iteration_of_the_key_does_not_end_a_loop_as_if_complete(linger: float | None) -> None:
    def key(item: int) -> int:
        if item == 2:
            raise StopIteration("of the key's")
        return item

    with (
        iter_two_stage(range(4), str, str, key=key, linger=linger) as outcomes,
        pytest.raises(RuntimeError, match="raised StopIteration") as raised,
    ):
        list(outcomes)
    assert isinstance(raised.value.__cause__, StopIteration)


def test_source_is_closed_by_its_thread_when_the_job_is_closed() -> None:
    closed: list[str] = []
    with iter_two_stage(source_of(itertools.count(), closed), str, str, linger=1.0) as outcomes:
        next(outcomes)
    until(lambda: not ours())
    assert closed == ["twostage-source"]


def test_job_that_is_closed_unused_has_closed_its_source() -> None:
    items = Items()
    iter_two_stage(items, str, str, linger=1.0).close()
    assert items.closers == [threading.current_thread()]
    assert items.readers == set()


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, SystemExit, LeaveError])
def test_whatever_the_source_raises_in_its_thread_is_raised_as_it_is(kind: type[BaseException]) -> None:
    closed: list[str] = []
    error = kind("the source's")
    outcomes = iter_two_stage(source_of(range(3), closed, error), str, str, linger=1.0)
    with pytest.raises(kind) as raised:
        list(outcomes)
    assert raised.value is error
    assert closed == ["twostage-source"]
    assert not ours()


def test_source_that_is_bound_to_its_thread_is_read_in_the_consumer_s_without_linger() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("create table items as select 1 as number union select 2 union select 3")
    rows = database.execute("select number from items")
    with iter_two_stage(rows, str, str, ordered=True) as outcomes:
        assert [outcome.item for outcome in outcomes] == [(1,), (2,), (3,)]
    read_one = database.execute("select number from items").fetchone
    with (
        iter_two_stage(iter(read_one, None), str, str, linger=1.0) as outcomes,
        pytest.raises(sqlite3.ProgrammingError, match="thread"),
    ):
        next(outcomes)
    database.close()


def test_closed_job_keeps_nothing_of_what_it_read() -> None:
    source = WeakItems()
    outcomes = iter_two_stage(iter(source), each(id), str, batch_size=10, linger=1.0)
    next(outcomes)
    with nothing_collected():
        outcomes.close()
        until(lambda: not ours())
        assert source.kept() == []


def test_retries_are_made_while_the_source_blocks() -> None:
    items = Items(1)
    failures = iter([ConnectionError, ConnectionError])

    def fetch(item: int) -> int:
        for failure in failures:
            raise failure
        return item

    with iter_two_stage(items, fetch, str, retry=ALWAYS, linger=1.0) as outcomes:
        assert next(outcomes).token_attempts == 3
    let_go(items)


def test_thread_of_the_source_that_cannot_be_started_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    error = RuntimeError("can't start new thread")

    def fail_for_source(thread: threading.Thread) -> None:
        if thread.name == "twostage-source":
            raise error
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_for_source)
    items = Items(1)
    outcomes = iter_two_stage(items, str, str, linger=1.0)
    with pytest.raises(RuntimeError) as raised:
        next(outcomes)
    assert raised.value is error
    assert items.closers == [threading.current_thread()]
    assert items.readers == set()
    assert not ours()


SCRIPT = """
    import queue
    from twostage import iter_two_stage

    items = queue.SimpleQueue()
    items.put(1)
    outcomes = iter_two_stage(iter(items.get, None), str, str, linger=0.01)
    print(next(outcomes).result)
"""


@pytest.mark.parametrize("last_line", ["", "outcomes.close()", "del outcomes", "raise SystemExit(3)"])
def test_script_ends_though_its_source_blocks(last_line: str) -> None:
    process = ran(dedent(SCRIPT) + last_line)
    assert (process.returncode, process.stdout, process.stderr) == (3 * ("3" in last_line), "1\n", "")


# --- arguments


def refused(kind: type[Exception], value: Any) -> str:  # noqa: ANN401 - bad on purpose
    items = Items()
    with pytest.raises(kind) as raised:
        iter_two_stage(items, str, str, linger=value)
    assert items.readers == set()
    return str(raised.value)


@pytest.mark.parametrize("value", [True, "3", Decimal(3), [3], 3j], ids=repr)
def test_linger_that_is_no_number_is_a_type_error(value: object) -> None:
    assert refused(TypeError, value) == f"linger is {value!r}; expected a number of seconds"


@pytest.mark.parametrize("value", [0, 0.0, -1, float("nan"), float("inf")], ids=repr)
def test_linger_out_of_range_is_a_value_error(value: float) -> None:
    assert refused(ValueError, value).startswith(f"linger is {value!r}; expected a number of seconds above 0")


def test_list_has_no_linger() -> None:
    function: Callable[..., object] = run_two_stage
    with pytest.raises(TypeError, match="linger"):
        function([1], str, str, linger=1.0)
