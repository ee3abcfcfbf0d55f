"""An `as_completed` that grows: futures may be added while their completions are being taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["AsCompleted", "Event", "Handler"]

Handler: TypeAlias = Callable[[Any, Any, BaseException | None], None]
"""Takes an event's subject, the answer and the error."""

Event: TypeAlias = tuple[Handler, Any, Any, BaseException | None]
"""What a coordinator is told: who handles it, and the three arguments."""

LONGEST_WAIT = 3600.0
"""`SimpleQueue.get` refuses waits that do not fit the platform's clock; a policy may ask for any."""


class AsCompleted:
    """The events of one job, in the order in which they happened.

    `concurrent.futures.as_completed` takes a fixed set of futures, and `wait` costs the whole set at
    each call. Here a future's done callback is the `put` of an event built beforehand and nothing
    else: O(1) a future, and nothing that could raise inside the callback, where it would be lost.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Event] = SimpleQueue()
        self.put = self._queue.put

    def add(self, future: Future[Any], event: Event) -> None:
        """Has `event` put as soon as `future` is done, failed or cancelled."""
        # The callback's argument, the future, lands in `block`, which `put` ignores.
        future.add_done_callback(partial(self.put, event))

    def take(self, timeout: float | None) -> list[Event]:
        """Returns all events that are there, after waiting for the first of them.

        Args:
            timeout: The longest wait in seconds, `None` for no limit. When it has passed, or after an
                hour at the latest, the list is empty.
        """
        wait = LONGEST_WAIT if timeout is None else min(max(timeout, 0.0), LONGEST_WAIT)
        try:
            events = [self._queue.get(timeout=wait)]
        except Empty:
            return []
        for _ in range(self._queue.qsize()):  # nobody else takes, so as many are there
            events.append(self._queue.get())  # noqa: PERF401 - the same in a comprehension hides the wait
        return events
