"""The state machine of a job: all its state, in one object that never waits."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from twostage.answers.answers import token_list
from twostage.answers.splits import halves
from twostage.base.records import Batch, Call, ListedToken, Outcome, TokenList, item_of, members_of, told
from twostage.errors import RunTimeout, add_note, without_our_frames
from twostage.failing.retry import Answer, Refresh, Retry
from twostage.observing.events import JobEnded, Progress, RetryDue

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from twostage.answers.splits import Splits
    from twostage.answers.twins import Twins
    from twostage.base.as_completed import Event
    from twostage.base.records import Member
    from twostage.core.handover import AnyOutcome, HandOver
    from twostage.core.lines import Judged, Line
    from twostage.core.reading import Reading
    from twostage.journal.recorder import Recorder
    from twostage.observing.events import Listeners
    from twostage.running.on_executor import Runner

log = logging.getLogger("twostage")

__all__ = ["LEAST_IN_PROGRESS", "Coordinator", "Message"]

Answered: TypeAlias = "tuple[Sequence[Any], Sequence[Any], BaseException | None]"
"""Members of a call that have an answer, and the answers; and the failure of an attempt as a whole."""

LEAST_IN_PROGRESS = 256
"""The floor of the in-progress bound: with less, calls of no latency starve the pools of threads."""


class Message(NamedTuple):
    """What a coordinator tells the caller's thread.

    Attributes:
        outcomes: To be handed over, in this order.
        wanted: How many more batches the source is to be asked for.
        leave: Whether it is to be read no more, not even what was wanted; `source_left` is to be told then.
        ended: Whether this is the last message.
        error: Why the job ended early, to be raised after the outcomes.
    """

    outcomes: list[AnyOutcome]
    wanted: int
    leave: bool
    ended: bool
    error: BaseException | None


class Coordinator:
    """Decides what happens next in one job, and holds all that this depends on.

    `handle` takes what has happened and `due` says when to call it without any event; both return at
    once. Whoever drives it, a thread or a virtual clock, is the only one to touch it.

    Args:
        token_line: Stage one.
        result_line: Stage two.
        bound: How many items may be in progress before nothing new is begun.
        reading: How much of the source is read.
        handing: Where outcomes go.
        return_exceptions: Whether a failed item is an outcome like any other, or the end of the job.
        tokens_first: Whether ready tokens start before ready batches: right if both stages share one
            executor. Else stage one goes first, as it feeds the other.
        many: Whether stage one gives a list of tokens for each item.
        twins: Knows which items are equal, if that is to be looked at.
        max_refreshes: How often an item may go back to stage one for a new token.
        timeout: Seconds from the first moment on after which nothing starts any more.
        too_many: Hears of each outcome; returns what ends the job if it is one failure too many.
        linger: Seconds that an item waits for others to fill its batch, at most; infinite if it does so
            until the source's end.
        recorder: Keeps what the calls give, if that is wanted. (Then there are `twins`.)
        listeners: Who hears of what happens.

    Attributes:
        reader: What reads the source, item by item, if the consumer's thread does not.
    """

    reader: Runner | None = None

    def __init__(  # noqa: PLR0913 - it is one job's settings
        self,
        token_line: Line,
        result_line: Line,
        *,
        bound: int,
        reading: Reading,
        handing: HandOver,
        listeners: Listeners,
        return_exceptions: bool,
        tokens_first: bool = False,
        many: bool = False,
        twins: Twins | None = None,
        max_refreshes: int = 1,
        timeout: float = math.inf,
        too_many: Callable[[AnyOutcome], Exception | None] | None = None,
        linger: float = math.inf,
        recorder: Recorder | None = None,
    ) -> None:
        self.token_line = token_line
        self.result_line = result_line
        self.lines = (token_line, result_line)
        self.bound = bound
        self.reading = reading
        self.handing = handing
        self.return_exceptions = return_exceptions
        self.tokens_first = tokens_first
        self.many = many
        self.twins = twins
        self.max_refreshes = max_refreshes
        self.timeout = timeout
        self.too_many = too_many
        self.linger = linger
        self.recorder = recorder
        self.listeners = listeners
        self.returned: deque[AnyOutcome] = deque()  # items that want a new token
        self.refreshed: Counter[int] = Counter()  # how often each has, by its index
        self.delayed: list[tuple[float, int, Line, Call]] = []  # a heap by due time
        self._tie = count()  # equal due times must not compare calls

        self.finished = 0  # items with an outcome
        self.failed = 0  # of them, those that have none but a failure
        self.at_work = 0  # items at stage one, tokens at stage two; not those that wait for a due time
        self.ending = False
        self.error: BaseException | None = None
        self.failed_index: float = math.inf  # of the item whose failure ended the job
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
        message = self._message()
        ended = message is not None and message.ended
        if self.listeners.progressed:
            self._look(ended=ended)
        if message is not None and ended:
            self._tell_end(message.error)
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
                    for line in self._held_back():
                        line.check_patience(now)
                    if self.reader is not None:
                        self._read_on(self.reader)
                break
            except BaseException as broken:  # noqa: BLE001 - a submit or a policy that raises ends the job
                self._end(without_our_frames(broken))  # and the events that are left are still taken

    def due(self) -> float | None:
        """Returns when `handle` has to be called even if nothing has happened, or `None`."""
        times = [line.runner.next_overdue(self.now) for line in self.lines if line.timed]
        if self.listeners.progressed:
            times.append(self.listeners.next_look)
        if self.ending:
            return min(times, default=None)
        times += [t for line in self._held_back() if self.now < (t := line.opens(self.now)) < math.inf]
        if self.delayed:
            times.append(self.delayed[0][0])
        if self.linger < math.inf and self.token_line.waiting and self._leaves_at() > self.now:
            times.append(self._leaves_at())
        if self.now < self.deadline < math.inf:
            times.append(self.deadline)
        return min(times, default=None)

    def _held_back(self) -> list[Line]:
        """Returns the stages where calls, or items for them, wait for nothing but the gates."""
        return [
            line
            for line in self.lines
            if line.gates
            and line.runner.out < line.limit
            and (line.due or line.waiting or (line is self.token_line and self.returned))
        ]

    # --- events from the caller's thread

    def batch_read(self, items: list[Any], keys: list[Hashable] | None, _error: BaseException | None) -> None:
        """Takes items that were wanted."""
        first = self.reading.took(len(items))
        if self.handing.results is not None:
            self.handing.results.extend([None] * len(items))
        if self.ending:
            return
        outcomes: list[AnyOutcome] = [Outcome(index, item) for index, item in enumerate(items, first)]
        if self.twins is not None and keys is not None:
            outcomes, known = self.twins.sort(outcomes, keys)
            self._finish_twins(known)
        if self.recorder is not None:
            outcomes = self._take_recorded(self.recorder, outcomes)
        if self.linger < math.inf:
            for outcome in outcomes:
                outcome.began = self.now  # of waiting, until its stage two begins
        self.token_line.waiting.extend(outcomes)

    def _take_recorded(self, recorder: Recorder, outcomes: list[AnyOutcome]) -> list[AnyOutcome]:
        """Has items go on from what is recorded; returns those of which nothing is."""
        found = recorder.find(outcomes)
        self.at_work += len(found.calls) + len(found.done)
        for tokens in found.lists:
            self.handing.add_surplus(tokens.outcome.index, len(tokens.results) - 1)
        self.result_line.waiting.extend(found.calls)
        failed = {} if self.return_exceptions else dict(found.failed)
        for outcome in found.done:
            if outcome.index not in failed:
                self._finish(outcome)
        if failed:
            self.failed_index = min(failed)
            self._end(failed[min(failed)])
        return found.new

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
            self._end(error)

    def source_left(self, _: object, _answer: object, _error: BaseException | None) -> None:
        """Hears that nobody reads on, though the source is not at its end."""
        self.reading.leave()

    def outcomes_taken(self, number: int, _: object, _error: BaseException | None) -> None:
        """Hears that the consumer was handed so many outcomes more."""
        self.handing.took(number)

    def close(self, _: object, _answer: object, _error: BaseException | None) -> None:
        """Ends the job before its time, as somebody wants no more of it."""
        self._end(None)

    # --- ends of attempts

    def batch_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """Fans a batch's tokens out to stage two, those of them that have come."""
        first, size = batch.members[0], len(batch.members)
        outcomes, tokens, failure = self._batch_ended(self.token_line, batch, answer, error)
        attempts = batch.attempts
        for outcome, token in zip(outcomes, tokens, strict=True):
            outcome.token = token
            outcome.token_attempts = attempts
        calls = self._listed(batch, outcomes) if self.many else outcomes
        if self.recorder is not None and not self.many:
            self.recorder.tokens(outcomes)
        if not self.ending:
            self.result_line.waiting.extend(calls)
        if self.listeners.attempt_ended:
            self.listeners.tell_attempt(1, batch, first, size, self.now, len(calls), failure)

    def _listed(self, batch: Batch, outcomes: Iterable[AnyOutcome]) -> list[ListedToken]:
        """Returns the tokens of items that have many; what is no list of them is its item's failure."""
        having: list[AnyOutcome] = []
        for outcome in outcomes:
            try:
                outcome.token = token_list(outcome.token)
                having.append(outcome)
            except Exception as error:  # noqa: BLE001 - a collection of the user's may raise anything
                outcome.token = None
                if not self.ending:
                    self._fail(self.token_line, batch, [outcome], error.with_traceback(None))
        if self.recorder is not None:
            self.recorder.lists(having)
        calls: list[ListedToken] = []
        for outcome in having:
            tokens = cast("list[Any]", outcome.token)
            if not tokens:
                outcome.result = []
                self._finish(outcome)
                continue
            self.at_work += len(tokens) - 1
            self.handing.add_surplus(outcome.index, len(tokens) - 1)
            listed = TokenList(outcome, len(tokens))
            calls += [ListedToken(listed, place, token) for place, token in enumerate(tokens)]
        return calls

    def result_ended(self, call: Member, answer: object, error: BaseException | None) -> None:
        """Finishes an item with its result, if that has come."""
        members, results, failure = self._ended(self.result_line, call, (call,), answer, error)
        self._take_results(members, results)
        if self.listeners.attempt_ended:
            self.listeners.tell_attempt(2, call, call, 1, self.now, len(results), failure)

    def results_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """The same for a batch of tokens."""
        first, size = batch.members[0], len(batch.members)
        members, results, failure = self._batch_ended(self.result_line, batch, answer, error)
        for member in members:
            member.attempts = batch.attempts
        self._take_results(members, results)
        if self.listeners.attempt_ended:
            self.listeners.tell_attempt(2, batch, first, size, self.now, len(results), failure)

    def _take_results(self, members: Sequence[Member], results: Sequence[Any]) -> None:
        if self.recorder is not None:
            self.recorder.results(zip(members, results, strict=True))
        for member, result in zip(members, results, strict=True):
            if not isinstance(member, ListedToken):
                member.result = result
                self._finish(member)
            elif member.tokens.dropped:
                self.at_work -= 1
            else:
                self._put_in_list(member, result)

    def _put_in_list(self, token: ListedToken, result: object) -> None:
        listed, outcome = token.tokens, token.outcome
        outcome.attempts += token.attempts
        listed.results[token.place] = result
        listed.missing -= 1
        if listed.missing:
            self.at_work -= 1
            return
        outcome.result = listed.results
        self._finish(outcome)

    def _finish(self, outcome: AnyOutcome) -> None:
        self.at_work -= 1
        self._hand_over(outcome)
        if self.twins is not None:
            self._finish_twins(self.twins.done(outcome))
        if self.refreshed:
            self.refreshed.pop(outcome.index, None)

    def _finish_twins(self, twins: Iterable[AnyOutcome]) -> None:
        for twin in twins:
            self._hand_over(twin)

    def _hand_over(self, outcome: AnyOutcome) -> None:
        self.finished += 1
        if outcome.exception is not None:
            self.failed += 1
        self.handing.add(outcome)
        if self.listeners.outcome_done:
            self.listeners.tell(self.listeners.outcome_done, outcome)
        if self.recorder is not None:
            self.recorder.finished(outcome)
        if self.too_many is not None and (error := self.too_many(outcome)) is not None:
            self._end(error)

    # --- verdicts, and what is done about them

    def _batch_ended(self, line: Line, batch: Batch, answer: object, error: BaseException | None) -> Answered:
        splits = line.splits
        if splits is None:
            return self._ended(line, batch, batch.members, answer, error)
        splits.pieces.discard(batch)
        answered = self._ended(line, batch, batch.members, answer, error)
        size = splits.ended(batch, accepted=bool(answered[0]))
        if size is not None:
            self._shrink(line, size)
        self._refuse_waiting(line, splits)
        return answered

    def _ended(
        self, line: Line, call: Call, members: Sequence[Any], answer: object, error: BaseException | None
    ) -> Answered:
        """Asks what becomes of a call whose attempt has ended, and carries all out that is no answer.

        Returns:
            The members that have an answer, and the answers; and the attempt's failure as a whole.
        """
        call.attempts += 1
        if line.gates:
            line.ended(call, answer, error, self.now)
        if error is None:
            try:
                values = line.check(answer, call)
            except Exception as refused:  # noqa: BLE001 - an answer's `__len__` may raise anything
                error = refused.with_traceback(None)
            else:
                judged = line.looks_at_values and line.has_to_judge(values)
                if not (judged and line.is_throttled(values)):
                    line.pace.succeeded_at = self.now
                    if line.pace.watches:
                        line.succeeded(self.now)
                if not judged:
                    return members, values, None
                judge = line.judge_values(call, members, values, self.now, self.deadline)
                return *self._carry_out(line, call, judge), None
        if not isinstance(error, Exception):
            self._end(error)
        elif not self.ending:
            judge = line.judge_failure(call, members, error, self.now)
            return *self._carry_out(line, call, judge), error
        return (), (), error

    def _carry_out(
        self, line: Line, call: Call, judged: Iterable[Judged]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Returns the members that have an answer, and the answers."""
        answered: list[Any] = []
        answers: list[Any] = []
        failed: list[tuple[Sequence[Any], Exception, bool]] = []
        for members, verdict, error in judged:
            if isinstance(verdict, Answer):
                answered += members
                answers.append(self._value_of(verdict, members))
            elif self.ending:
                continue
            elif isinstance(verdict, Retry):
                if verdict.due >= self.deadline:
                    failed.append((members, verdict.failure or self._time_out(), True))
                    continue
                if self.listeners.retry_due:
                    self._tell_retry(line, call, members, error, verdict.due)
                self._delay(line, call, members, verdict.due)
            elif isinstance(verdict, Refresh):
                if line.splits is not None:
                    line.splits.tainted = True
                self._refresh(line, call, members, verdict.error)
            else:
                failed.append((members, verdict.error, verdict.may_pass))
        self._carry_out_failures(line, call, failed)  # last, as it may be the job's end
        return answered, answers

    def _carry_out_failures(
        self, line: Line, call: Call, failed: Iterable[tuple[Sequence[Any], Exception, bool]]
    ) -> None:
        for members, failure, may_pass in failed:
            splits = line.splits
            if splits is not None and not splits.refuses(failure):
                splits.tainted = True
            elif splits is not None and len(members) > 1:
                self._refuse(line, splits, cast("Batch", call), failure)
                continue
            self._fail(line, call, members, failure, may_pass=may_pass)

    def _tell_retry(
        self, line: Line, call: Call, members: Sequence[Member], error: Exception | None, due: float
    ) -> None:
        outcome, number = item_of(members[0]), call.attempts
        event = RetryDue(line.stage, outcome.item, outcome.index, len(members), number, error, self.now, due)
        self.listeners.tell(self.listeners.retry_due, event)

    def _value_of(self, verdict: Answer, members: Sequence[Any]) -> object:
        if verdict.given and self.recorder is not None:
            self.recorder.leave_out(members)
        return verdict.value

    def _delay(self, line: Line, call: Call, members: Sequence[Any], due: float) -> None:
        if isinstance(call, Batch):
            call.members = members
            if line.splits is not None and call.half_of is not None:
                line.splits.pieces.add(call)
        self.at_work -= len(members)
        due = min(line.pace.put_off(call, due), self.deadline)  # by which all have to be in line
        heappush(self.delayed, (due, next(self._tie), line, call))

    def _refresh(self, line: Line, call: Call, members: Sequence[Any], error: Exception) -> None:
        """Sends items back to stage one for a new token, unless they were there too often."""
        others = [member for member in members if not self._send_back(member)]
        if len(members) > 1 and line.splits is not None:
            line.due += [Batch(half) for half in halves(others)]  # some of them may be innocent
        elif others:
            self._fail(line, call, others, error)

    def _send_back(self, member: Member) -> bool:
        listed = member if isinstance(member, ListedToken) else None
        if listed is not None and listed.tokens.dropped:
            self.at_work -= 1
            return True
        outcome = cast("AnyOutcome", member) if listed is None else listed.outcome
        if self.refreshed[outcome.index] >= self.max_refreshes:
            return False
        self.refreshed[outcome.index] += 1
        if listed is not None:
            self._drop(listed.tokens)
        outcome.token = None
        outcome.attempts = 0
        outcome.retry_state = None
        self.returned.append(outcome)
        return True

    def _drop(self, tokens: TokenList) -> None:
        """Forgets an item's tokens, as it begins again; those that run or wait for a due time end unheard."""
        tokens.dropped = True
        line = self.result_line
        waiting, due = len(line.waiting), len(line.due)
        line.waiting = deque(one for one in line.waiting if cast("ListedToken", one).tokens is not tokens)
        line.due = deque(one for one in line.due if getattr(one, "tokens", None) is not tokens)
        self.at_work -= waiting - len(line.waiting) + due - len(line.due)
        self.handing.forget_surplus(tokens.outcome.index)

    def _kept(self, tokens: Sequence[ListedToken]) -> list[ListedToken]:
        kept = [token for token in tokens if not token.tokens.dropped]
        self.at_work -= len(tokens) - len(kept)
        return kept

    # --- batches that are refused

    def _refuse_waiting(self, line: Line, splits: Splits) -> None:
        if not splits.pieces:
            for refused, failure in splits.take_waiting():
                self._refuse(line, splits, refused, failure)

    def _refuse(self, line: Line, splits: Splits, batch: Batch, error: Exception) -> None:
        allowed = splits.allows(batch)
        if allowed is None:
            splits.waiting.append((batch, error))
        elif allowed:
            line.due.extendleft(reversed(splits.split(batch, error)))  # before what a pause has taken back
        else:
            self._fail(line, batch, batch.members, error)

    def _shrink(self, line: Line, size: int) -> None:
        """Has no call begin that is larger than `size`, not even one that was handed over."""
        assert line.batch_size is not None  # noqa: S101 - for the type checker
        if size >= line.batch_size:
            return
        line.batch_size = size
        handed = [*line.take_back(), *line.due]  # those that are due too, if a gate took them back
        line.due.clear()
        for call in reversed(handed):
            if call.attempts or cast("Batch", call).half_of is not None:
                line.due.appendleft(call)
                continue
            members: Sequence[Any] = cast("Batch", call).members
            if line is self.result_line:
                line.waiting.extendleft(reversed(members))
                continue
            returned = [member for member in members if member.index in self.refreshed]
            fresh = [member for member in members if member.index not in self.refreshed]
            self.returned.extendleft(reversed(returned))
            line.waiting.extendleft(reversed(fresh))
            self.at_work -= len(fresh)

    def _fail(
        self, line: Line, call: Call, members: Sequence[Any], error: Exception, *, may_pass: bool = False
    ) -> None:
        """Gives items their failure, which is the end of the job unless failures are wanted."""
        listed = self.many and line is self.result_line
        if listed:
            members = self._kept(members)
            if not members:
                return
        if error is not self.timed_out:  # that is everybody's
            self._tell_of(line, call, members, error, may_pass=may_pass)
        if not self.return_exceptions:
            if error is not self.timed_out:  # which keeps nothing back that is done
                indices = [member.outcome.index if listed else member.index for member in members]
                self.failed_index = min(self.failed_index, *indices)
            self._end(error)
            return
        if listed:
            for member in members:
                member.attempts = call.attempts
                self._put_in_list(member, error)
            return
        for outcome in members:
            outcome.exception = error
            if line is self.token_line:
                outcome.token_attempts = call.attempts
            else:
                outcome.attempts = call.attempts
            self._finish(outcome)

    def _tell_of(
        self, line: Line, call: Call, members: Sequence[Any], error: Exception, *, may_pass: bool
    ) -> None:
        plural = "" if call.attempts == 1 else "s"
        add_note(error, f"{line.name}, {told(call, members)}, {call.attempts} attempt{plural}")
        if self.recorder is not None:
            self.recorder.failed(line.stage, members, error, may_pass=may_pass)

    # --- decided once for all events of a wake-up

    def _start(self, now: float) -> None:
        self._come_due(now)
        if now >= self.deadline:
            self._give_up()
        elif self.tokens_first:
            self._start_results(now)
            self._start_batches(now)
        else:
            self._start_batches(now)
            self._start_results(now)
        if self.token_line.refused or self.result_line.refused:
            self._fail_refused()
            self._start(now)  # they have made room

    def _come_due(self, now: float) -> None:
        while self.delayed and self.delayed[0][0] <= now:
            _, _, line, call = heappop(self.delayed)
            if isinstance(call, ListedToken) and call.tokens.dropped:
                continue
            line.due.append(call)
            self.at_work += len(members_of(call))

    def _fail_refused(self) -> None:
        for line in self.lines:
            refused, line.refused = line.refused, []
            for call, error in refused:
                self._fail(line, call, members_of(call), error)
                if line.splits is not None:  # which learns nothing from it
                    line.splits.pieces.discard(cast("Batch", call))
                    line.splits.tainted = True
                    self._refuse_waiting(line, line.splits)

    def _start_batches(self, now: float) -> None:
        line = self.token_line
        if line.due:
            line.start_due(now)
        # Items of many tokens fill the window too: then no more are begun, though they have been read.
        window_room = self.reading.room
        bound = self.bound
        if self.handing.surplus_tokens and window_room < 0:
            # But one if nothing else goes on: a journal's tokens overtake items that they wait for, in order.
            bound = 0 if self.in_progress or self.delayed else 1
        if self.returned:
            self._start_returned(now, bound)
        least = cast("int", line.batch_size) if self._fills(window_room) else 1
        while len(line.waiting) >= least and self.in_progress < bound and (room := line.room(now)) > 0:
            batches: list[Call] = []
            while len(line.waiting) >= least and self.in_progress < bound and len(batches) < room:
                waited = len(line.waiting)
                batches.append(line.take())
                self.at_work += waited - len(line.waiting)
            line.start(batches, now)
            if self.finished == self.result_line.runner.out == 0:
                self.result_line.runner.expect(self.in_progress)

    def _fills(self, window_room: int) -> bool:
        """Whether items that wait are to wait for more of them, until they fill a batch."""
        if self.reading.ended or not (self.reading.asked or window_room >= self.reading.size):
            return False
        return not (self.linger < math.inf and self.token_line.waiting and self._leaves_at() <= self.now)

    def _leaves_at(self) -> float:
        """Returns when the first of the items that wait has lingered for others for long enough."""
        return self.token_line.waiting[0].began + self.linger

    def _start_returned(self, now: float, bound: int) -> None:
        """Starts items that have come back, with others that wait, and never waits to fill a batch."""
        line = self.token_line
        size = cast("int", line.batch_size)
        while self.returned and line.room(now) > 0:
            members: list[Any] = []
            while self.returned and len(members) < size:
                members.append(self.returned.popleft())
            while line.waiting and len(members) < size and self.in_progress < bound:
                members.append(line.waiting.popleft())
                self.at_work += 1
            line.start([Batch(members)], now, first=True)

    def _start_results(self, now: float) -> None:
        line = self.result_line
        if line.due:
            line.start_due(now)
        if line.waiting:
            line.start_waiting(now)

    def _ask(self) -> int:
        """Asks for more batches of the source: as much as one bound may be read and not started."""
        passed = self.in_progress >= 2 * self.bound  # as by what goes on from a journal
        if self.ending or passed:
            return 0
        return self.reading.ask(self.bound - len(self.token_line.waiting))

    def _read_on(self, reader: Runner) -> None:
        reader.start([Call()] * (self._ask() * self.reading.size))

    # --- what is told

    def _look(self, *, ended: bool) -> None:
        if ended:
            self.listeners.next_look = self.now
        goes_on = any(line.runner.out or line.pace.why(self.now) for line in self.lines)
        self.listeners.look(self.now, self.progress, goes_on=goes_on)

    def progress(self) -> Progress:
        """Returns how far the job is."""
        first, second = (min(line.runner.out, line.workers) for line in self.lines)
        line = self.result_line
        return Progress(
            seconds=self.now - (self.began or 0.0),
            done=self.finished,
            failed=self.failed,
            total=self.listeners.total,
            tokens_waiting=len(line.waiting) + len(line.due) + line.runner.out - second,
            token_calls=first,
            result_calls=second,
            delayed=len(self.delayed),
            why="" if self.ending else self._why(),
        )

    def _why(self) -> str:
        held = [why for line in self.lines if (why := line.pace.why(self.now))]
        if not held and self.in_progress >= self.bound and not self.at_work:
            held = ["the consumer is away"]
        return "; ".join(held)

    def _tell_end(self, error: BaseException | None) -> None:
        seconds = self.now - (self.began or 0.0)
        end = JobEnded(self.now, seconds, self.finished, self.failed, error)
        self.listeners.tell(self.listeners.job_ended, end)

    # --- ends

    def _time_out(self) -> RunTimeout:
        """Returns what all items get that are not done when the time is over."""
        if self.timed_out is None:
            self.timed_out = RunTimeout(f"the run's timeout of {self.timeout:g} s has passed")
        return self.timed_out

    def _give_up(self) -> None:
        """Lets nothing begin any more, as the time is over; what runs keeps its own end."""
        error = self._time_out()
        for line in self.lines:
            calls: list[Call] = [*line.take_back(), *line.due, Batch(list(line.waiting))]
            line.due.clear()
            line.waiting.clear()
            if line is self.token_line:
                self.at_work += len(cast("Batch", calls[-1]).members)
                calls.append(Batch(list(self.returned)))
                self.returned.clear()
            for call in calls:
                if members := members_of(call):
                    self._fail(line, call, members, error)
            for batch, refusal in line.splits.take_waiting() if line.splits is not None else ():
                self._fail(line, batch, batch.members, refusal)
        if self.reader is not None and self.handing.results is None:  # a list has all items
            self.reader.stop()
            self.source_left(None, None, None)

    def _end(self, error: BaseException | None) -> None:
        """Ends the job: nothing more starts, what waits is dropped; what runs is still heard of."""
        if self.ending:
            return
        self.ending = True
        self.error = error
        if self.reader is not None:
            self.reader.stop()
        for line in self.lines:
            line.runner.stop()
            line.waiting.clear()
            line.due.clear()
            if line.splits is not None:
                line.splits.waiting.clear()
        self.returned.clear()
        self.delayed.clear()

    def _commit(self, recorder: Recorder) -> None:
        """Has recorded what is handed over next."""
        try:
            recorder.commit()
        except Exception as broken:  # noqa: BLE001 - whatever it is, it can't be handed over
            if self.ending and self.error is not broken:
                log.warning("what the job's last calls gave is not recorded: %s", broken)
            self._end(without_our_frames(broken))
            self.handing.discard(recorder.take_finished())
        else:
            self.handing.recorded(filter(recorder.is_whole, recorder.take_finished()))

    def _message(self) -> Message | None:
        if self.recorder is not None:
            self._commit(self.recorder)
        if not self.ending and self.reading.ended and self.finished == self.reading.number:
            self._end(self.timed_out if self.reading.left else None)
        ended = self.ending and self.token_line.runner.out == 0 and self.result_line.runner.out == 0
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
            if self.recorder is not None:
                self.recorder.close()
            # An exception's traceback leads back here, by the frames of its worker.
            self.error = self.timed_out = self.too_many = None
        return message
