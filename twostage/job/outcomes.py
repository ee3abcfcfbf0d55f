"""`Outcomes` and `AsyncOutcomes`, the iterators; and the caller's half of a job, which hands over."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twostage.base.words import without_our_frames
from twostage.running.callers_loop import Turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import TracebackType

    from twostage.base.records import Outcome
    from twostage.core.coordinator import Coordinator
    from twostage.core.moments import Message
    from twostage.job.driver import AsyncDriver, Driver
    from twostage.job.sources import AsyncSource, Source

__all__ = ["AsyncJob", "AsyncOutcomes", "Job", "Outcomes"]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")


class _Hand:
    """What both halves of a caller have in common: the outcomes in hand, and what the coordinator hears."""

    _running = False  # from the first `advance` to `close`; also while Ctrl-C interrupts `__init__`

    def __init__(self, coordinator: Coordinator, driver: Driver) -> None:
        self._coordinator = coordinator
        self._driver = driver
        self._hand: deque[Outcome[Any, Any, Any]] = deque()
        self._untold = 0
        # Each message to the coordinator wakes it: often enough that neither bound is felt, no oftener.
        self._tell_every = max(1, min(coordinator.bound, coordinator.reading.window) // 32)
        self._ended = False
        self.error: BaseException | None = None

    def _start(self) -> None:
        if not self._running and not self._ended:
            for line in self._coordinator.lines:
                line.runner.prepare()
            for begin in self._coordinator.hears.begins:
                begin(self._driver.clock())
            self._running = True
            self._driver.start(self._coordinator)

    def _close_all(self) -> None:
        """Closes what is open, as no thread of ours is left: if none was started, nobody else has."""
        for close in self._coordinator.hears.closes:
            close()

    def _take(self) -> Outcome[Any, Any, Any]:
        outcome = self._hand.popleft()
        self._untold += 1
        if self._untold >= self._tell_every or not self._hand:
            self._driver.send((self._coordinator.outcomes_taken, self._untold, None, None))
            self._untold = 0
        return outcome

    def _hear(self, message: Message) -> None:
        self._hand.extend(message.outcomes)
        self._ended = self._ended or message.ended
        self.error = message.error

    def _over(self) -> None:
        self.abandon()
        self._running, self._ended = False, True
        self._hand.clear()
        self.error = None

    def abandon(self) -> None:
        """Ends the job without waiting for anything: all that a finaliser may do."""
        self._driver.send((self._coordinator.close, None, None, None))

    def __del__(self) -> None:
        if self._running:
            self.abandon()  # and no more: the collector may call this in any thread, also in a worker


class Job(_Hand):
    """The half of a job that lives in the caller's thread.

    It reads a batch when one is wanted and no outcome is in hand, or when as many outcomes as a batch
    has items were handed over since the last one: at each turn, a source that pages would keep back
    outcomes that are done; only with empty hands, a pausing consumer would starve the workers.
    """

    def __init__(self, source: Source, coordinator: Coordinator, driver: Driver) -> None:
        super().__init__(coordinator, driver)
        self._source = source
        # A thread of ours that reads the source closes it as well.
        self._close_source = source.close if coordinator.reader is None else coordinator.reader.join
        self._wanted = 0
        self._since_read = 0

    def advance(self) -> Outcome[Any, Any, Any] | None:
        """Returns the next outcome; `None` at the job's end, of which `error` tells the reason."""
        self._start()
        size = self._coordinator.reading.size
        while self._hand or not self._ended:
            if self._hand and not (self._wanted and self._since_read >= size):
                self._since_read += 1
                return self._take()
            self._look(block=not (self._hand or self._wanted))
            if self._wanted and (not self._hand or self._since_read >= size):
                self._read()
        return None

    def _look(self, *, block: bool) -> None:
        message = self._driver.receive(block=block)
        if message is not None:
            self._hear(message)
            self._wanted = 0 if message.ended or message.leave else self._wanted + message.wanted
            if message.leave:
                self._driver.send((self._coordinator.source_left, None, None, None))

    def _read(self) -> None:
        size = self._coordinator.reading.size
        items: list[Any] = []
        keys = failure = None
        try:
            items, keys = self._source.read(size)
        except Exception as error:  # noqa: BLE001 - the source's failure ends the job, after the outcomes that are done
            failure = without_our_frames(error)
        self._wanted -= 1
        self._since_read = 0
        if items:
            self._driver.send((self._coordinator.batch_read, items, keys, None))
        if len(items) < size:
            self._wanted = 0
            self._driver.send((self._coordinator.source_end, None, None, failure))
        del failure  # its traceback may lead back to this frame

    def close(self) -> None:
        """Ends the job, waits for the calls that run, and closes the source. Harmless if it has ended."""
        try:
            if self._running:
                self.abandon()
                while not self._ended:
                    self._look(block=True)
                self._driver.join()
            self._close_all()
        finally:  # also if a second Ctrl-C has given up the waiting, or came before anybody was told
            self._over()
            self._wanted = 0
            self._close_source()


