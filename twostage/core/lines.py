"""A stage's line: what waits for a worker, and what decides on the starts of calls."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from twostage.base.gate import Refused
from twostage.base.records import Batch
from twostage.base.words import STAGES
from twostage.failing.retry import Answer, End, Fail, Late, Retry, Verdict
from twostage.failing.throttling import Throttled
from twostage.failing.transient import is_throttled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from twostage.base.gate import Gate
    from twostage.base.records import Call, Member
    from twostage.base.runner import Runner
    from twostage.failing.retry import Judge
    from twostage.pace.pace import Pace

__all__ = ["Judged", "Line"]


class Judged(NamedTuple):
    """The verdict on some of a call's members.

    Attributes:
        members: Those.
        verdict: It.
        error: The failure that it is about, if there was one.
        attempt: The number of the attempt that it is about.
    """

    members: Sequence[Any]
    verdict: Verdict
    error: Exception | None
    attempt: int


class Refusals(Protocol):
    """Knows what to do about batches that are refused."""

    tainted: bool

    def attach(self, job: Any, line: Line) -> None:  # noqa: ANN401 - the coordinator, which is above
        """Is of that line, in that job."""

    def takes(self, batch: Call, members: Sequence[Any], error: Exception) -> bool:
        """Whether it takes care of members of a batch that have failed; if not, that is final."""

    def ended(self, batch: Batch, *, accepted: bool) -> None:
        """Hears what became of a batch, when all that is carried out."""

    def refused_by_gate(self, batch: Batch) -> None:
        """Hears that a batch will never begin."""

    def take_waiting(self) -> list[tuple[Batch, Exception]]:
        """Returns batches that it keeps, and does so no longer."""


class Line:
    """One stage as the coordinator sees it: what waits there, and what decides on it.

    Args:
        stage: Which it is, 1 or 2.
        workers: How many of its attempts may run at once.
        limit: How many attempts may be handed to the runner; infinite if it keeps a limit of its own
            and gives back what has not begun, so that its workers need never wait for the coordinator.
        check: Takes an answer and its call; returns a value for each of the call's members.
        judge: Decides what becomes of failed attempts.
        pace: What the API bears; a gate while that is less than the stage could.
        slots: Whether an exception among a call's values is a failure, that of its member alone.
        batch_size: How many of those that wait a call takes at most; `None` if each is a call by itself.
        refusals: What else there is for calls that fail; `None` for nothing.
        gates: What else may hold starts back. What was handed over can't be held, so with gates
            `limit` is the number that may run.
        timed: Whether the runner gives up attempts that take too long.
        observed: Whether calls are to have the time at which they were given to the runner.

    Attributes:
        name: How messages call the stage.
        refused: Calls that a gate will never let start, each with its failure.
    """

    runner: Runner

    def __init__(  # noqa: PLR0913 - they are what a stage is
        self,
        stage: int,
        workers: int,
        limit: float,
        check: Callable[[Any, Any], Sequence[Any]],
        judge: Judge,
        pace: Pace,
        *,
        slots: bool = False,
        batch_size: int | None = None,
        refusals: Refusals | None = None,
        gates: Sequence[Gate] = (),
        timed: bool = False,
        observed: bool = False,
    ) -> None:
        self.stage = stage
        self.name = STAGES[stage]
        self.workers = workers
        self.limit = limit
        self.check = check
        self.judge = judge
        self.pace = pace
        self.slots = slots
        self.batch_size = batch_size
        self.refusals = refusals
        self.gates: list[Gate] = [*gates, pace] if pace.slows else list(gates)
        self.timed = timed
        self.observed = observed
        self.waiting: deque[Member] = deque()
        self.back: deque[Member] = deque()  # what has been here before, and leaves before the others
        self.due: deque[Call] = deque()
        self.refused: list[tuple[Call, Exception]] = []
        self.looks_at_values = slots or judge.judges_results  # a success else costs nothing

    def succeeded_whole(self, values: Sequence[Any], now: float) -> bool:
        """Hears of a call's values; returns whether all are answers, so that nothing is to be judged."""
        judged = self.looks_at_values and self.has_to_judge(values)
        if not (judged and self.is_throttled(values)):
            self.pace.succeeded_at = now
            if self.pace.watches:
                self.succeeded(now)
        return not judged

    def has_to_judge(self, values: Sequence[Any]) -> bool:
        """Whether a call's values may be other than answers."""
        return self.judge.judges_results or (self.slots and _holds_exceptions(values))

    def is_throttled(self, values: Sequence[Any]) -> bool:
        """Whether all of a call's values say to slow down, which is then no success."""
        return self.slots and all(isinstance(value, Exception) and is_throttled(value) for value in values)

    def judge_values(
        self, call: Call, members: Sequence[Any], values: Sequence[Any], now: float, deadline: float
    ) -> list[Judged]:
        """Gives each of a call's values its verdict.

        Those to be tried again are together, as one call, unless that would be too late.
        """
        judged: list[Judged] = []
        again: list[tuple[Any, Exception | None, Exception | None]] = []
        retry: Retry | None = None
        running: int | None = self.runner.out
        attempt = call.attempts
        for member, value in zip(members, values, strict=True):
            error = value if self.slots and isinstance(value, BaseException) else None
            excused = False
            if error is not None:
                if not isinstance(error, Exception):
                    raise error  # which ends the job, as it does if the function raises it
                if is_throttled(error):
                    excused = self.pace.throttled(error, now, running)
                    running = None
            verdict = self.judge.judge(call, self._end(call, value, error, now, excused=excused), retry)
            if isinstance(verdict, Retry):
                retry = verdict
                again.append((member, error, verdict.failure))
            elif isinstance(verdict, Answer) and (verdict.value is not value or error is not None):
                judged += self._take_given(call, [member], [verdict.value] if self.slots else verdict.value)
            else:
                judged.append(Judged([member], verdict, error, attempt))
        if retry is not None and retry.due < deadline:
            judged.append(Judged([member for member, *_ in again], retry, again[0][1], attempt))
        elif retry is not None:  # too late for all, since they would go when the last of them is due
            judged += [Judged([member], Late(failure), error, attempt) for member, error, failure in again]
        self._mind_pace()
        return judged

    def judge_failure(
        self, call: Call, members: Sequence[Any], error: Exception, now: float, deadline: float
    ) -> list[Judged]:
        """Gives a call that has failed as a whole its verdict."""
        excused = self.pace.failed(call, error, now, self.runner.out)
        self._mind_pace()
        verdict = self.judge.judge(call, self._end(call, None, error, now, excused=excused))
        if isinstance(verdict, Answer):
            return self._take_given(call, members, verdict.value)
        attempt = call.attempts
        if isinstance(verdict, Retry):
            if isinstance(error, Throttled):
                call.attempts -= 1  # the user's function has asked for a wait, and made no attempt
            if verdict.due >= deadline:
                verdict = Late(verdict.failure)
        return [Judged(members, verdict, error, attempt)]

    def _end(self, call: Call, answer: object, error: Exception | None, now: float, *, excused: bool) -> End:
        return End(
            answer,
            error,
            now,
            excused,
            self.pace.held_back.seconds,
            self.pace.held_back.seconds_by(call.began),
        )

    def _take_given(self, call: Call, members: Sequence[Any], answer: object) -> list[Judged]:
        """Takes what a policy's `retry_error_callback` has given, its last word, in an answer's place."""
        try:
            values = self.check(answer, Batch(members) if self.slots else call)
        except Exception as refused:  # noqa: BLE001 - an answer's `__len__` may raise anything
            return [Judged(members, Fail(refused.with_traceback(None)), None, call.attempts)]
        judged = []
        for member, value in zip(members, values, strict=True):
            failed = self.slots and isinstance(value, Exception)
            verdict = Fail(value) if failed else Answer(value, given=True)
            judged.append(Judged([member], verdict, None, call.attempts))
        return judged

    # --- gates

    def succeeded(self, now: float) -> None:
        """Hears of a success, which may be what the pace has waited for."""
        self.pace.succeeded(now)
        self._mind_pace()

    def _mind_pace(self) -> None:
        """Has the pace among the gates while it slows the stage down, and takes back what it holds back."""
        if self.pace.slows == (self.pace in self.gates):
            return
        if self.pace.slows:
            self.gates.append(self.pace)
            self.due.extendleft(reversed(self.take_back()))
        else:
            self.gates.remove(self.pace)

    def take_back(self) -> list[Call]:
        """Takes back from the runner what has not begun, in its order."""
        back = self.runner.take_back()
        for gate in self.gates:
            for call in back:
                gate.taken_back(call)
        return back

    def ended(self, call: Call, answer: object, error: BaseException | None, now: float) -> None:
        """Tells the gates of an attempt's end."""
        for gate in self.gates:
            gate.ended(call, answer, error, now)

    def check_patience(self, now: float) -> None:
        """Has the gates say, by raising, if what waits has waited for too long."""
        for gate in self.gates:
            gate.check_patience(now, self.runner)

    def opens(self, now: float) -> float:
        """Returns when the next call may start as far as the gates are concerned."""
        call = self.due[0] if self.due else None
        return max((gate.when_may_start(now, self.runner, call) for gate in self.gates), default=now)

    def room(self, now: float) -> float:
        """Returns how many calls the runner may be given now; with gates one, as they are asked of each."""
        room = self.limit - self.runner.out
        if self.gates and room > 0:
            return 0 if self.due or self.opens(now) > now else 1
        return room

    def start(self, calls: Sequence[Call], now: float, *, first: bool = False) -> None:
        """Hands calls to the runner, with gates as soon as they let them pass."""
        if self.gates:
            self.due.extend(calls)
            self.start_due(now)
            return
        if self.observed:
            _stamp(calls, now)
        self.runner.start(calls, first=first)  # last, when the books are right: it can raise

    def start_due(self, now: float) -> None:
        """Starts calls whose time has come, before all others of the stage."""
        while self.due and self.limit > self.runner.out:
            try:
                if self.opens(now) > now:
                    return
            except Refused as refused:
                self.refused.append((self.due.popleft(), cast("Exception", refused.__cause__)))
                continue
            call = self.due.popleft()
            for gate in self.gates:
                gate.started(call, now)
            if self.observed:
                _stamp([call], now)
            self.runner.start([call], first=True)

    @property
    def is_held_back(self) -> bool:
        """Whether calls, or items for them, wait for nothing but the gates."""
        waits = self.due or self.waiting or self.back
        return bool(self.gates and waits) and self.runner.out < self.limit

    def forget_dropped(self) -> int:
        """Forgets calls that nobody waits for any more; returns how many did wait here."""
        before = len(self.waiting) + len(self.due)
        self.waiting = deque(one for one in self.waiting if not one.dropped)
        self.due = deque(one for one in self.due if not one.dropped)
        return before - len(self.waiting) - len(self.due)

    def drop(self) -> list[tuple[Call, Exception | None]]:
        """Drops all that waits here; returns it, and the failure that it had."""
        waiting = Batch(list(self.waiting)), Batch(list(self.back))
        dropped: list[tuple[Call, Exception | None]] = [(call, None) for call in (*self.due, *waiting)]
        if self.refusals is not None:
            dropped += self.refusals.take_waiting()
        self.due.clear()
        self.waiting.clear()
        self.back.clear()
        return dropped

    def take_returned(self, fresh: int) -> tuple[Batch, int]:
        """Makes a batch of what has come back, and of others that wait; returns it, and of how many."""
        size = cast("int", self.batch_size)
        members = [self.back.popleft() for _ in range(min(size, len(self.back)))]
        fresh = max(0, min(fresh, size - len(members), len(self.waiting)))
        return Batch([*members, *(self.waiting.popleft() for _ in range(fresh))]), fresh

    def take(self) -> Call:
        """Makes the next call of what waits."""
        if self.batch_size is None:
            return self.waiting.popleft()
        return Batch([self.waiting.popleft() for _ in range(min(self.batch_size, len(self.waiting)))])

    def start_waiting(self, now: float) -> None:
        """Starts what waits, as many calls as there is room for."""
        while self.waiting and (room := self.room(now)) > 0:
            calls: Sequence[Call]
            if self.batch_size is None and room >= len(self.waiting):
                calls, self.waiting = list(self.waiting), deque()
            else:
                calls = []
                while self.waiting and len(calls) < room:
                    calls.append(self.take())
            self.start(calls, now)


def _stamp(calls: Iterable[Call], now: float) -> None:
    for call in calls:
        call.handed_over = now
        call.ended = 0.0


def _holds_exceptions(values: Sequence[object]) -> bool:
    """Whether there are exceptions among a batch's values; costs a look at each one's type."""
    return any(issubclass(kind, BaseException) for kind in set(map(type, values)))
