"""An answer that asks for a wait holds its call back, and its whole stage, for exactly so long."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from http.server import ThreadingHTTPServer
from itertools import chain, pairwise, repeat
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
import requests
from common import PATIENCE
from fakes import ExpiredError, Fake, each, in_virtual_time, notes, outcomes_of, stage
from forms import each_way
from pacing import AnsweredError, asking, failing, first_of, most_at_once, starts
from servers import Quiet
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
)

from twostage import RunTimeout, Stage, Throttled, is_transient, run_two_stage, wait_retry_after
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from forms import Run

DATE = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)


def late(seconds: float, *, of: Any = 0) -> Callable[[Any], float]:  # noqa: ANN401 - an item or a token
    """Makes a latency of 2 s, but half of it for one argument: it ends while the others run."""
    return lambda argument: seconds / 2 if first_of(argument) == of else seconds


def quick(attempts: int = 10, wait: float = 0.5) -> Retrying:
    """A user's policy, which knows nothing of what an answer asks."""
    return Retrying(
        retry=retry_if_exception(is_transient), stop=stop_after_attempt(attempts), wait=wait_fixed(wait)
    )


def pauses_in(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(one.levelno, one.getMessage()) for one in caplog.records if "paused" in one.getMessage()]


# --- how long


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (lambda: asking(7), 7),
        (lambda: asking(7, status=503), 7),
        (lambda: asking(7, status=529), 7),
        (lambda: AnsweredError(429, {"retry-after-ms": "6500", "Retry-After": "7"}), 6.5),
        (
            lambda: AnsweredError(
                503,
                {
                    "Date": format_datetime(DATE, usegmt=True),
                    "Retry-After": format_datetime(DATE + timedelta(seconds=40), usegmt=True),
                },
            ),
            40,
        ),
        (lambda: asking(300), 300),
        (lambda: asking(86_400), 300),
        (lambda: Throttled(2.5), 2.5),
        (lambda: Throttled(86_400), 300),
    ],
    ids=["429", "503", "529", "ms", "date", "cap", "a day", "Throttled", "Throttled, a day"],
)
@pytest.mark.parametrize("retry", [10, quick()], ids=["ours", "the user's"])
def test_stage_pauses_exactly_as_long_as_asked(
    virtual: VirtualTime,
    error: Callable[[], Exception],
    seconds: float,
    retry: Any,  # noqa: ANN401
) -> None:
    results = Fake(failing({0: [error()]}), late(2), virtual=virtual)
    assert run_two_stage(range(100), int, results, result_workers=10, retry=retry) == list(range(100))
    assert starts(results, until=1 + seconds) == [0] * 10  # those that ran already end within the pause
    assert starts(results)[10] == 1 + seconds


def test_call_itself_is_due_at_the_end_of_the_pause(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(7)]}), 1, virtual=virtual)
    run_two_stage([0], int, results)
    assert starts(results) == [0, 8]


