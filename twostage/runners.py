"""Where attempts run: on an executor of the user's, or on a pool of threads of our own."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from twostage.calls import told
from twostage.errors import AttemptTimeout, without_our_frames

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from twostage.calls import Call
    from twostage.completions import Completions, Handler
    from twostage.outcomes import Source

__all__ = ["ExecutorRunner", "PoolRunner", "Runner", "SourceRunner", "Work", "given_up"]

log = logging.getLogger("twostage")

Clock: TypeAlias = Callable[[], float]

# How long a task of our pool waits for a next call, and how long it goes on with calls. The second is
# how long calls can still begin after the interpreter has begun to end, for only then a task is
# submitted anew, and that is refused.
LINGER = 0.05
TASK_TIME = 0.45

LONGEST_READ = 0.1
"""How long the end of a job waits for a thread that reads its source: that may block for ever."""


class Work(NamedTuple):
    """What a runner is for.

    Attributes:
        stage: What its stage is called.
        fetch: The user's function.
        argument: Takes a call; returns what `fetch` is given, anew for each attempt.
        ended: Hears of the end of each attempt, in the coordinator's thread.
        workers: How many attempts may run at once.
        executor: Where they run; `None` for a pool of our own.
        attempt_timeout: Seconds after which an attempt is given up; `None` for never.
        rated: Whether it matters when exactly an attempt begins.
    """

    stage: str
    fetch: Callable[[Any], Any]
    argument: Callable[[Any], Any]
    ended: Handler
    workers: int
    executor: Executor | None
    attempt_timeout: float | None = None
    rated: bool = False


class Runner:
    """Runs attempts and reports the end of each as one event. Used by the coordinator's thread alone.

    Attributes:
        out: How many attempts were handed over and have neither ended nor been taken back.
        given_up: How many attempts were given up and run on.
    """

    out: int = 0
    given_up: int = 0

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        """Hands `calls` over, to begin in their order; `first`: before those that wait already.

        Raises:
            BaseException: A `submit` did. Each call was then handed over or not, as `out` says.
        """
        raise NotImplementedError

    def expect(self, calls: int) -> None:
        """Hears, before its first call, how many are on their way."""

    def take_back(self) -> list[Call]:
        """Takes back what has not begun and returns it, in its order."""
        raise NotImplementedError

    def give_up(self, now: float) -> None:
        """Gives up attempts that have taken too long; each ends with an `AttemptTimeout`."""

    def next_overdue(self, now: float) -> float:
        """Returns when, at the earliest, there may be one."""
        del now
        return math.inf

    def stop(self) -> None:
        """Lets nothing more begin. What runs still reports its end."""
        raise NotImplementedError

    def join(self) -> None:
        """Waits, once `out` is 0, until the threads of our own are gone, but for those given up."""


def given_up(work: Work, call: Call) -> AttemptTimeout:
    """Returns the failure of an attempt that has taken too long, and says so."""
    log.warning(
        "%s, %s: the attempt takes longer than %g s and is given up",
        *(work.stage, told(call), work.attempt_timeout),
    )
    return AttemptTimeout(f"the attempt took longer than attempt_timeout={work.attempt_timeout:g} s")


class _Noting:
    """A call's function that notes when it begins. For another process it is the bare function."""

    def __init__(self, fetch: Callable[[Any], Any], call: Call, clock: Clock) -> None:
        self._fetch = fetch
        self._call = call
        self._clock = clock

    def __call__(self, argument: object) -> object:
        self._call.began = self._clock()
        return self._fetch(argument)

    def __reduce__(self) -> tuple[object, ...]:
        self._call.began = self._clock()  # it leaves now; nobody here will see it begin
        return partial, (self._fetch,)