class AsyncJob(_Hand):
    """The half of a job that lives on the caller's event loop. Others read the source for it."""

    _driver: AsyncDriver

    def __init__(self, source: Source | AsyncSource, coordinator: Coordinator, driver: AsyncDriver) -> None:
        super().__init__(coordinator, driver)
        self._source = source
        self._turn = Turn()
        self._begun = False

    async def advance(self) -> Outcome[Any, Any, Any] | None:
        """Returns the next outcome; `None` at the job's end, of which `error` tells the reason."""
        self._start()
        self._begun = True
        try:
            await self._turn.end_if_long()
            while not self._hand and not self._ended:
                await self._listen()
        except GeneratorExit:  # nothing can be awaited any more
            self._over()
            raise
        return self._take() if self._hand else None

    async def _listen(self) -> None:
        message = await self._driver.next_message()
        if message is not None:
            self._hear(message)

    async def close(self) -> None:
        """Ends the job and waits for the calls that run. Harmless if it has ended."""
        try:
            if self._running:
                self.abandon()
                while not self._ended:
                    await self._listen()
                self._driver.join()
            self._close_all()
        finally:  # also if a second cancellation has given up the waiting
            self._over()
        if not self._begun:  # else who reads the source closes it
            closing = self._source.close()
            if closing is not None:
                await closing


class Outcomes(Generic[ItemT, TokenT, ResultT]):
    """The outcomes of a job: an iterator, to be closed, best by `with`.

    The job starts at the first `next` and goes on in its own threads while the consumer is away, until
    the in-progress bound or the window is reached. It can be used from several threads, one at a time.
    Closing it, or leaving its `with` block, starts nothing more, waits for the calls that run and
    closes the source if that is a generator, or another iterator that can be closed. One that is
    dropped is cleaned up as well, without waiting.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def __iter__(self) -> Iterator[Outcome[ItemT, TokenT, ResultT]]:
        return self

    def __next__(self) -> Outcome[ItemT, TokenT, ResultT]:
        """Returns the next outcome.

        Raises:
            Exception: The first failure, as the user's function raised it, unless `return_exceptions`
                is on; or the source's.
            RuntimeError: A function of the user's raised `StopIteration`, which would end a loop as if
                the job was done.
        """
        try:
            outcome = self._job.advance()
        except BaseException:
            self._job.close()
            raise
        if outcome is not None:
            return outcome
        try:
            error = self._job.error
            if error is None:
                raise StopIteration
            if isinstance(error, StopIteration):
                raise RuntimeError("a function of the job raised StopIteration") from error  # noqa: TRY004
            raise error
        finally:
            error = None  # or its traceback holds this frame, and the frame the exception
            self._job.close()

    def close(self) -> None:
        """Ends the job: nothing more starts, running calls are awaited, no thread of ours is left."""
        self._job.close()

    def __enter__(self) -> Outcomes[ItemT, TokenT, ResultT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncOutcomes(Generic[ItemT, TokenT, ResultT]):
    """The outcomes of a job, for an event loop: an async iterator, to be closed, best by `async with`.

    The job starts at the first `anext` and goes on while the consumer is away, until the in-progress bound
    or the window is reached. Closing it, or leaving its `async with` block, starts nothing more, waits for
    the calls that run and closes the source as `Outcomes` does. One that is dropped is cleaned up as well,
    without waiting.
    """

    def __init__(self, job: AsyncJob) -> None:
        self._job = job

    def __aiter__(self) -> AsyncIterator[Outcome[ItemT, TokenT, ResultT]]:
        return self

    async def __anext__(self) -> Outcome[ItemT, TokenT, ResultT]:
        """Returns the next outcome.

        Raises:
            Exception: The first failure, as the user's function raised it, unless `return_exceptions`
                is on; or the source's.
            RuntimeError: A function of the user's raised `StopAsyncIteration`, which would end a loop as
                if the job was done, or `StopIteration`.
        """
        try:
            outcome = await self._job.advance()
        except BaseException:
            await self._job.close()
            raise
        if outcome is not None:
            return outcome
        try:
            error = self._job.error
            if error is None:
                raise StopAsyncIteration
            if isinstance(error, StopIteration | StopAsyncIteration):
                raise RuntimeError(  # noqa: TRY004 - it is no wrong type
                    f"a function of the job raised {type(error).__name__}"
                ) from error
            raise error
        finally:
            error = None  # or its traceback holds this frame, and the frame the exception
            await self._job.close()

    async def aclose(self) -> None:
        """Ends the job: nothing more starts, running calls are awaited, no thread of ours is left."""
        await self._job.close()

    async def __aenter__(self) -> AsyncOutcomes[ItemT, TokenT, ResultT]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
