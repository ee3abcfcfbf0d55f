"""The state machine of a job: all its state, in one object that never waits."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from twostage.calls import Batch, Outcome
from twostage.errors import brief, without_our_frames
from twostage.retry import Answer, Fail
from twostage.transient import status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from twostage.calls import Call
    from twostage.completions import Event
    from twostage.lines import Line
    from twostage.retry import Verdict

__all__ = ["LEAST_IN_PROGRESS", "Coordinator", "Message"]

AnyOutcome: TypeAlias = Outcome[Any, Any, Any]

log = logging.getLogger("twostage")

LEAST_IN_PROGRESS = 256
"""The floor of the in-progress bound: with less, calls of no latency starve the pools of threads."""

UNANSWERED = object()


class Message(NamedTuple):
    """What a coordinator tells the caller's thread.

    Attributes:
        outcomes: To be handed over, in this order.
        wanted: How many more batches the source is to be asked for.
        ended: Whether this is the last message.
        error: Why the job ended early, to be raised after the outcomes.
    """

    outcomes: list[AnyOutcome]
    wanted: int
    ended: bool
    error: BaseException | None


class Coordinator:
    """Decides what happens next in one job, and holds all that this depends on.

    `handle` takes what has happened and `due` says when to call it without any event; both return at
    once. Whoever drives it, a thread or a virtual clock, is the only one to touch it.

    Args:
        token_line: Stage one.
        result_line: Stage two.
        batch_size: How many items a batch holds.
        bound: How many items may be in progress before nothing new is begun.
        window: How many items may be read and not handed over.
        return_exceptions: Whether a failed item is an outcome like any other, or the end of the job.
        results: The list to put results in, if nobody takes outcomes one by one.
        ordered: Whether outcomes are handed over in the items' order.
        tokens_first: Whether ready tokens start before ready batches: right if both stages share one
            executor. Else stage one goes first, as it feeds the other.
    """

    def __init__(  # noqa: PLR0913 - it is one job's settings
        self,
        token_line: Line,
        result_line: Line,
        *,
        batch_size: int,
        bound: int,
        window: int,
        return_exceptions: bool,
        results: list[Any] | None = None,
        ordered: bool = False,
        tokens_first: bool = False,
    ) -> None:
        self.token_line = token_line
        self.result_line = result_line
        self.batch_size = batch_size
        self.bound = bound
        self.window = window
        self.return_exceptions = return_exceptions
        self.results = results
        self.tokens_first = tokens_first
        self._hand_over: Callable[[AnyOutcome], None] = (
            self._place if results is not None else self._hold if ordered else self._release
        )

        self.batches: deque[Batch] = deque()  # read and not started
        self.delayed: list[tuple[float, int, Line, Call]] = []  # a heap by due time
        self._tie = count()  # equal due times must not compare calls
        self.held: dict[int, AnyOutcome] = {}  # done, and waiting for those before them
        self.ready: list[AnyOutcome] = []  # to be handed over with the next message

        self.read = 0  # items
        self.asked = 0  # batches wanted and not read yet
        self.finished = 0  # items with an outcome
        self.taken = 0  # items whose outcome was handed over
        self.in_progress = 0  # see DESIGN: items at stage one, tokens at stage two, outcomes not taken
        self.next_index = 0  # of the outcome that is handed over next, if ordered
        self.source_ended = False
        self.ending = False
        self.error: BaseException | None = None
        self.failed_index: float = math.inf  # of the item whose failure ended the job

    # --- what a driver calls

    def handle(self, events: Iterable[Event], now: float) -> Message | None:
        """Takes all that has happened, then starts what may start, and decides on demand, once.

        Returns:
            What the caller's thread has to know, or `None` if nothing.
        """
        self.now = now
        remaining = iter(events)
        while True:
            try:
                for handler, subject, answer, error in remaining:
                    handler(subject, answer, error)
                if not self.ending:
                    self._start(now)
                break
            except BaseException as broken:  # noqa: BLE001 - a submit or a policy that raises ends the job
                self._end(without_our_frames(broken))  # and the events that are left are still taken
        return self._message()

    def due(self) -> float | None:
        """Returns when `handle` has to be called even if nothing has happened, or `None`."""
        if self.ending:
            return None
        lines = [line for line in (self.token_line, self.result_line) if line.gates]
        times = [time for line in lines if (time := line.opens(self.now)) > self.now]
        if self.delayed:
            times.append(self.delayed[0][0])
        return min(times, default=None)

    # --- events from the caller's thread

    def batch_read(self, items: list[Any], _: object, _error: BaseException | None) -> None:
        """Takes a batch that was wanted; fewer items than `batch_size` only at the source's end."""
        first = self.read
        self.read += len(items)
        self.asked -= 1
        if self.results is not None:
            self.results.extend([None] * len(items))
        if not self.ending:
            self.batches.append(Batch([Outcome(index, item) for index, item in enumerate(items, first)]))

    def source_end(self, _: object, _answer: object, error: BaseException | None) -> None:
        """Hears that the source has no more items, or that it raised."""
        self.source_ended = True
        if error is not None:
            self._end(error)

    def outcomes_taken(self, number: int, _: object, _error: BaseException | None) -> None:
        """Hears that the consumer was handed so many outcomes more."""
        self.taken += number
        self.in_progress -= number

    def close(self, _: object, _answer: object, _error: BaseException | None) -> None:
        """Ends the job before its time, as somebody wants no more of it."""
        self._end(None)

    # --- ends of attempts

    def batch_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """Fans a batch's tokens out to stage two, if the verdict gives any."""
        tokens = self._verdict(self.token_line, batch, batch.outcomes, answer, error)
        if tokens is UNANSWERED or self.ending:
            return
        attempts = batch.attempts
        for outcome, token in zip(batch.outcomes, tokens, strict=True):
            outcome.token = token
            outcome.token_attempts = attempts
        self.result_line.waiting.extend(batch.outcomes)

    def result_ended(self, outcome: AnyOutcome, answer: object, error: BaseException | None) -> None:
        """Finishes an item with its result, if the verdict gives any."""
        result = self._verdict(self.result_line, outcome, (outcome,), answer, error)
        if result is not UNANSWERED:
            outcome.result = result
            self.finished += 1
            self._hand_over(outcome)

    def _verdict(
        self,
        line: Line,
        call: Call,
        outcomes: Sequence[AnyOutcome],
        answer: object,
        error: BaseException | None,
    ) -> Any:  # noqa: ANN401 - what the user's function returned
        """Asks what becomes of a call whose attempt has ended, and carries a retry or a failure out.

        Returns:
            The checked answer; `UNANSWERED` if there is none, or none yet.
        """
        call.attempts += 1
        for gate in line.gates:
            gate.ended(call, self.now)
        if error is None:
            try:
                value = line.check(answer, len(outcomes))
            except Exception as refused:  # noqa: BLE001 - an answer's `__len__` may raise anything
                error = refused.with_traceback(None)
            else:
                if not line.judge.judges_results:
                    return value
        elif not isinstance(error, Exception):
            self._end(error)
            return UNANSWERED
        if self.ending:
            return UNANSWERED
        return self._carry_out(line, call, outcomes, error, line.judge.judge(call, answer, error, self.now))

    def _carry_out(
        self,
        line: Line,
        call: Call,
        outcomes: Sequence[AnyOutcome],
        error: Exception | None,
        verdict: Verdict,
    ) -> Any:  # noqa: ANN401 - as above
        if isinstance(verdict, Answer):
            try:
                return line.check(verdict.value, len(outcomes))
            except Exception as refused:  # noqa: BLE001 - as above
                verdict = Fail(refused.with_traceback(None))
        if isinstance(verdict, Fail):
            self._fail(line, call, outcomes, verdict.error)
        else:
            self._log_retry(line, call, error, verdict.due)
            self.in_progress -= len(outcomes)
            heappush(self.delayed, (verdict.due, next(self._tie), line, call))
        return UNANSWERED

    def _log_retry(self, line: Line, call: Call, error: Exception | None, due: float) -> None:
        level = logging.INFO if line.has_retried else logging.WARNING
        line.has_retried = True
        if log.isEnabledFor(level):
            status = None if error is None else status_of(error)
            log.log(
                level,
                "%s: attempt %d %s%s; the next one in %.2f s",
                line.name,
                call.attempts,
                "was refused by the retry policy" if error is None else f"failed with {type(error).__name__}",
                "" if status is None else f", status {status}",
                max(due - self.now, 0),
            )

    def _fail(self, line: Line, call: Call, outcomes: Sequence[AnyOutcome], error: Exception) -> None:
        """Gives a call's items their failure, which is the end of the job unless failures are wanted."""
        items = (
            brief(outcomes[0].item)
            if len(outcomes) == 1
            else f"{len(outcomes)} items from {brief(outcomes[0].item)}"
        )
        plural = "" if call.attempts == 1 else "s"
        _add_note(error, f"twostage: {line.name}, {items}, {call.attempts} attempt{plural}")
        if not self.return_exceptions:
            self.failed_index = min(self.failed_index, outcomes[0].index)
            self._end(error)
            return
        for outcome in outcomes:
            outcome.exception = error
            if line is self.token_line:
                outcome.token_attempts = call.attempts
            self.finished += 1
            self._hand_over(outcome)

    # --- three ways to hand outcomes over

    def _place(self, outcome: AnyOutcome) -> None:
        assert self.results is not None  # noqa: S101 - for the type checker
        self.results[outcome.index] = outcome.result if outcome.exception is None else outcome.exception
        self.taken += 1
        self.in_progress -= 1

    def _release(self, outcome: AnyOutcome) -> None:
        self.ready.append(outcome)

    def _hold(self, outcome: AnyOutcome) -> None:
        self.held[outcome.index] = outcome
        self.in_progress -= 1
        while (following := self.held.pop(self.next_index, None)) is not None:
            self.ready.append(following)
            self.next_index += 1
            self.in_progress += 1

    # --- decided once for all events of a wake-up

    def _start(self, now: float) -> None:
        while self.delayed and self.delayed[0][0] <= now:
            _, _, line, call = heappop(self.delayed)
            line.due.append(call)
            self.in_progress += len(call.outcomes) if isinstance(call, Batch) else 1
        if self.tokens_first:
            self._start_results(now)
            self._start_batches(now)
        else:
            self._start_batches(now)
            self._start_results(now)

    def _start_batches(self, now: float) -> None:
        line = self.token_line
        if line.due:
            line.start_due(now)
        while self.batches and self.in_progress < self.bound and (room := line.room(now)) > 0:
            batches: list[Batch] = []
            while self.batches and self.in_progress < self.bound and len(batches) < room:
                batches.append(self.batches.popleft())
                self.in_progress += len(batches[-1].outcomes)
            line.start(batches, now)
            if self.finished == self.result_line.runner.out == 0:
                self.result_line.runner.expect(self.in_progress)

    def _start_results(self, now: float) -> None:
        line = self.result_line
        if line.due:
            line.start_due(now)
        if line.waiting:
            line.start_waiting(now)

    def _wanted(self) -> int:
        """Decides how many more batches to ask for: whole ones, up to one bound read and not started."""
        size = self.batch_size
        stock = len(self.batches) + self.asked
        if self.source_ended or self.ending:
            return 0
        room = self.window - (self.read + self.asked * size - self.taken)
        return max(0, min(self.bound // size - stock, room // size))

    def _end(self, error: BaseException | None) -> None:
        """Ends the job: nothing more starts, what waits is dropped; what runs is still heard of."""
        if self.ending:
            return
        self.ending = True
        self.error = error
        for line in (self.token_line, self.result_line):
            line.runner.stop()
            line.waiting.clear()
            line.due.clear()
        self.batches.clear()
        self.delayed.clear()

    def _message(self) -> Message | None:
        if not self.ending and self.source_ended and self.finished == self.read:
            self._end(None)
        ended = self.ending and self.token_line.runner.out == 0 and self.result_line.runner.out == 0
        if ended and self.held:
            # The job has ended early, so those between will never come.
            self.ready += [self.held[index] for index in sorted(self.held) if index < self.failed_index]
            self.held.clear()
        wanted = self._wanted()
        if not (self.ready or wanted or ended):
            return None
        self.asked += wanted
        message = Message(self.ready, wanted, ended, self.error)
        self.ready = []  # a new list: the other thread has the old one
        if ended:
            # An exception's traceback leads back here, by the frames of its worker.
            self.results = self.error = None
        return message


def _add_note(error: Exception, note: str) -> None:
    """Adds our note, once: one exception may stand for many items, and may have been raised before."""
    notes = getattr(error, "__notes__", ())
    if not any(isinstance(one, str) and one.startswith("twostage: ") for one in notes):
        with contextlib.suppress(Exception):  # frozen ones refuse, and are raised as they are
            error.add_note(note)
