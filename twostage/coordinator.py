"""The state machine of a job: all its state, in one object that never waits."""

from __future__ import annotations

import math
from collections import Counter, deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from twostage.answers import token_list
from twostage.calls import Batch, ListedToken, Outcome, TokenList
from twostage.errors import add_note, brief, without_our_frames
from twostage.retry import Answer, Refresh, Retry
from twostage.splits import halves

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from twostage.calls import Call, Member
    from twostage.completions import Event
    from twostage.handover import AnyOutcome, HandOver
    from twostage.lines import Judged, Line
    from twostage.splits import Splits
    from twostage.twins import Twins

__all__ = ["LEAST_IN_PROGRESS", "Coordinator", "Message"]

Answered: TypeAlias = "tuple[Sequence[Any], Sequence[Any]]"
"""Members of a call that have an answer, and the answers."""

LEAST_IN_PROGRESS = 256
"""The floor of the in-progress bound: with less, calls of no latency starve the pools of threads."""


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
        batch_size: How many items are read at once.
        bound: How many items may be in progress before nothing new is begun.
        window: How many items may be read and not handed over.
        handing: Where outcomes go.
        return_exceptions: Whether a failed item is an outcome like any other, or the end of the job.
        tokens_first: Whether ready tokens start before ready batches: right if both stages share one
            executor. Else stage one goes first, as it feeds the other.
        many: Whether stage one gives a list of tokens for each item.
        twins: Knows which items are equal, if that is to be looked at.
        max_refreshes: How often an item may go back to stage one for a new token.
    """

    def __init__(  # noqa: PLR0913 - it is one job's settings
        self,
        token_line: Line,
        result_line: Line,
        *,
        batch_size: int,
        bound: int,
        window: int,
        handing: HandOver,
        return_exceptions: bool,
        tokens_first: bool = False,
        many: bool = False,
        twins: Twins | None = None,
        max_refreshes: int = 1,
    ) -> None:
        self.token_line = token_line
        self.result_line = result_line
        self.batch_size = batch_size
        self.bound = bound
        self.window = window
        self.handing = handing
        self.return_exceptions = return_exceptions
        self.tokens_first = tokens_first
        self.many = many
        self.twins = twins
        self.max_refreshes = max_refreshes

        self.returned: deque[AnyOutcome] = deque()  # items that want a new token
        self.refreshed: Counter[int] = Counter()  # how often each has, by its index
        self.delayed: list[tuple[float, int, Line, Call]] = []  # a heap by due time
        self._tie = count()  # equal due times must not compare calls

        self.read = 0  # items
        self.asked = 0  # batches wanted and not read yet
        self.finished = 0  # items with an outcome
        self.at_work = 0  # items at stage one, tokens at stage two; not those that wait for a due time
        self.source_ended = False
        self.ending = False
        self.error: BaseException | None = None
        self.failed_index: float = math.inf  # of the item whose failure ended the job

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

    def batch_read(self, items: list[Any], keys: list[Hashable] | None, _error: BaseException | None) -> None:
        """Takes a batch that was wanted; fewer items than `batch_size` only at the source's end."""
        first = self.read
        self.read += len(items)
        self.asked -= 1
        if self.handing.results is not None:
            self.handing.results.extend([None] * len(items))
        if self.ending:
            return
        outcomes: list[AnyOutcome] = [Outcome(index, item) for index, item in enumerate(items, first)]
        if self.twins is not None and keys is not None:
            outcomes, known = self.twins.sort(outcomes, keys)
            self._finish_twins(known)
        self.token_line.waiting.extend(outcomes)

    def source_end(self, _: object, _answer: object, error: BaseException | None) -> None:
        """Hears that the source has no more items, or that it raised."""
        self.source_ended = True
        if error is not None:
            self._end(error)

    def outcomes_taken(self, number: int, _: object, _error: BaseException | None) -> None:
        """Hears that the consumer was handed so many outcomes more."""
        self.handing.took(number)

    def close(self, _: object, _answer: object, _error: BaseException | None) -> None:
        """Ends the job before its time, as somebody wants no more of it."""
        self._end(None)

    # --- ends of attempts

    def batch_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """Fans a batch's tokens out to stage two, those of them that have come."""
        outcomes, tokens = self._batch_ended(self.token_line, batch, answer, error)
        if self.ending:
            return
        attempts = batch.attempts
        for outcome, token in zip(outcomes, tokens, strict=True):
            outcome.token = token
            outcome.token_attempts = attempts
        self.result_line.waiting.extend(self._listed(batch, outcomes) if self.many else outcomes)

    def _listed(self, batch: Batch, outcomes: Iterable[AnyOutcome]) -> list[ListedToken]:
        """Returns the tokens of items that have many; what is no list of them is its item's failure."""
        calls: list[ListedToken] = []
        for outcome in outcomes:
            try:
                tokens = outcome.token = token_list(outcome.token)
            except Exception as error:  # noqa: BLE001 - a collection of the user's may raise anything
                outcome.token = None
                self._fail(self.token_line, batch, [outcome], error.with_traceback(None))
                continue
            if not tokens:
                outcome.result = []
                self._finish(outcome)
                continue
            self.at_work += len(tokens) - 1
            self.handing.add_surplus(outcome.index, len(tokens) - 1)
            listed = TokenList(outcome, len(tokens))
            calls += [ListedToken(listed, place, token) for place, token in enumerate(tokens)]
        return [] if self.ending else calls

    def result_ended(self, call: Member, answer: object, error: BaseException | None) -> None:
        """Finishes an item with its result, if that has come."""
        _, results = self._ended(self.result_line, call, (call,), answer, error)
        if results:
            self._take_result(call, results[0])

    def results_ended(self, batch: Batch, answer: object, error: BaseException | None) -> None:
        """The same for a batch of tokens."""
        members, results = self._batch_ended(self.result_line, batch, answer, error)
        for member, result in zip(members, results, strict=True):
            member.attempts = batch.attempts
            self._take_result(member, result)

    def _take_result(self, member: Member, result: object) -> None:
        if isinstance(member, ListedToken):
            self._put_in_list(member, result)
        else:
            member.result = result
            self._finish(member)

    def _put_in_list(self, token: ListedToken, result: object) -> None:
        listed, outcome = token.tokens, token.outcome
        if listed.dropped:
            self.at_work -= 1
            return
        outcome.attempts += token.attempts
        listed.results[token.place] = result
        listed.missing -= 1
        if listed.missing:
            self.at_work -= 1
            return
        outcome.result = listed.results
        self._finish(outcome)

    def _finish(self, outcome: AnyOutcome) -> None:
        self.finished += 1
        self.at_work -= 1
        self.handing.add(outcome)
        if self.twins is not None:
            self._finish_twins(self.twins.done(outcome))
        if self.refreshed:
            self.refreshed.pop(outcome.index, None)

    def _finish_twins(self, twins: Iterable[AnyOutcome]) -> None:
        for twin in twins:
            self.finished += 1
            self.handing.add(twin)

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
        if not splits.pieces:
            for refused, failure in splits.take_waiting():
                self._refuse(line, splits, refused, failure)
        return answered

    def _ended(
        self, line: Line, call: Call, members: Sequence[Any], answer: object, error: BaseException | None
    ) -> Answered:
        """Asks what becomes of a call whose attempt has ended, and carries all out that is no answer.

        Returns:
            The members that have an answer, and the answers.
        """
        call.attempts += 1
        for gate in line.gates:
            gate.ended(call, self.now)
        if error is None:
            try:
                values = line.check(answer, call)
            except Exception as refused:  # noqa: BLE001 - an answer's `__len__` may raise anything
                error = refused.with_traceback(None)
            else:
                if not (line.looks_at_values and line.has_to_judge(values)):
                    return members, values
                if self.ending:
                    return (), ()
                return self._carry_out(line, call, line.judge_values(call, members, values, self.now))
        if not isinstance(error, Exception):
            self._end(error)
        elif not self.ending:
            return self._carry_out(line, call, line.judge_failure(call, members, error, self.now))
        return (), ()

    def _carry_out(self, line: Line, call: Call, judged: Iterable[Judged]) -> Answered:
        answered: list[Any] = []
        answers: list[Any] = []
        failed: list[tuple[Sequence[Any], Exception]] = []
        for members, verdict, error in judged:
            if isinstance(verdict, Answer):
                answered += members
                answers.append(verdict.value)
            elif isinstance(verdict, Retry):
                line.log_retry(call, error, max(verdict.due - self.now, 0))
                self._delay(line, call, members, verdict.due)
            elif isinstance(verdict, Refresh):
                if line.splits is not None:
                    line.splits.tainted = True
                self._refresh(line, call, members, verdict.error)
            else:
                failed.append((members, verdict.error))
        for members, failure in failed:  # last, as it may be the job's end
            splits = line.splits
            if splits is not None and not splits.refuses(failure):
                splits.tainted = True
            elif splits is not None and len(members) > 1:
                self._refuse(line, splits, cast("Batch", call), failure)
                continue
            self._fail(line, call, members, failure)
        return answered, answers

    def _delay(self, line: Line, call: Call, members: Sequence[Any], due: float) -> None:
        if isinstance(call, Batch):
            call.members = members
            if line.splits is not None and call.half_of is not None:
                line.splits.pieces.add(call)
        self.at_work -= len(members)
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

    # --- batches that are refused

    def _refuse(self, line: Line, splits: Splits, batch: Batch, error: Exception) -> None:
        allowed = splits.allows(batch)
        if allowed is None:
            splits.waiting.append((batch, error))
        elif allowed:
            line.due += splits.split(batch, error)
        else:
            self._fail(line, batch, batch.members, error)

    def _shrink(self, line: Line, size: int) -> None:
        """Has no call begin that is larger than `size`, not even one that was handed over."""
        assert line.batch_size is not None  # noqa: S101 - for the type checker
        if size >= line.batch_size:
            return
        line.batch_size = size
        for call in reversed(line.runner.take_back()):
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

    def _fail(self, line: Line, call: Call, members: Sequence[Any], error: Exception) -> None:
        """Gives items their failure, which is the end of the job unless failures are wanted."""
        listed = self.many and line is self.result_line
        if listed:
            kept = [member for member in members if not member.tokens.dropped]
            self.at_work -= len(members) - len(kept)
            members = kept
            if not members:
                return
        outcomes: Sequence[AnyOutcome] = [member.outcome for member in members] if listed else members
        items = (
            brief(outcomes[0].item)
            if len(outcomes) == 1
            else f"{len(outcomes)} items from {brief(outcomes[0].item)}"
        )
        plural = "" if call.attempts == 1 else "s"
        add_note(error, f"{line.name}, {items}, {call.attempts} attempt{plural}")
        if not self.return_exceptions:
            self.failed_index = min(self.failed_index, *(outcome.index for outcome in outcomes))
            self._end(error)
            return
        if line is self.result_line:
            for member in members:
                member.attempts = call.attempts
        if listed:
            for member in members:
                self._put_in_list(member, error)
            return
        for outcome in outcomes:
            outcome.exception = error
            if line is self.token_line:
                outcome.token_attempts = call.attempts
            self._finish(outcome)

    # --- decided once for all events of a wake-up

    def _start(self, now: float) -> None:
        while self.delayed and self.delayed[0][0] <= now:
            _, _, line, call = heappop(self.delayed)
            if isinstance(call, ListedToken) and call.tokens.dropped:
                continue
            line.due.append(call)
            self.at_work += len(call.members) if isinstance(call, Batch) else 1
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
        # Items of many tokens fill the window too: then no more are begun, though they have been read.
        window_room = self._window_room()
        bound = 0 if self.handing.surplus_tokens and window_room < 0 else self.bound
        if self.returned:
            self._start_returned(now, bound)
        more_comes = not self.source_ended and (self.asked or window_room >= self.batch_size)
        least = cast("int", line.batch_size) if more_comes else 1
        while len(line.waiting) >= least and self.in_progress < bound and (room := line.room(now)) > 0:
            batches: list[Call] = []
            while len(line.waiting) >= least and self.in_progress < bound and len(batches) < room:
                waited = len(line.waiting)
                batches.append(line.take())
                self.at_work += waited - len(line.waiting)
            line.start(batches, now)
            if self.finished == self.result_line.runner.out == 0:
                self.result_line.runner.expect(self.in_progress)

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

    def _window_room(self) -> int:
        """How many items may be read beyond those asked for; one with many tokens counts as many."""
        asked = self.asked * self.batch_size
        return self.window - (self.read + asked - self.handing.taken + self.handing.surplus_tokens)

    def _wanted(self) -> int:
        """Decides how many more batches to ask for: whole ones, up to one bound read and not started."""
        if self.source_ended or self.ending:
            return 0
        size = self.batch_size
        stock = (self.bound - len(self.token_line.waiting)) // size - self.asked
        return max(0, min(stock, self._window_room() // size))

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
            if line.splits is not None:
                line.splits.waiting.clear()
        self.returned.clear()
        self.delayed.clear()

    def _message(self) -> Message | None:
        if not self.ending and self.source_ended and self.finished == self.read:
            self._end(None)
        ended = self.ending and self.token_line.runner.out == 0 and self.result_line.runner.out == 0
        if ended:
            self.handing.release_held(self.failed_index)  # those between will never come, if there are any
        wanted = self._wanted()
        if not (self.handing.ready or wanted or ended):
            return None
        self.asked += wanted
        message = Message(self.handing.take_ready(), wanted, ended, self.error)
        if ended:
            # An exception's traceback leads back here, by the frames of its worker.
            self.handing.results = self.error = None
        return message