@pytest.mark.parametrize(
    "error",
    [
        lambda: AnsweredError(429),
        lambda: asking(0),
        lambda: AnsweredError(429, {"Retry-After": "soon"}),
        lambda: AnsweredError(503),
        lambda: asking(7, status=500),
        lambda: asking(7, status=502),
        lambda: Throttled(0),
    ],
    ids=["none", "0", "malformed", "503 without", "500", "502", "Throttled, 0"],
)
def test_without_a_wait_that_is_asked_for_there_is_no_pause(
    virtual: VirtualTime, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    results = Fake(failing({0: [error()]}), late(2), virtual=virtual)
    run_two_stage(range(100), int, results, result_workers=10)
    assert len(starts(results, 1, 3)) >= 9  # all workers go on
    assert pauses_in(caplog) == []


@pytest.mark.parametrize("status", [500, 502])
def test_other_failure_that_asks_for_a_wait_holds_its_own_call_back(
    virtual: VirtualTime, status: int
) -> None:
    results = Fake(failing({0: [asking(7, status)]}), 1, virtual=virtual)
    run_two_stage(range(100), int, results, result_workers=10)
    assert 8 <= results.calls[results.asked.index(0, 1)].began <= 9  # the first free worker's
    assert len(starts(results, until=7.5)) == 80


def test_pause_false_holds_its_own_call_back(virtual: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    results = Fake(failing({0: [asking(7)]}), 1, virtual=virtual)
    run_two_stage(range(100), int, Stage(results, workers=10, pause=False))
    assert 8 <= results.calls[results.asked.index(0, 1)].began <= 9  # the first free worker's
    assert len(starts(results, until=7.5)) == 80
    assert pauses_in(caplog) == []


def test_longer_pause_in_a_pause_takes_its_place_and_a_shorter_one_does_not(virtual: VirtualTime) -> None:
    results = Fake(
        failing({0: [asking(10)], 1: [asking(20)], 2: [asking(3)]}), lambda item: item + 1, virtual=virtual
    )
    run_two_stage(range(30), int, results, result_workers=5)
    assert starts(results, until=22) == [0] * 5  # until 11, then until 22, not until 6
    assert starts(results)[5] == 22


def test_stages_pause_each_for_itself(virtual: VirtualTime) -> None:
    tokens = Fake(failing({17: [asking(100)]}), late(2, of=17), virtual=virtual)
    results = Fake(failing({4: [asking(5)]}), late(4, of=4), virtual=virtual)
    run_two_stage(range(40), stage(tokens, workers=2), stage(results, workers=2))
    first, second = (next(made.ended for made in fake.calls if made.failed) for fake in (tokens, results))
    assert starts(tokens, first, first + 100) == starts(results, second, second + 5) == []
    assert min(starts(tokens, first), default=0) == first + 100
    assert min(starts(results, second), default=0) == second + 5
    assert starts(tokens, second, second + 5) != []
    assert starts(results, first, first + 100) != []


# --- in every form of a job


def shapes() -> Iterator[Any]:
    executor = ThreadPoolExecutor(1)  # of which virtual time takes nothing but that there is one
    stages: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "one by one": ({}, {}, {}),
        "in batches": ({"batch_size": 8}, {}, {}),
        "results in batches": ({"batch_size": 8}, {"batch_size": 5}, {}),
        "many": ({"many": True}, {}, {}),
        "many in batches": ({"many": True, "batch_size": 8}, {"batch_size": 5}, {}),
        "one executor": ({"executor": executor}, {"executor": executor}, {}),
        "executor of stage two": ({"batch_size": 8}, {"executor": executor}, {}),
        "refreshed": ({"batch_size": 8}, {}, {"refresh_token_on": ExpiredError}),
        "a rate": ({"rate": 50}, {"rate": 30}, {}),
        "adaptive": ({"adaptive": True}, {"adaptive": True}, {}),
        "timed": ({"attempt_timeout": 50.0}, {"attempt_timeout": 50.0}, {}),
    }
    for name, settings in stages.items():
        yield pytest.param(*settings, id=name)


class Pausing:
    """An API that asks for a wait now and then, and sees whether nothing starts before that is over.

    Args:
        virtual: The time.
        answer: Makes the value for an item or a token.
        slots: Whether it is a batch's slot that asks.
        seed: Where its draws begin.
    """

    def __init__(
        self, virtual: VirtualTime, answer: Callable[[Any], Any], *, slots: bool = False, seed: int = 0
    ) -> None:
        self.virtual = virtual
        self.answer = answer
        self.slots = slots
        self.rng = random.Random(seed)
        self.asked_at = self.until = -1.0
        self.pauses = 0
        self.made: Counter[Any] = Counter()

    def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - as above
        began = self.virtual.now
        assert not self.asked_at < began < self.until
        batch = argument if isinstance(argument, list) else [argument]
        self.made.update(batch)
        sleep(self.rng.uniform(0.1, 3))
        if not self.slots and self.rng.random() < 0.03:
            raise self.ask()
        answers = [
            self.ask() if self.slots and self.rng.random() < 0.03 else self.answer(one) for one in batch
        ]
        return answers if isinstance(argument, list) else answers[0]

    def ask(self) -> Exception:
        seconds = self.rng.choice((1, 4, 20))
        self.pauses += 1
        if self.virtual.now + seconds > self.until:
            if self.virtual.now >= self.until:
                self.asked_at = self.virtual.now
            self.until = self.virtual.now + seconds
        return asking(seconds, self.rng.choice((429, 503)))


@each_way
@pytest.mark.parametrize(("first", "second", "options"), list(shapes()))
def test_nothing_starts_in_a_pause_in_any_form_of_a_job(
    job: Run,
    first: dict[str, Any],
    second: dict[str, Any],
    options: dict[str, Any],
) -> None:
    expired = set(range(0, 150, 10)) if options else set()

    def result(token: str) -> str:
        item = int(token.removeprefix("token "))
        if item in expired:
            expired.remove(item)
            raise ExpiredError
        return token.upper()

    many = "many" in first
    with VirtualTime() as virtual:
        tokens = Pausing(virtual, lambda item: [f"token {item}"] * 2 if many else f"token {item}")
        results = Pausing(virtual, result, seed=1)
        results_of = job(
            range(150), stage(tokens, workers=3, **first), stage(results, workers=6, **second), **options
        )
    expected = [f"TOKEN {item}" for item in range(150)]
    assert results_of == ([[one] * 2 for one in expected] if many else expected)
    assert min(tokens.pauses, results.pauses) > 0


@each_way
@pytest.mark.parametrize("at_once", [1, 4])
def test_slot_that_asks_for_a_wait_pauses_the_stage(job: Run, at_once: int) -> None:
    with VirtualTime() as virtual:
        tokens = Pausing(virtual, str, slots=True)
        results = Pausing(virtual, str.upper, slots=True, seed=1)
        answered = job(
            range(200),
            stage(tokens, batch_size=8, workers=at_once),
            stage(results, batch_size=5, workers=at_once),
        )
    assert answered == [str(item) for item in range(200)]
    assert min(tokens.pauses, results.pauses) > 0
    assert max(tokens.made.values()) > 1  # an item that was to wait was asked for again
    assert min(tokens.made.values()) == 1  # and those beside it were not


def test_retry_that_comes_due_in_a_pause_waits_for_its_end(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [ApiError(500)], 1: [asking(20)]}), lambda item: item + 1, virtual=virtual)
    run_two_stage(range(3), int, results, retry=quick(wait=2))  # item 0 comes due at 3
    assert starts(results, until=22) == [0, 0, 0]
    assert starts(results)[3] == 22
    assert sorted(results.asked[3:]) == [0, 1]