class ExecutorRunner(Runner):
    """One future an attempt, on an executor that others may use too and that is not ours to end."""

    def __init__(self, work: Work, executor: Executor, completions: Completions, clock: Clock) -> None:
        self.out = 0
        self._work = work
        self._executor = executor
        self._completions = completions
        self._clock = clock
        self._futures: dict[Call, Future[Any]] = {}

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        del first  # what is out is never more than may run at once, so nothing waits here
        for call in calls:
            fetch = self._work.fetch
            call.began = self._clock()
            if self._work.rated:
                fetch, call.began = _Noting(fetch, call, self._clock), -math.inf
            future = self._executor.submit(fetch, self._work.argument(call))
            self._futures[call] = future
            self.out += 1
            self._completions.add(future, (self._done, call, future, None))

    def _done(self, call: Call, future: Future[Any], _error: BaseException | None) -> None:
        if self._futures.get(call) is not future:
            return  # taken back; the call may have been started anew
        del self._futures[call]
        self.out -= 1
        if call.began == -math.inf:  # it has failed before it began
            call.began = self._clock()
        if future.cancelled():
            self._work.ended(call, None, CancelledError("the executor cancelled the call before it ran"))
        elif (error := future.exception()) is not None:
            self._work.ended(call, None, error)
        else:
            self._work.ended(call, future.result(), None)

    def take_back(self) -> list[Call]:
        # One by one, since `shutdown(cancel_futures=True)` is not ours to call; running ones refuse.
        back = [call for call, future in self._futures.items() if future.cancel()]
        for call in back:
            del self._futures[call]
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self.take_back()


class PoolRunner(Runner):
    """A pool of threads whose tasks go on: after a success with the next call that was handed over.

    A future an attempt costs 33 µs; a task that goes on 5. It ends after a failure, so that little
    begins before the coordinator has heard of a 429. The hand-over queue gives back what has not
    begun. Each end of a task is an event as well, for whether calls wait must be looked at then: one
    may have been put just when the last task had stopped looking.
    """

    def __init__(self, work: Work, completions: Completions, clock: Clock) -> None:
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

    def _go_on(self) -> bool:
        """Makes attempts, one after the other; runs in a thread of the pool.

        Returns:
            Whether it is still one of its workers; not if its last attempt was given up.
        """
        _, fetch, argument, *_ = self._work
        clock, put, attempt_ended, running = (
            self._clock,
            self._completions.put,
            self._attempt_ended,
            self._running,
        )
        end = clock() + TASK_TIME
        while clock() < end:
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
                answer = fetch(asked)
            except BaseException as error:  # noqa: BLE001 - all that ends an attempt is for the coordinator
                counts = running is None or running.pop(attempt, None) is not None
                if counts:
                    put((attempt_ended, call, None, without_our_frames(error)))
                del call, asked  # the error's traceback holds this frame, and the call may hold the error
                return counts
            if running is not None and running.pop(attempt, None) is None:
                return False
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


class SourceRunner(Runner):
    """Reads a source item by item, in a daemon thread of its own, which closes it as well."""

    def __init__(self, source: Source, ended: Handler, completions: Completions) -> None:
        self.out = 0
        self._source = source
        self._ended = ended
        self._completions = completions
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._queue: SimpleQueue[Call | None] = SimpleQueue()

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        del first  # one is like the other
        self.out += len(calls)
        for call in calls:
            self._queue.put(call)
        if self._thread is None and calls and not self._stopped:
            thread = threading.Thread(target=self._read_on, name="twostage-source", daemon=True)
            thread.start()
            self._thread = thread  # one that could not be started reads nothing, and closes nothing

    def _read_on(self) -> None:
        put = self._completions.put
        try:
            while (call := self._queue.get()) is not None and not self._stopped:
                put((self._read, call, self._source.read_one(), None))
        except BaseException as error:  # noqa: BLE001 - the source's end, or a failure that is the job's
            put((self._read, None, None, without_our_frames(error)))
        finally:
            self._source.close()

    def _read(self, call: Call, read: object, error: BaseException | None) -> None:
        self.out -= 1
        self._ended(call, read, error)

    def stop(self) -> None:
        self._stopped = True
        self._queue.put(None)

    def join(self) -> None:
        if self._thread is None:
            self._source.close()
        else:
            self._thread.join(LONGEST_READ)
