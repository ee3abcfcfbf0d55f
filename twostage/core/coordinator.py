"""The state machine of a job: all its state, in one object that never waits."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from twostage.base.records import Batch, Call, Outcome, members_of, told
from twostage.base.words import add_note, without_our_frames
from twostage.core.moments import Hears, Message
from twostage.errors import RunTimeout
from twostage.failing.retry import Answer, Fail, Late, Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from twostage.base.as_completed import Event
    from twostage.base.records import Member
    from twostage.base.runner import Runner
    from twostage.core.handover import AnyOutcome, HandOver
    from twostage.core.lines import Judged, Line
    from twostage.core.reading import Reading

__all__ = ["LEAST_IN_PROGRESS", "Coordinator"]

LEAST_IN_PROGRESS = 256
"""The floor of the in-progress bound: with less, calls of no latency starve the pools of threads."""

Answered: TypeAlias = "tuple[Sequence[Any], Sequence[Any], BaseException | None]"
"""Members of a call that have an answer, and the answers; and the failure of an attempt as a whole."""


class Coordinator:
    """Decides what happens next in one job, and holds all that this depends on.

    `handle` takes what has happened and `due` says when to call it without any event; both return at
    once. Whoever drives it, a thread or a virtual clock, is the only one to touch it.

    Args:
        lines: The stages, in their order.
        bound: How many items may be in progress before nothing new is begun.
        reading: How much of the source is read.
        handing: Where outcomes go.
        return_exceptions: Whether a failed item is an outcome like any other, or the end of the job.
        last_first: Whether what is nearest to its end starts first: right if stages share one executor.
            Else stage one goes first, as it feeds the others.
        timeout: Seconds from the first moment on after which nothing starts any more.

    Attributes:
        hears: What its parts hear of.
        spread: Makes calls of stage two, of items that have a list of tokens; if not, each is one itself.
        send_back: Sends items back for a new token, if that is wanted.
        reader: What reads the source, item by item, if the consumer's thread does not.
    """

    reader: Runner | None = None
    spread: Callable[[Batch, Sequence[AnyOutcome]], Sequence[Member]] | None = None
    send_back: Callable[[Line, Call, Sequence[Any], Exception], None] | None = None

    def __init__(
        self,
        *lines: Line,
        bound: int,
        reading: Reading,
        handing: HandOver,
        return_exceptions: bool,
        last_first: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.lines = lines
        self.order = lines[::-1] if last_first else lines
        self.bound = bound
        self.reading = reading
        self.handing = handing
        self.return_exceptions = return_exceptions
        self.timeout = math.inf if timeout is None else timeout
        self.hears = Hears()
        self.delayed: list[tuple[float, int, Line, Call]] = []  # a heap by due time
        self._tie = count()  # equal due times must not compare calls

        self.finished = 0  # items with an outcome
        self.failed = 0  # of them, those that have none but a failure
        self.at_work = 0  # items at stage one, tokens at stage two; not those that wait for a due time
        self.ending = False
        self.error: BaseException | None = None
        self.failed_index: float = math.inf  # of the item whose failure ended the job
        self.now = 0.0
        self.began: float | None = None  # the first moment
        self.deadline = math.inf  # when the timeout will have passed
        self.timed_out: RunTimeout | None = None  # what those get that were not done by then

    @property
    def in_progress(self) -> int:
        """What the bound counts: items at stage one, tokens at stage two, outcomes not taken."""
        return self.at_work + self.handing.not_taken

    # --- what a driver calls

    def handle(self, events: Iterable[Event], now: float) -> Message | None:
        """Takes all that has happened, then starts what may start, and decides on demand, once.

        Returns:
            What the caller's thread has to know, or `None` if nothing.
        """
        self.now = now
        if self.began is None:
            self.began = now
            self.deadline = now + self.timeout
        self._take(events, now)
        for hear in self.hears.before_message:
            hear()
        message = self._message()
        for hear_of in self.hears.handled:
            hear_of(message)
        if message is not None and message.ended:
            self.hears = Hears()  # a part may hold the last failure, whose traceback leads back here
        return message

    def _take(self, events: Iterable[Event], now: float) -> None:
        remaining = iter(events)
        while True:
            try:
                for handler, subject, answer, error in remaining:
                    handler(subject, answer, error)
                for line in self.lines:
                    if line.timed:
                        line.runner.give_up(now)
                if not self.ending:
                    self._start(now)
                    for line in self.lines:
                        if line.is_held_back:
                            line.check_patience(now)
                    if self.reader is not None:
                        self.reader.start([Call()] * (self._ask() * self.reading.size))
                break
            except BaseException as broken:  # noqa: BLE001 - a submit or a policy that raises ends the job
                self.end(without_our_frames(broken))  # and the events that are left are still taken

    def due(self) -> float | None:
        """Returns when `handle` has to be called even if nothing has happened, or `None`."""
        times = [line.runner.next_overdue(self.now) for line in self.lines if line.timed]
        times += [ask() for ask in self.hears.due]
        if not self.ending:
            later = [line.opens(self.now) for line in self.lines if line.is_held_back]
            later += [self.reading.leaves_at(self.lines[0].waiting), self.deadline]
            times += [time for time in later if self.now < time < math.inf]
            if self.delayed:
                times.append(self.delayed[0][0])
        return min(times, default=None)

    # --- events from the caller's thread

    def batch_read(self, items: list[Any], keys: list[Hashable] | None, _error: BaseException | None) -> None:
        """Takes items that were wanted."""
        first = self.reading.took(len(items))
        self.handing.expect(len(items))
        if self.ending:
            return
        outcomes: list[AnyOutcome] = [Outcome(index, item) for index, item in enumerate(items, first)]
        for sort in self.hears.read:
            outcomes = sort(outcomes, keys)
        self.reading.begin_to_wait(outcomes, self.now)
        self.lines[0].waiting.extend(outcomes)

    def item_read(self, _: Call, read: tuple[Any, Hashable], error: BaseException | None) -> None:
        """Takes an item, and its key, that a thread of ours has read."""
        if error is None:
            self.batch_read([read[0]], [read[1]], None)
        else:
            self.source_end(None, None, None if isinstance(error, StopIteration) else error)

    def source_end(self, _: object, _answer: object, error: BaseException | None) -> None:
        """Hears that the source has no more items, or that it raised."""
        self.reading.end()
        if self.reader is not None:
            self.reader.stop()
        if error is not None:
            self.end(error)

    def source_left(self, _: object, _answer: object, _error: BaseException | None) -> None:
        """Hears that nobody reads on, though the source is not at its end."""
        self.reading.leave()

    def outcomes_taken(self, number: int, _: object, _error: BaseException | None) -> None:
        """Hears that the consumer was handed so many outcomes more."""
        self.handing.took(number)

    def close(self, _: object, _answer: object, _error: BaseException | None) -> None:
        """Ends the job before its time, as somebody wants no more of it."""
        self.end(None)

    # --- ends of attempts

    def tokens_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """Fans a batch's tokens out to stage two, those of them that have come."""
        line, first, size = self.lines[0], batch.members[0], len(batch.members)
        outcomes, tokens, failure = self.ended(line, batch, answer, error)
        for outcome, token in zip(outcomes, tokens, strict=True):
            outcome.token = token
            outcome.token_attempts = batch.attempts
        if self.spread is None:
            self.hears.tell_tokens(outcomes)
        calls = outcomes if self.spread is None else self.spread(batch, outcomes)
        if not self.ending:
            self.lines[1].waiting.extend(calls)
        for tell in self.hears.attempts:
            tell(line, batch, first, size, len(calls), failure)

    def results_ended(self, call: Call, answer: object, error: BaseException | None) -> None:
        """Finishes items with their results, those of them that have come."""
        line = self.lines[1]
        all_members = (call,) if line.batch_size is None else cast("Batch", call).members
        members, results, failure = self.ended(line, call, answer, error)
        for hear in self.hears.results:
            hear(members, results)
        for member, result in zip(members, results, strict=True):
            member.attempts = call.attempts
            self.settle(member.answer(result))
        for tell in self.hears.attempts:
            tell(line, call, cast("Member", all_members[0]), len(all_members), len(results), failure)

    def ended(self, line: Line, call: Call, answer: object, error: BaseException | None) -> Answered:
        """Asks what becomes of a call whose attempt has ended, and carries all out that is no answer.

        Returns:
            The members that have an answer, and the answers; and the attempt's failure as a whole.
        """
        members: Sequence[Any] = (call,) if line.batch_size is None else cast("Batch", call).members
        call.attempts += 1
        judged: Sequence[Judged] = ()
        values: Sequence[Any] | None = None
        if line.gates:
            line.ended(call, answer, error, self.now)
        if error is None:
            try:
                values = line.check(answer, call)
            except Exception as refused:  # noqa: BLE001 - an answer's `__len__` may raise anything
                error = refused.with_traceback(None)
        if error is not None:
            if not isinstance(error, Exception):
                self.end(error)
            elif not self.ending:
                judged = line.judge_failure(call, members, error, self.now, self.deadline)
        elif values is not None and not line.succeeded_whole(values, self.now):
            judged = line.judge_values(call, members, values, self.now, self.deadline)
            values = None
        if values is None:
            members, values = self._carry_out(line, call, judged)
        if line.refusals is not None:
            line.refusals.ended(cast("Batch", call), accepted=bool(members))
        return members, values, error

    def enter(self, number: int) -> None:
        """Hears of items or tokens that are in progress from now on; below 0 of some that are so no more."""
        self.at_work += number

    def settle(self, outcome: AnyOutcome | None) -> None:
        """Hears of an answer: it was the last that an outcome has waited for, or it was not."""
        self.at_work -= 1
        if outcome is not None:
            self.hand_over(outcome)

    def hand_over(self, outcome: AnyOutcome) -> None:
        """Hands an outcome over that is done."""
        self.finished += 1
        if outcome.exception is not None:
            self.failed += 1
        self.handing.add(outcome)
        for hear in self.hears.done:
            hear(outcome)

    # --- verdicts

    def _carry_out(
        self, line: Line, call: Call, judged: Sequence[Judged]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Returns the members that have an answer, and the answers."""
        answered: list[Any] = []
        answers: list[Any] = []
        failed: list[tuple[Sequence[Any], Fail]] = []
        for members, verdict, error, attempt in judged:
            if isinstance(verdict, Answer):
                answered += members
                answers.append(verdict.value)
                if verdict.given:
                    self.hears.tell_given(members)
            elif self.ending:
                continue
            elif isinstance(verdict, Fail):
                failed.append((members, verdict))
            elif isinstance(verdict, Late):
                failed.append((members, Fail(verdict.failure or self.time_out(), may_pass=True)))
            elif isinstance(verdict, Retry):
                self.hears.tell_retry(line, members, error, attempt, verdict.due)
                self._delay(line, call, members, verdict.due)
            elif self.send_back is not None:
                self.send_back(line, call, members, verdict.error)
        if failed:
            self._fail_or_split(line, call, failed)  # last, as it may be the job's end
        return answered, answers

    def _fail_or_split(self, line: Line, call: Call, failed: Sequence[tuple[Sequence[Any], Fail]]) -> None:
        for members, fail in failed:
            if line.refusals is None or not line.refusals.takes(call, members, fail.error):
                self.fail(line, call, members, fail.error, may_pass=fail.may_pass)

    def _delay(self, line: Line, call: Call, members: Sequence[Any], due: float) -> None:
        if isinstance(call, Batch):
            call.members = members
            call.is_delayed = True
        self.at_work -= len(members)
        due = min(line.pace.put_off(call, due), self.deadline)  # by which all have to be in line
        heappush(self.delayed, (due, next(self._tie), line, call))

    def fail(
        self, line: Line, call: Call, members: Sequence[Any], error: Exception, *, may_pass: bool = False
    ) -> None:
        """Gives items their failure, which is the end of the job unless failures are wanted."""
        failed = [member for member in members if not member.dropped]
        self.at_work -= len(members) - len(failed)
        if not failed:
            return
        if error is not self.timed_out:  # that is everybody's
            plural = "" if call.attempts == 1 else "s"
            add_note(error, f"{line.name}, {told(call, failed)}, {call.attempts} attempt{plural}")
            for hear in self.hears.failed:
                hear(line.stage, failed, error, may_pass)
        if self.return_exceptions:
            for member in failed:
                self.settle(member.fail(error, line.stage, call.attempts))
            return
        if error is not self.timed_out:  # which keeps nothing back that is done
            self.failed_index = min(self.failed_index, *(member.outcome.index for member in failed))
        self.end(error)

    # --- decided once for all events of a wake-up

    def _start(self, now: float) -> None:
        self._line_up_due(now)
        if now >= self.deadline:
            self._give_up()
        else:
            for line in self.order:
                if line.due:
                    line.start_due(now)
                if line is self.lines[0]:
                    self._start_items(line, now)
                elif line.waiting:
                    line.start_waiting(now)
        if any(line.refused for line in self.lines):
            for line in self.lines:
                self._fail_refused(line)
            self._start(now)  # they have made room

    def _line_up_due(self, now: float) -> None:
        """Has calls whose time has come wait in line again."""
        while self.delayed and self.delayed[0][0] <= now:
            _, _, line, call = heappop(self.delayed)
            if not call.dropped:
                line.due.append(call)
                self.at_work += len(members_of(call))

    def _fail_refused(self, line: Line) -> None:
        """Has calls fail that a gate will never let start."""
        refused, line.refused = line.refused, []
        for call, error in refused:
            self.fail(line, call, members_of(call), error)
            if line.refusals is not None:
                line.refusals.refused_by_gate(cast("Batch", call))

    def _start_items(self, line: Line, now: float) -> None:
        """Starts batches of the first stage: what has come back at once, the rest within the bound."""
        # Tokens beyond one an item fill the window too: then no more are begun, though they have been read.
        room_to_read = self.reading.room
        bound = self.bound
        if self.handing.surplus_tokens and room_to_read < 0:
            # But one if nothing else goes on: in order, tokens that were there wait for items behind them.
            bound = 0 if self.in_progress or self.delayed else 1
        while line.back and line.room(now) > 0:
            batch, fresh = line.take_returned(bound - self.in_progress)
            self.at_work += fresh
            line.start([batch], now, first=True)
        least = cast("int", line.batch_size) if self.reading.fills(room_to_read, line.waiting, now) else 1
        while len(line.waiting) >= least and self.in_progress < bound and (room := line.room(now)) > 0:
            batches: list[Call] = []
            while len(line.waiting) >= least and self.in_progress < bound and len(batches) < room:
                waited = len(line.waiting)
                batches.append(line.take())
                self.at_work += waited - len(line.waiting)
            line.start(batches, now)
            if self.finished == self.lines[-1].runner.out == 0:
                self.lines[-1].runner.expect(self.in_progress)

    def _ask(self) -> int:
        """Asks for more batches of the source: as much as one bound may be read and not started."""
        passed = self.in_progress >= 2 * self.bound  # as by tokens that were there
        return 0 if self.ending or passed else self.reading.ask(self.bound - len(self.lines[0].waiting))

    # --- ends

    def time_out(self) -> RunTimeout:
        """Returns what all items get that are not done when the time is over."""
        if self.timed_out is None:
            self.timed_out = RunTimeout(f"the run's timeout of {self.timeout:g} s has passed")
        return self.timed_out

    def _give_up(self) -> None:
        """Lets nothing begin any more, as the time is over; what runs keeps its own end."""
        for line in self.lines:
            if line is self.lines[0]:
                self.at_work += len(line.waiting)
            taken_back = [(call, None) for call in line.take_back()]
            for call, refusal in (*taken_back, *line.drop()):
                self.fail(line, call, members_of(call), refusal or self.time_out())
        if self.reader is not None and self.handing.results is None:  # a list has all items
            self.reader.stop()
            self.source_left(None, None, None)

    def end(self, error: BaseException | None) -> None:
        """Ends the job: nothing more starts, what waits is dropped; what runs is still heard of."""
        if self.ending:
            return
        self.ending = True
        self.error = error
        if self.reader is not None:
            self.reader.stop()
        for line in self.lines:
            line.runner.stop()
            line.drop()
        self.delayed.clear()

    def _message(self) -> Message | None:
        if not self.ending and self.reading.ended and self.finished == self.reading.number:
            self.end(self.timed_out if self.reading.left else None)
        ended = self.ending and not any(line.runner.out for line in self.lines)
        if ended:
            self.handing.release_held(self.failed_index)  # those between will never come, if there are any
        leave = self.now >= self.deadline and self.handing.results is None and not self.reading.leaving
        self.reading.leaving = self.reading.leaving or leave
        wanted = 0 if self.reader is not None else self._ask()
        if not (self.handing.ready or wanted or leave or ended):
            return None
        message = Message(self.handing.take_ready(), wanted, leave, ended, self.error)
        if ended:
            self.handing.finish(self.error)
            # An exception's traceback leads back here, by the frames of its worker.
            self.error = self.timed_out = None
        return message