@in_virtual_time
def test_call_without_retry_fails_and_the_pause_holds(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(7)]}), late(2), virtual=virtual)
    outcomes = outcomes_of(range(30), int, stage(results, workers=5, retry=None))
    assert [outcome.index for outcome in outcomes if outcome.exception is not None] == [0]
    assert starts(results, 0.5, 8) == []
    assert starts(results)[5] == 8


def test_timeout_ends_a_longer_pause(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(100)]}), late(2), virtual=virtual)
    outcomes = outcomes_of(range(20), int, results, result_workers=4, timeout=30)
    assert virtual.now == 30
    assert [type(outcome.exception) for outcome in outcomes[1:4]] == [type(None)] * 3
    assert {type(outcome.exception) for outcome in outcomes[4:]} == {RunTimeout}
    assert isinstance(outcomes[0].exception, ApiError)  # which could not be tried again in time
    assert len(results.calls) == 4


def test_split_of_a_batch_waits_for_the_end_of_a_pause(virtual: VirtualTime) -> None:
    refused = [ApiError(400), ApiError(400)]
    tokens = Fake(
        failing({0: refused, 8: [asking(20)]}), lambda batch: 1 if batch[0] == 8 else 2, virtual=virtual
    )
    run_two_stage(range(32), tokens, int, batch_size=8)
    assert sorted(tokens.sizes) == [2, 2, 4, 4, 8, 8, 8, 8, 8]
    assert starts(tokens, 0.5, 21) == []


# --- what was handed over before it began


def test_look_ahead_is_taken_back_and_goes_first_in_its_order(virtual: VirtualTime) -> None:
    results = Fake(failing({1: [asking(10)]}), late(2, of=1), virtual=virtual)
    run_two_stage(range(60), int, stage(results, workers=4))
    begun = [made.argument for made in results.calls]
    assert begun[:4] == [0, 1, 2, 3]
    assert [item for item in begun[4:] if item != 1] == list(range(4, 60))
    assert begun.index(1, 4) > 40  # behind those that had been handed over before it came back


def test_batches_that_were_handed_over_are_taken_back_whole(virtual: VirtualTime) -> None:
    tokens = Fake(failing({10: [asking(10)]}), late(2, of=10), virtual=virtual)
    run_two_stage(range(200), tokens, int, batch_size=10)
    assert sorted(tokens.asked_items) == sorted([*range(200), *range(10, 20)])
    assert [made.argument[0] for made in tokens.calls if made.argument[0] != 10] == [0, *range(20, 200, 10)]


