"""The coordinator alone, as a state machine: any order of events, and the contract after each of them."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tenacity import Retrying, stop_after_attempt, wait_fixed

from twostage.answers.answers import batch_check, checked_result
from twostage.base.records import Batch
from twostage.base.runner import Runner
from twostage.core.coordinator import Coordinator
from twostage.core.handover import HandOver
from twostage.core.lines import Line
from twostage.core.reading import Reading
from twostage.failing.retry import Judge
from twostage.pace.pace import Pace
from twostage.testing import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twostage.base.as_completed import Event
    from twostage.base.records import Call, Outcome

WAIT = 5.0
BOUND = 12
WINDOW = 15


class Workers(Runner):
    """A runner whose attempts end when the machine says so."""

    def __init__(self, machine: CoordinatorMachine, workers: int) -> None:
        self.machine = machine
        self.workers = workers
        self.out = 0
        self.waiting: deque[Call] = deque()
        self.running: list[Call] = []

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        assert not self.machine.coordinator.ending, "started after the end"
        for call in calls:
            self.machine.hear_of_start(call)
            self.waiting.insert(0, call) if first else self.waiting.append(call)
        self.out += len(calls)

    def fill(self) -> None:
        while self.waiting and len(self.running) < self.workers:
            self.running.append(self.waiting.popleft())

    def take_back(self) -> list[Call]:
        back = list(self.waiting)
        self.waiting.clear()
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self.take_back()


class CoordinatorMachine(RuleBasedStateMachine):
    """Batches of three, two workers a stage, a window of 15; two attempts five seconds apart."""

    batch_size = 3
    ordered = False
    listed = False
    limited = False
    """Whether the lines have the limit, as on an executor of the user's, and not the runners."""
    return_exceptions = True

    def __init__(self) -> None:
        super().__init__()
        policy = Retrying(stop=stop_after_attempt(2), wait=wait_fixed(WAIT))
        limit = 2 if self.limited else math.inf
        lines = [
            Line(
                1,
                2,
                limit,
                batch_check("fetch_token", lambda batch: list(batch.members)),
                Judge(policy),
                Pace(1, 2, pause=True, patience=None, adaptive=False, tell=lambda _: None),
                slots=True,
                batch_size=self.batch_size,
            ),
            Line(
                2,
                2,
                limit,
                checked_result,
                Judge(policy),
                Pace(2, 2, pause=True, patience=None, adaptive=False, tell=lambda _: None),
            ),
        ]
        self.results: list[Any] | None = [] if self.listed else None
        handing = HandOver(results=self.results, ordered=self.ordered, forget=None, many=False)
        self.coordinator = Coordinator(
            *lines,
            bound=BOUND,
            reading=Reading(self.batch_size, WINDOW, handing),
            return_exceptions=self.return_exceptions,
            handing=handing,
        )
        self.workers = [Workers(self, 2), Workers(self, 2)]
        for line, workers in zip(lines, self.workers, strict=True):
            line.runner = workers
        self.now = 0.0
        self.events: list[Event] = []
        self.due: dict[Call, float] = {}
        self.read = self.wanted = self.taken = 0
        self.source_ended = self.closed = self.exited = self.ended = False
        self.lost: BaseException | None = None
        self.handed: list[Outcome[Any, Any, Any]] = []
        self.handle()

    # --- the machine's half

    def hear_of_start(self, call: Call) -> None:
        assert self.due.pop(call, 0) <= self.now, "started before it was due"
        if isinstance(call, Batch) and call.attempts == 0:
            # The coordinator counts a batch before it hands it over.
            assert self.coordinator.in_progress - len(call.members) < BOUND, "started beyond the bound"

    def handle(self) -> None:
        if self.ended:
            return  # nobody drives it any longer
        events, self.events = self.events, []
        message = self.coordinator.handle(events, self.now)
        for workers in self.workers:
            workers.fill()
        if message is not None:
            self.handed += message.outcomes
            self.wanted += message.wanted
            self.ended = message.ended
            self.lost = message.error

    def tell(self, event: Event, *, at_once: bool) -> None:
        self.events.append(event)
        if at_once:
            self.handle()

    def end_attempt(self, stage: int, number: int, end: str, *, at_once: bool) -> None:
        workers = self.workers[stage]
        call = workers.running.pop(number % len(workers.running))
        answer: object = None
        error: BaseException | None = None
        if end == "fail":
            error = ApiError(503)
            self.due[call] = math.inf  # until the coordinator has decided, at a time that is no earlier
        elif end == "miscount":
            answer = ()
        elif end == "exit":
            error = SystemExit()
        else:
            answer = list(call.members) if isinstance(call, Batch) else "result"
        handler = self.coordinator.tokens_ended if stage == 0 else self.coordinator.results_ended

        def ended(subject: Any, _answer: object, _error: BaseException | None) -> None:  # noqa: ANN401 - a call
            workers.out -= 1
            self.due[call] = self.now + WAIT if end in {"fail", "miscount"} else self.now
            handler(subject, answer, error)

        self.tell((ended, call, None, None), at_once=at_once)

    @precondition(lambda self: self.wanted and not self.source_ended)
    @rule(short=st.booleans(), at_once=st.booleans())
    def read_batch(self, *, short: bool, at_once: bool) -> None:
        self.wanted -= 1
        number = 1 if short else self.batch_size
        items = list(range(self.read, self.read + number))
        self.read += number
        self.events.append((self.coordinator.batch_read, items, None, None))
        if short:
            self.end_source(at_once=at_once)
        elif at_once:
            self.handle()

    @precondition(lambda self: not self.source_ended)
    @rule(at_once=st.booleans())
    def end_source(self, *, at_once: bool) -> None:
        self.source_ended = True
        self.tell((self.coordinator.source_end, None, None, None), at_once=at_once)

    @precondition(lambda self: self.workers[0].running)
    @rule(
        number=st.integers(0, 1),
        end=st.sampled_from(["answer"] * 4 + ["fail", "miscount"]),
        at_once=st.booleans(),
    )
    def end_batch(self, number: int, end: str, *, at_once: bool) -> None:
        self.end_attempt(0, number, end, at_once=at_once)

    @precondition(lambda self: self.workers[1].running)
    @rule(number=st.integers(0, 1), end=st.sampled_from(["answer"] * 4 + ["fail"]), at_once=st.booleans())
    def end_result(self, number: int, end: str, *, at_once: bool) -> None:
        self.end_attempt(1, number, end, at_once=at_once)

    @precondition(lambda self: self.workers[1].running and self.read > 20)
    @rule(at_once=st.booleans())
    def exit_in_result(self, *, at_once: bool) -> None:
        self.closed = self.exited = True
        self.end_attempt(1, 0, "exit", at_once=at_once)

    @rule(seconds=st.sampled_from([0.5, 2.0, WAIT]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.handle()

    @precondition(lambda self: not self.listed and len(self.handed) > self.taken)
    @rule(number=st.integers(1, 5), at_once=st.booleans())
    def take(self, number: int, *, at_once: bool) -> None:
        number = min(number, len(self.handed) - self.taken)
        self.taken += number
        self.tell((self.coordinator.outcomes_taken, number, None, None), at_once=at_once)

    @precondition(lambda self: self.read > 20)
    @rule(at_once=st.booleans())
    def close(self, *, at_once: bool) -> None:
        self.closed = True
        self.tell((self.coordinator.close, None, None, None), at_once=at_once)

    # --- the contract

    @invariant()
    def exit_ends_the_job(self) -> None:
        assert not self.exited or self.events or self.coordinator.ending

    @invariant()
    def window_is_kept(self) -> None:
        taken = self.coordinator.handing.taken if self.listed else self.taken
        assert self.read + self.wanted * self.batch_size - taken <= WINDOW or self.source_ended or self.closed

    @invariant()
    def work_is_conserved(self) -> None:
        coordinator = self.coordinator
        if self.events or coordinator.ending:
            return
        first, second = self.workers
        assert len(first.running) == 2 or not (first.waiting or coordinator.lines[0].due)
        least = 1 if self.source_ended else self.batch_size
        starts = len(coordinator.lines[0].waiting) >= least and coordinator.in_progress < BOUND
        assert len(first.running) == 2 or not starts
        assert len(second.running) == 2 or not (second.waiting or coordinator.lines[1].due)
        assert len(second.running) == 2 or not coordinator.lines[1].waiting
        due = coordinator.due()
        assert due is None or due > self.now
        assert not self.limited or (first.out <= 2 and second.out <= 2)

    @invariant()
    def each_item_has_one_outcome_at_most(self) -> None:
        indices = [outcome.index for outcome in self.handed]
        assert len(set(indices)) == len(indices)
        if self.ordered:
            assert indices == sorted(indices)
            assert self.ended or indices == list(range(len(indices)))

    @invariant()
    def what_is_in_progress_is_what_can_be_counted(self) -> None:
        if self.events or self.coordinator.ending:
            return
        first, second = self.workers
        calls = [*first.waiting, *first.running, *self.coordinator.lines[0].due]
        at_one = sum(len(call.members) for call in calls if isinstance(call, Batch))
        line = self.coordinator.lines[1]
        at_two = len(second.waiting) + len(second.running) + len(line.waiting) + len(line.due)
        not_taken = 0 if self.listed else len(self.handed) - self.taken
        assert self.coordinator.in_progress == at_one + at_two + not_taken

    def teardown(self) -> None:
        """Whatever has happened, the job can be brought to its end."""
        for _ in range(2000):
            if self.ended:
                break
            self.now += WAIT
            self.source_ended or self.end_source(at_once=False)
            for stage in (0, 1):
                while self.workers[stage].running:
                    self.end_attempt(stage, 0, "answer", at_once=False)
            if not self.listed and len(self.handed) > self.taken:
                self.take(5, at_once=False)
            self.handle()
        assert self.ended, "the job can not end"
        if not self.closed and self.lost is None:
            if self.results is not None:
                assert len(self.results) == self.read
                assert all(one == "result" or isinstance(one, Exception) for one in self.results)
            else:
                assert sorted(outcome.index for outcome in self.handed) == list(range(self.read))
        assert self.lost is None or self.closed or not self.return_exceptions


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    log = logging.getLogger("twostage")
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(logging.NOTSET)


def machine(**variant: bool) -> Any:  # noqa: ANN401 - what unittest makes of it
    name = "_".join(name for name, on in variant.items() if on) or "stream"
    kind: Any = type(name, (CoordinatorMachine,), variant)
    kind.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
    return kind.TestCase


TestStream = machine()
TestOrdered = machine(ordered=True)
TestList = machine(listed=True)
TestLimited = machine(limited=True)
TestFirstFailureEnds = machine(return_exceptions=False)
TestOrderedUntilFailure = machine(ordered=True, return_exceptions=False)
