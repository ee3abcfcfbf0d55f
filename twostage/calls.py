"""The records that travel through a job: the calls of both stages, and what becomes of an item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from twostage.errors import brief

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["Batch", "Call", "Outcome"]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")


class Call:
    """One piece of work for a stage.

    Attributes:
        attempts: How many attempts have ended. What is taken back before it began has used none.
        began: When the running attempt, or the last one, began; set by who runs it.
        retry_state: tenacity's state of this call, from its first judged attempt on.
    """

    __slots__ = ("attempts", "began", "retry_state")

    def __init__(self) -> None:
        self.attempts = 0
        self.began = 0.0
        self.retry_state: RetryCallState | None = None


class Batch(Call):
    """A call of stage one: the items that it takes together, as their outcomes to be."""

    __slots__ = ("outcomes",)

    def __init__(self, outcomes: list[Outcome[Any, Any, Any]]) -> None:
        self.attempts = 0
        self.began = 0.0
        self.retry_state = None
        self.outcomes = outcomes


class Outcome(Call, Generic[ItemT, TokenT, ResultT]):
    """What became of one item: a result or an exception, never both, never none.

    (It is its own call of stage two as well: at a million items one object less for each counts.)

    Attributes:
        index: The item's place in the input, from 0.
        item: What was passed in.
        token: What stage one returned for the item; `None` if it failed there.
        exception: Why the item failed, or `None` if it has a result.
        token_attempts: How many attempts stage one's call took.
    """

    __slots__ = ("_result", "exception", "index", "item", "token", "token_attempts")

    index: int
    item: ItemT
    token: TokenT | None
    exception: Exception | None
    token_attempts: int

    def __init__(self, index: int, item: ItemT) -> None:
        self.attempts = 0
        self.began = 0.0
        self.retry_state = None
        self.index = index
        self.item = item
        self.token = None
        self._result: ResultT | None = None
        self.exception = None
        self.token_attempts = 0

    @property
    def result(self) -> ResultT:
        """What stage two returned; raises `exception` if the item failed, as `Future.result` does."""
        if self.exception is not None:
            try:
                raise self.exception
            finally:
                del self  # or the exception's traceback holds this frame, and it the exception
        return cast("ResultT", self._result)

    @result.setter
    def result(self, result: ResultT) -> None:
        self._result = result

    @property
    def result_attempts(self) -> int:
        """How many attempts stage two's call took; 0 if stage one failed."""
        return self.attempts

    def __repr__(self) -> str:
        # Neither token nor result, and of an exception its type alone: its text often holds a URL.
        state = "done" if self.exception is None else type(self.exception).__name__
        return f"<Outcome {self.index} of item {brief(self.item)}: {state}>"