class Waiting(logging.Handler):
    """Knows when a record has been logged whose message has a text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.logged = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.logged.set()

    def __enter__(self) -> threading.Event:
        logger = logging.getLogger("twostage")
        self.level_before = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self.logged

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("twostage")
        logger.removeHandler(self)
        logger.setLevel(self.level_before)


class OneByOne(Executor):
    """Runs what it is given in one thread, the second call not before it is told to."""

    def __init__(self, go_on: threading.Event) -> None:
        self.cancelled = 0
        self.go_on = go_on
        self.queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        self.queue.put((future, partial(fn, *args, **kwargs)))
        return future

    def run(self) -> None:
        while (task := self.queue.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                self.cancelled += 1
                continue
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - it is the caller's
                future.set_exception(error)
                self.go_on.wait(PATIENCE)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002
        self.queue.put(None)
        self.thread.join()


def test_futures_on_an_executor_of_the_user_s_are_taken_back() -> None:
    asked: list[int] = []
    fetch = failing({0: [AnsweredError(429, {"retry-after-ms": "50"})]})

    def fetch_result(item: int) -> int:
        asked.append(item)
        return int(fetch(item))

    with Waiting("the next one in") as paused, OneByOne(paused) as executor:
        results = run_two_stage(range(12), int, Stage(fetch_result, workers=4, executor=executor))
    assert results == list(range(12))
    assert paused.is_set()
    assert executor.cancelled == 3
    assert sorted(asked) == sorted([0, *range(12)])
    assert [item for item in asked[1:] if item] == list(range(1, 12))


class Server(ThreadingHTTPServer):
    """Asks the first request to wait, once four are there; answers the others when it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.lock = threading.Lock()
        self.arrived: list[tuple[str, float]] = []
        self.all_there = threading.Barrier(4)
        self.go_on: threading.Event | None = None
        self.asked_at = 0.0


class Handler(Quiet):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            place = len(server.arrived)
            server.arrived.append((self.path, time.monotonic()))
        if place < 4:
            server.all_there.wait(PATIENCE)
        if place == 0:
            server.asked_at = time.monotonic()
            self.answer(429, headers={"Retry-After-Ms": "200"})
        else:
            if place < 4 and server.go_on is not None:
                server.go_on.wait(PATIENCE)
            self.answer(200)


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("own_executor", [False, True])
def test_nothing_but_what_was_running_reaches_a_server_in_a_pause(*, own_executor: bool) -> None:
    executor = ThreadPoolExecutor(4)
    with (
        Server() as server,
        requests.Session() as session,
        Waiting("the next one in") as paused,
        executor,
    ):
        server.go_on = paused  # the pause has begun: what runs ends in it, and its workers are free
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def fetch_result(item: int) -> int:
            session.get(f"{server.url}{item}", timeout=20).raise_for_status()
            return item

        try:
            results = run_two_stage(
                range(20), int, Stage(fetch_result, workers=4, executor=executor if own_executor else None)
            )
        finally:
            server.shutdown()
            thread.join()
    assert results == list(range(20))
    times = [arrived for _, arrived in server.arrived]
    assert len(times) == 21
    assert min(times[4:]) >= server.asked_at + 0.2  # the fifth, too, when the pause was over


# --- after it


def test_after_a_pause_the_stage_begins_at_half_and_climbs(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(60)]}), late(2), virtual=virtual)
    run_two_stage(range(400), int, stage(results, workers=16))
    after = [made for made in results.calls if made.began >= 61]
    assert most_at_once(after[:8]) == 8
    assert after[8].began >= min(made.ended for made in after[:8])  # half of the workers wait for an answer
    assert most_at_once(made for made in after if made.began < 63.9) <= 16
    assert most_at_once(after) == 16


def test_starts_after_a_pause_are_spread(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(60)]}), late(100), virtual=virtual)
    run_two_stage(range(100), int, stage(results, workers=40))
    after = starts(results, 110)[:20]
    assert after[0] == 110
    gaps = [later - sooner for sooner, later in pairwise(after)]
    assert len(set(gaps)) == 19
    assert min(gaps) > 0
    assert max(gaps) <= 2 * 1 / 20  # 20 starts, in a second on average
    assert 0.5 < after[-1] - after[0] < 1.5


def test_spread_of_a_short_pause_is_short(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(1)]}), lambda item: 100 if item else 99.5, virtual=virtual)
    run_two_stage(range(100), int, stage(results, workers=40))
    after = starts(results, 99.5)[:20]
    assert after[0] == 100.5
    assert 0.05 < after[-1] - after[0] < 0.15


