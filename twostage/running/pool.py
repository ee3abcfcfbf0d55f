"""A pool of threads of our own, whose tasks go on from call to call."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from twostage.base.runner import Runner
from twostage.base.words import without_our_frames
from twostage.running.attempts import given_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from twostage.base.as_completed import AsCompleted
    from twostage.base.records import Call
    from twostage.base.runner import Clock, Work

__all__ = ["PoolRunner"]

# How long a task of our pool waits for a next call, and how long it goes on with calls. The second is
# how long calls can still begin after the interpreter has begun to end, for only then a task is
# submitted anew, and that is refused.
LINGER = 0.05
TASK_TIME = 0.45


class PoolRunner(Runner):
    """A pool of threads whose tasks go on: after a success with the next call that was handed over.

    A future an attempt costs 33 µs; a task that goes on 5. It ends after a failure, so that little
    begins before the coordinator has heard of a 429. The hand-over queue gives back what has not
    begun. Each end of a task is an event as well, for whether calls wait must be looked at then: one
    may have been put just when the last task had stopped looking.
    """

    def __init__(self, work: Work, completions: AsCompleted, clock: Clock) -> None:
        self.out = 0
        self._work = work
        self._completions = completions
        self._clock = clock
        self._pool = ThreadPoolExecutor(work.workers, "twostage")
        self._tasks = 0
        # Attempts that run, if they can be given up: who takes one out first, its end or that, has it.
        self._running: dict[object, Call] | None = None if work.attempt_timeout is None else {}
        self._stopped = False
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._first: deque[Call] = deque()

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        self.out += len(calls)
        if first:
            self._first.extend(calls)
            tickets: Sequence[Call | None] = [None] * len(calls)
        else:
            tickets = calls
        put = self._queue.put
        for ticket in tickets:
            put(ticket)
        self._grow(self.out)

    def expect(self, calls: int) -> None:
        # A thread takes 0.2 ms to start: a thousand of them would keep the first calls waiting.
        self._grow(calls)

    def _grow(self, calls: int) -> None:
        while self._tasks < min(self._work.workers, calls):
            try:
                task = self._pool.submit(self._go_on)
            except RuntimeError as error:
                if "shutdown" in str(error):
                    error.add_note(
                        "the interpreter, or the thread that was its main one, has ended while the job ran"
                    )
                raise
            self._tasks += 1
            self._completions.add(task, (self._task_ended, task, None, None))

    def _task_ended(self, task: Future[bool], _answer: object, _error: BaseException | None) -> None:
        if task.cancelled() or task.result():
            self._tasks -= 1
        else:
            self.given_up -= 1
        if not self._stopped:
            self._grow(self.out)

    def _attempt_ended(self, call: Call, answer: object, error: BaseException | None) -> None:
        self.out -= 1
        self._work.ended(call, answer, error)

    def _go_on(self) -> bool:  # noqa: C901 - it runs for every attempt, and a function more would cost
        """Makes attempts, one after the other; runs in a thread of the pool.

        Returns:
            Whether it is still one of its workers; not if its last attempt was given up.
        """
        _, fetch, argument, *_ = self._work
        context = self._work.variables.copy
        clock, put, attempt_ended, running = (
            self._clock,
            self._completions.put,
            self._attempt_ended,
            self._running,
        )
        observed = self._work.observed
        now = clock()
        end = now + TASK_TIME
        while now < end:
            try:
                call = self._first.popleft() if self._first else self._queue.get(timeout=LINGER)
            except IndexError:
                continue  # another worker took it
            except Empty:
                return True
            if call is None:
                if self._stopped:
                    return True
                continue  # the ticket of a call in `_first`, which somebody may have taken already
            call.began = clock()
            asked = argument(call)  # once it can be given up, the call is another attempt's as well
            attempt = None
            if running is not None:
                attempt = object()
                running[attempt] = call
            try:
                answer = context().run(fetch, asked)
            except BaseException as error:  # noqa: BLE001 - all that ends an attempt is for the coordinator
                now = clock()
                counts = running is None or running.pop(attempt, None) is not None
                if counts:
                    if observed:
                        call.ended = now
                    put((attempt_ended, call, None, without_our_frames(error)))
                del call, asked  # the error's traceback holds this frame, and the call may hold the error
                return counts
            if running is not None and running.pop(attempt, None) is None:
                return False
            now = clock()
            if observed:
                call.ended = now
            put((attempt_ended, call, answer, None))
            del call, asked, answer  # nothing of an attempt is kept while the next is waited for
        return True

    def give_up(self, now: float) -> None:
        running = self._running
        if running is None:
            return
        hung = [call for attempt, call in self._overdue(now) if running.pop(attempt, None) is not None]
        if not hung:
            return
        self._tasks -= len(hung)
        self.given_up += len(hung)
        self.out -= len(hung)  # before the warnings: who hears them may raise
        # They keep their threads, which a pool may take for idle ones, and so start none for a task.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = ThreadPoolExecutor(self._work.workers, "twostage")
        for call in hung:
            self._work.ended(call, None, given_up(self._work, call))
        if not self._stopped:
            self._grow(self.out)

    def next_overdue(self, now: float) -> float:
        if not self.out:
            return math.inf
        running = (self._running or {}).copy().values()
        return min([now, *(call.began for call in running)]) + (self._work.attempt_timeout or math.inf)

    def _overdue(self, now: float) -> list[tuple[object, Call]]:
        timeout = self._work.attempt_timeout or math.inf
        return [one for one in (self._running or {}).copy().items() if one[1].began + timeout <= now]

    def take_back(self) -> list[Call]:
        back: list[Call] = []
        try:
            while True:
                back.append(self._first.popleft())
        except IndexError:
            pass
        try:
            while True:
                call = self._queue.get_nowait()
                if call is not None:
                    back.append(call)
        except Empty:
            pass
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self._stopped = True
        self.take_back()
        for _ in range(self._tasks + 1):  # one may have been queued by a submit that raised
            self._queue.put(None)

    def join(self) -> None:
        self._pool.shutdown(cancel_futures=True)
