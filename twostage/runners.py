"""Where attempts run: on an executor of the user's, or on a pool of threads of our own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from twostage.errors import without_our_frames

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from twostage.calls import Call
    from twostage.completions import Completions, Handler
    from twostage.outcomes import Source

__all__ = ["ExecutorRunner", "PoolRunner", "Runner", "SourceRunner", "Work"]

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
    """

    stage: str
    fetch: Callable[[Any], Any]
    argument: Callable[[Any], Any]
    ended: Handler
    workers: int
    executor: Executor | None


class Runner(Protocol):
    """Runs attempts and reports the end of each as one event. Used by the coordinator's thread alone.

    Attributes:
        out: How many attempts were handed over and have neither ended nor been taken back.
    """

    out: int

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        """Hands `calls` over, to begin in their order; `first`: before those that wait already.

        Raises:
            BaseException: A `submit` did. Each call was then handed over or not, as `out` says.
        """

    def expect(self, calls: int) -> None:
        """Hears, before its first call, how many are on their way."""

    def take_back(self) -> list[Call]:
        """Takes back what has not begun and returns it, in its order."""

    def stop(self) -> None:
        """Lets nothing more begin. What runs still reports its end."""

    def join(self) -> None:
        """Waits, once `out` is 0, until the threads of our own are gone."""


class ExecutorRunner:
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
            call.began = self._clock()
            future = self._executor.submit(self._work.fetch, self._work.argument(call))
            self._futures[call] = future
            self.out += 1
            self._completions.add(future, (self._done, call, future, None))

    def _done(self, call: Call, future: Future[Any], _error: BaseException | None) -> None:
        if self._futures.get(call) is not future:
            return  # taken back; the call may have been started anew
        del self._futures[call]
        self.out -= 1
        if future.cancelled():
            self._work.ended(call, None, CancelledError("the executor cancelled the call before it ran"))
        elif (error := future.exception()) is not None:
            self._work.ended(call, None, error)
        else:
            self._work.ended(call, future.result(), None)

    def expect(self, calls: int) -> None:
        pass

    def take_back(self) -> list[Call]:
        # One by one, since `shutdown(cancel_futures=True)` is not ours to call; running ones refuse.
        back = [call for call, future in self._futures.items() if future.cancel()]
        for call in back:
            del self._futures[call]
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self.take_back()

    def join(self) -> None:
        pass


class PoolRunner:
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
            self._completions.add(task, (self._task_ended, None, None, None))

    def _task_ended(self, _subject: object, _answer: object, _error: BaseException | None) -> None:
        self._tasks -= 1
        if not self._stopped:
            self._grow(self.out)

    def _attempt_ended(self, call: Call, answer: object, error: BaseException | None) -> None:
        self.out -= 1
        self._work.ended(call, answer, error)

    def _go_on(self) -> None:
        """Makes attempts, one after the other; runs in a thread of the pool."""
        _, fetch, argument, *_ = self._work
        clock, put, attempt_ended = self._clock, self._completions.put, self._attempt_ended
        end = clock() + TASK_TIME
        while clock() < end:
            try:
                call = self._first.popleft() if self._first else self._queue.get(timeout=LINGER)
            except IndexError:
                continue  # another worker took it
            except Empty:
                return
            if call is None:
                if self._stopped:
                    return
                continue  # the ticket of a call in `_first`, which somebody may have taken already
            call.began = clock()
            try:
                answer = fetch(argument(call))
            except BaseException as error:  # noqa: BLE001 - all that ends an attempt is for the coordinator
                put((attempt_ended, call, None, without_our_frames(error)))
                del call  # the error's traceback holds this frame, and the call may hold the error
                return
            put((attempt_ended, call, answer, None))
            del call, answer  # nothing of an attempt is kept while the next is waited for

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
        self._pool.shutdown(wait=True, cancel_futures=True)


class SourceRunner:
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
            self._thread = threading.Thread(target=self._read_on, name="twostage-source", daemon=True)
            self._thread.start()

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

    def expect(self, calls: int) -> None:
        pass

    def take_back(self) -> list[Call]:
        back: list[Call] = []
        with suppress(Empty):
            while True:
                call = self._queue.get_nowait()
                if call is not None:
                    back.append(call)
        self.out -= len(back)
        return back

    def stop(self) -> None:
        self._stopped = True
        self._queue.put(None)

    def join(self) -> None:
        if self._thread is None:
            self._source.close()
        else:
            self._thread.join(LONGEST_READ)