def test_spread_is_another_with_each_seed() -> None:
    def spread(seed: int) -> list[float]:
        with VirtualTime(seed=seed) as virtual:
            results = Fake(failing({0: [asking(60)]}), late(100), virtual=virtual)
            run_two_stage(range(100), int, stage(results, workers=40))
        return starts(results, 110)

    assert spread(1) == spread(1) != spread(2)


def test_second_pause_begins_at_half_again(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(60)], 20: [asking(60)]}), late(2), virtual=virtual)
    run_two_stage(range(400), int, stage(results, workers=16))
    second = next(made for made in results.calls if made.argument == 20)
    after = [made for made in results.calls if made.began >= second.ended + 60]
    assert starts(results, second.ended + 0.01, second.ended + 59.9) == []
    assert most_at_once(after[:8]) == 8
    assert after[8].began >= min(made.ended for made in after[:8])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_few_workers_come_back(virtual: VirtualTime, workers: int) -> None:
    results = Fake(failing({0: [asking(5)]}), 1, virtual=virtual)
    run_two_stage(range(60), int, stage(results, workers=workers))
    assert most_at_once(results.calls[-20:]) == workers


def test_stage_that_is_well_again_is_at_its_full_pace(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(60)]}), late(2), virtual=virtual)
    run_two_stage(range(3000), int, stage(results, workers=16))
    assert len(starts(results, 80, 180)) == 16 * 50


# --- attempts


def answer_often(error: Callable[[], Exception], times: int, virtual: VirtualTime) -> Fake:
    """Makes an API that answers item 0 with a failure so often, but item 1 before that."""
    return Fake(failing({0: [error() for _ in range(times)]}), late(2, of=1), virtual=virtual)


@pytest.mark.parametrize("seconds", [None, 0.25], ids=["429", "429 with a wait"])
def test_throttled_attempts_do_not_count_for_the_policy_s_stop(
    virtual: VirtualTime, seconds: float | None
) -> None:
    headers = {} if seconds is None else {"retry-after-ms": str(seconds * 1000)}
    results = answer_often(lambda: AnsweredError(429, headers), 30, virtual)
    outcomes = outcomes_of(range(3000), int, stage(results, workers=3), retry=quick(2))
    assert outcomes[0].exception is None
    assert outcomes[0].result_attempts == 31


def test_throttled_attempts_count_for_the_policy_s_wait(virtual: VirtualTime) -> None:
    results = answer_often(lambda: AnsweredError(429), 30, virtual)
    policy = Retrying(stop=stop_after_attempt(3), wait=lambda state: float(state.attempt_number))
    run_two_stage(range(3000), int, stage(results, workers=3), retry=policy)
    ended = [made for made in results.calls if made.argument == 0]
    assert [later.began - sooner.ended for sooner, later in pairwise(ended)] == pytest.approx(
        list(range(1, 31)), abs=2.1
    )


def test_other_failures_count_as_ever_beside_throttled_ones(virtual: VirtualTime) -> None:
    errors = [AnsweredError(429), ApiError(500), AnsweredError(429), ApiError(500), AnsweredError(429)]
    results = Fake(failing({0: [*errors, ApiError(500)]}), late(2, of=1), virtual=virtual)
    outcomes = outcomes_of(range(300), int, stage(results, workers=3), retry=quick(3))
    assert isinstance(outcomes[0].exception, ApiError)
    assert outcomes[0].result_attempts == 6  # the third that counts
    assert notes(outcomes[0].exception) == ["twostage: stage two, 0, 6 attempts"]


def test_stage_that_never_had_a_success_uses_attempts_up(virtual: VirtualTime) -> None:
    results = Fake(failing({0: repeat(asking(5))}), 1, virtual=virtual)
    outcomes = outcomes_of([0], int, results, retry=4)
    assert starts(results) == [0, 6, 12, 18]
    assert outcomes[0].result_attempts == 4


@pytest.mark.parametrize("patience", [50.0, 300.0])
def test_stage_without_a_success_within_patience_uses_attempts_up(
    virtual: VirtualTime, patience: float
) -> None:
    results = Fake(failing({0: repeat(AnsweredError(429))}), late(2, of=1), virtual=virtual)
    outcomes = outcomes_of([0, 1], int, stage(results, patience=patience), retry=quick(5, wait=8))
    # The success is at 1; attempts end at 2, 12, 22 and so on, and from the first after `patience` on count.
    assert [made.ended for made in results.calls if made.argument == 0][-5] == patience + 2
    assert outcomes[0].result_attempts == len(results.calls) - 1


def test_patience_none_waits_for_ever(virtual: VirtualTime) -> None:
    results = Fake(failing({0: repeat(AnsweredError(429), 500)}), late(2, of=1), virtual=virtual)
    outcomes = outcomes_of([0, 1], int, stage(results, patience=None), retry=quick(5, wait=8))
    assert outcomes[0].result_attempts == 501
    assert virtual.now == 501 * 2 + 500 * 8


def test_throttled_uses_no_attempt_and_no_worker(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [Throttled(5)] * 30}), 1, virtual=virtual)
    outcomes = outcomes_of(range(200), int, stage(results, workers=2, pause=False), retry=2)
    assert outcomes[0].exception is None
    assert outcomes[0].result_attempts == 1
    ours = [made for made in results.calls if made.argument == 0]
    assert all(5 <= later.began - sooner.ended <= 6 for sooner, later in pairwise(ours))
    assert most_at_once(made for made in results.calls if made.argument) == 2


def test_throttled_of_a_stage_without_retry_is_a_failure(virtual: VirtualTime) -> None:
    outcomes = outcomes_of([0], int, stage(failing({0: [Throttled(5)]}), retry=None))
    assert isinstance(outcomes[0].exception, Throttled)
    assert outcomes[0].result_attempts == 1


def test_wait_retry_after_in_a_policy_of_the_user_s(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(7), ApiError(500), asking(400)]}), 1, virtual=virtual)
    policy = Retrying(wait=wait_retry_after(wait_fixed(2), max_wait=20), stop=stop_after_attempt(4))
    run_two_stage([0], int, stage(results, pause=False), retry=policy)
    assert starts(results) == [0, 8, 11, 32]


# --- what is logged


@pytest.mark.parametrize(
    ("error", "level", "who"),
    [(asking(7), logging.WARNING, "the API"), (Throttled(7), logging.INFO, "your limit")],
    ids=["429", "Throttled"],
)
@in_virtual_time
def test_pause_is_logged_once_with_its_length(
    error: Exception, level: int, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "twostage")
    run_two_stage(range(20), int, failing({0: [error]}))
    assert pauses_in(caplog) == [(level, f"stage two: paused for 7.0 s, as {who} asks")]


def test_pause_that_grows_a_little_is_not_logged_again(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    results = Fake(
        failing({item: [asking(10)] for item in range(4)}), lambda item: 1 + item / 4, virtual=virtual
    )
    run_two_stage(range(20), int, stage(results, workers=4))
    assert pauses_in(caplog) == [(logging.WARNING, "stage two: paused for 10.0 s, as the API asks")]


def test_pause_that_grows_much_is_logged_again(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    results = Fake(failing({0: [asking(10)], 1: [asking(100)]}), lambda item: item + 1, virtual=virtual)
    run_two_stage(range(20), stage(int, workers=4), results)
    assert [message for _, message in pauses_in(caplog)] == [
        "stage two: paused for 10.0 s, as the API asks",
        "stage two: paused for 100.0 s, as the API asks",
    ]


@in_virtual_time
def test_no_record_has_items_tokens_or_results_in_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "twostage")
    fetch = failing({"secret token 1": [asking(5), Throttled(3), ApiError(500)]})
    run_two_stage(
        ["1", "2"], lambda item: f"secret token {item}", lambda token: f"secret result {fetch(token)}"
    )
    assert len(caplog.records) >= 3
    assert "secret" not in caplog.text


@in_virtual_time
def test_throttled_is_logged_as_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "twostage")
    run_two_stage([0], int, failing({0: [Throttled(5)]}))
    assert caplog.messages[1:-1] == [
        "stage two: paused for 5.0 s, as your limit asks",
        "stage two, 0: held back for 5.00 s by a limit",
    ]


# --- beside what else a job does


@each_way
@pytest.mark.parametrize("batch_size", [None, 4])
def test_item_that_comes_back_for_a_new_token_in_a_pause_waits_for_its_end(
    job: Run, batch_size: int | None
) -> None:
    expired = [ExpiredError()]

    def fetch_result(item: int) -> int:
        sleep(2)
        if expired:
            raise expired.pop()
        return item

    with VirtualTime() as virtual:
        tokens = Fake(failing({7: [asking(30)]}), late(2, of=7), virtual=virtual)
        answered = job(
            [0, 7] if batch_size is None else [0, 1, 2, 3, 7],
            stage(tokens, batch_size=batch_size, retry=1),  # so nothing else happens when the pause ends
            fetch_result,
            refresh_token_on=ExpiredError,
            return_exceptions=True,
        )
    assert isinstance(answered[-1], ApiError)
    assert answered[0] == 0
    assert starts(tokens, 1) == [31]


def test_throttled_slots_are_one_attempt_that_does_not_count(virtual: VirtualTime) -> None:
    def answer(batch: list[int]) -> list[int | Exception]:
        if len(results.calls) == 1:
            return [0, *(AnsweredError(429) for _ in batch[1:])]
        raise ApiError(500)

    results = Fake(answer, 1, virtual=virtual)
    outcomes = outcomes_of(
        range(20), stage(list, batch_size=20), stage(results, batch_size=20), retry=quick(5)
    )
    assert outcomes[0].exception is None
    assert [outcome.result_attempts for outcome in outcomes[1:]] == [6] * 19


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ([ApiError(500), asking(30)], 30),
        ([asking(30), ApiError(500)], 30),
        ([asking(4), asking(30), asking(7)], 30),
        ([ApiError(500), Throttled(30), Throttled(5)], 30),
        ([Throttled(5), asking(30)], 30),
    ],
    ids=["last", "first", "most", "Throttled", "both"],
)
def test_slots_are_asked_for_again_when_the_last_of_them_is_due(
    virtual: VirtualTime, asked: list[Exception], seconds: float
) -> None:
    def answer(batch: list[int]) -> list[int] | list[Exception]:
        return asked if len(results.calls) == 1 else batch

    results = Fake(answer, 1, virtual=virtual)
    size = len(asked)
    run_two_stage(range(size), stage(list, batch_size=size), stage(results, batch_size=size, pause=False))
    assert starts(results) == [0, 1 + seconds]


@in_virtual_time
def test_wait_of_a_slot_that_is_no_number_ends_the_job() -> None:
    waits = iter([1.0, float("nan")])
    policy = Retrying(wait=lambda _: next(waits), stop=stop_after_attempt(3))
    with pytest.raises(ValueError, match="the retry policy's wait is nan; expected a finite number"):
        run_two_stage(
            range(2), stage(lambda batch: [asking(3) for _ in batch], batch_size=2), int, retry=policy
        )


@pytest.mark.parametrize("stage_one", [True, False])
def test_answer_that_is_throttled_in_each_slot_is_no_success(
    virtual: VirtualTime, *, stage_one: bool
) -> None:
    fake = Fake(each(lambda item: AnsweredError(429) if item == 7 else item), 1, virtual=virtual)
    plain, throttled = stage(each(int), batch_size=10), stage(fake, batch_size=10, retry=quick(5, wait=9))
    outcomes = outcomes_of(range(50), *((throttled, plain) if stage_one else (plain, throttled)))
    assert [outcome.index for outcome in outcomes if outcome.exception is not None] == [7]
    # It waits as long as the stage is patient; then the attempts count, by which the policy stops.
    assert 300 < virtual.now < 300 + 6 * 10


# --- how long a policy has


def within(seconds: float, wait: float = 1) -> Retrying:
    return Retrying(
        retry=retry_if_exception(is_transient), stop=stop_after_delay(seconds), wait=wait_fixed(wait)
    )


def attempts_of(item: int, fake: Fake) -> list[float]:
    return [made.began for made in fake.calls if made.argument == item]


def test_start_of_a_delay_moves_on_by_the_pause_that_the_call_has_asked_for(virtual: VirtualTime) -> None:
    results = Fake(failing({0: chain([asking(60)], repeat(ApiError(500)))}), 1, virtual=virtual)
    outcomes_of([0], int, results, retry=within(10))
    assert attempts_of(0, results) == [0, *(60 + began for began in (1, 3, 5, 7, 9))]


def test_start_of_a_delay_moves_on_by_pauses_that_others_have_asked_for(virtual: VirtualTime) -> None:
    failures: dict[int, Iterable[Exception]] = {
        0: repeat(ApiError(500)),
        1: [asking(60)],
        2: chain([asking(30)], repeat(ApiError(500))),
    }
    results = Fake(failing(failures), lambda item: (1, 4.5, 5)[item], virtual=virtual)
    outcomes_of(range(3), int, stage(results, workers=8), retry=within(20))
    assert attempts_of(0, results)[:3] == [0, 2, 4]  # tried before the pause, from 4.5 to 64.5
    assert 78 <= attempts_of(0, results)[-1] < 80
    assert attempts_of(2, results)[0] == 0  # ran when it began, and was judged first within it
    assert 76 <= attempts_of(2, results)[-1] < 80


def test_second_pause_moves_it_on_again(virtual: VirtualTime) -> None:
    answers = [asking(60), ApiError(500), asking(60), ApiError(500)]
    results = Fake(failing({0: chain(answers, repeat(ApiError(500)))}), 1, virtual=virtual)
    outcomes_of([0], int, results, retry=within(10))
    assert attempts_of(0, results) == [0, 61, 63, 124, 126, 128, 130]


def test_pause_in_a_pause_moves_it_on_by_the_time_that_both_take(virtual: VirtualTime) -> None:
    failures: dict[int, Iterable[Exception]] = {
        0: chain([asking(10)], repeat(ApiError(500))),
        1: [asking(20)],
    }
    results = Fake(failing(failures), lambda item: 1 + item, virtual=virtual)
    outcomes_of(range(2), int, stage(results, workers=8), retry=within(5))
    assert attempts_of(0, results) == pytest.approx([0, 22, 24, 26], abs=0.6)  # the pause is from 1 to 22


def test_call_that_began_after_a_pause_has_its_whole_delay_and_no_more(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(60)], 9: repeat(ApiError(500))}), 1, virtual=virtual)
    outcomes_of(range(10), int, stage(results, workers=1), retry=within(10))
    first, *_, last = attempts_of(9, results)
    assert first > 61
    assert first + 8 <= last <= first + 10


@pytest.mark.parametrize("stage_one", [True, False])
def test_batch_that_a_pause_has_taken_back_is_not_sent_at_a_size_that_is_too_large(
    virtual: VirtualTime, *, stage_one: bool
) -> None:
    def answer(batch: list[int]) -> list[int]:
        if len(fake.calls) == 2:
            raise asking(30)
        if len(fake.calls) > 2 and len(batch) > 10:
            raise ApiError(413)
        return batch

    fake = Fake(answer, 1, virtual=virtual)
    sized, plain = stage(fake, batch_size=20, workers=1), stage(each(int), batch_size=20)
    results = run_two_stage(range(400), *((sized, plain) if stage_one else (plain, sized)))
    assert results == list(range(400))
    assert Counter(fake.sizes)[10] == 38
    # Refused at that size: the second or third, the one that was throttled, and one that had begun by then.
    assert Counter(fake.sizes)[20] <= 5


def test_delay_goes_on_while_a_call_is_throttled(virtual: VirtualTime) -> None:
    """With no pause to move its start on: then an attempt that is excused does not stop it."""
    results = answer_often(lambda: AnsweredError(429), 20, virtual)
    outcomes = outcomes_of(range(300), int, stage(results, workers=3), retry=within(10))
    assert outcomes[0].exception is None
    assert attempts_of(0, results)[-1] > 50


def test_throttled_for_a_day_waits_for_300_s_without_a_pause_too(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [Throttled(86_400)]}), 1, virtual=virtual)
    run_two_stage([0], int, stage(results, pause=False))
    assert starts(results) == [0, 301]


def test_batches_are_made_of_what_waits_when_a_pause_is_over(virtual: VirtualTime) -> None:
    results = Fake(failing({0: [asking(30)]}), 0.5, virtual=virtual)
    run_two_stage(range(61), stage(Fake(int, 0.5), workers=1), stage(results, batch_size=5, workers=4))
    assert results.sizes[:2] == [1, 1]
    assert results.sizes[2:13] == [5] * 11  # all that came within it, and none of them alone


@pytest.mark.parametrize("workers", [4, 32])  # of few, all are handed over when the first ones have succeeded
def test_batches_that_wait_after_a_pause_are_made_smaller(virtual: VirtualTime, workers: int) -> None:
    def answer(batch: list[int]) -> list[int]:
        if batch[0] == 0 and virtual.now < 30:
            raise asking(30)
        if len(batch) > 10 and virtual.now > 30:
            raise ApiError(413)
        return batch

    tokens = Fake(answer, late(2), virtual=virtual)
    assert run_two_stage(range(2000), stage(tokens, batch_size=20, workers=workers), int) == list(range(2000))
    late_ones = Counter(made.size for made in tokens.calls if made.began > 30)
    assert late_ones[20] <= 2 * workers  # of nearly a hundred that had been handed over
