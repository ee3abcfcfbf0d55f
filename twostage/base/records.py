"""The records that travel through a job: the calls of both stages, and what becomes of an item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

from twostage.base.words import brief

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = [
    "Batch",
    "Call",
    "Halves",
    "ListedToken",
    "Member",
    "Outcome",
    "TokenList",
    "failure_of",
    "item_of",
    "members_of",
    "told",
]

ItemT = TypeVar("ItemT")
TokenT = TypeVar("TokenT")
ResultT = TypeVar("ResultT")


class Call:
    """One piece of work for a stage.

    Attributes:
        attempts: How many attempts have ended. What is taken back before it began has used none.
        began: When the running attempt, or the last one, began; set by who runs it.
        ended: When that ended; set by who runs it too, if attempts are observed and it knows. Else 0.
        handed_over: When it was handed over, if attempts are observed.
        retry_state: tenacity's state of this call, from its first judged attempt on.
    """

    __slots__ = ("attempts", "began", "ended", "handed_over", "retry_state")

    dropped = False  # nobody waits for it any more, as its item has begun again
    ended: float
    handed_over: float

    def __init__(self) -> None:
        self.attempts = 0
        self.began = 0.0
        self.retry_state: Any = None


class Halves:
    """The two halves of a batch.

    Attributes:
        size: How many members the larger one has.
        unanswered: How many of the two must still be answered to show that `size` is not too large, as
            the whole was; infinite if it was refused for another reason.
    """

    __slots__ = ("size", "unanswered")

    def __init__(self, size: int, unanswered: float) -> None:
        self.size = size
        self.unanswered = unanswered


class Batch(Call):
    """A call that takes several items or tokens together.

    Attributes:
        members: What it takes: the items' outcomes to be; at stage two what would else be calls there.
            Once some have an answer, only those that are tried again.
        half_of: What it was split from, if it was.
    """

    __slots__ = ("half_of", "is_delayed", "members")

    def __init__(self, members: Sequence[Member], half_of: Halves | None = None) -> None:
        self.attempts = 0
        self.began = 0.0
        self.retry_state = None
        self.members = members
        self.half_of = half_of
        self.is_delayed = False


class Outcome(Call, Generic[ItemT, TokenT, ResultT]):
    """What became of one item: a result or an exception, never both, never none.

    (It is its own call of stage two as well: at a million items one object less for each counts.)

    Attributes:
        index: The item's place in the input, from 0.
        item: What was passed in.
        token: What stage one returned for the item; `None` if it failed there.
        exception: Why the item failed, or `None` if it has a result.
        token_attempts: How many attempts stage one's call took; 0 if a journal had the token.
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
        """How many attempts stage two's call took; 0 if stage one failed, or a journal had the result."""
        return self.attempts

    @property
    def outcome(self) -> Outcome[ItemT, TokenT, ResultT]:
        """What is known of its item: itself."""
        return self

    def answer(self, result: ResultT) -> Outcome[ItemT, TokenT, ResultT] | None:
        """Takes its result; returns the outcome that is done by that."""
        self._result = result
        return self

    def fail(self, error: Exception, stage: int, attempts: int) -> Outcome[ItemT, TokenT, ResultT] | None:
        """The same for its failure."""
        self.exception = error
        if stage == 1:
            self.token_attempts = attempts
        else:
            self.attempts = attempts
        return self

    def copy(self, other: Outcome[Any, Any, Any]) -> None:
        """Takes over what became of an equal item: the same objects."""
        self.token = other.token
        self._result = other._result
        self.exception = other.exception
        self.token_attempts = other.token_attempts
        self.attempts = other.attempts

    def __repr__(self) -> str:
        # Neither token nor result, and of an exception its type alone: its text often holds a URL.
        state = "done" if self.exception is None else type(self.exception).__name__
        return f"<Outcome {self.index} of item {brief(self.item)}: {state}>"


class TokenList:
    """What becomes of the tokens of one item, if it has many.

    Attributes:
        outcome: The item's.
        results: The tokens' results, in their places, as far as they are there.
        missing: How many are not.
        dropped: Whether nobody waits for them any more, as the item has begun again.
    """

    __slots__ = ("dropped", "missing", "outcome", "results")

    def __init__(self, outcome: Outcome[Any, Any, Any], size: int) -> None:
        self.outcome = outcome
        self.results: list[Any] = [None] * size
        self.missing = size
        self.dropped = False


class ListedToken(Call):
    """A call of stage two for one of an item's many tokens."""

    __slots__ = ("place", "token", "tokens")

    def __init__(self, tokens: TokenList, place: int, token: object) -> None:
        super().__init__()
        self.tokens = tokens
        self.place = place
        self.token = token

    @property
    def outcome(self) -> Outcome[Any, Any, Any]:
        """That of its item."""
        return self.tokens.outcome

    @property
    def dropped(self) -> bool:  # type: ignore[override]
        """Whether its item has begun again."""
        return self.tokens.dropped

    def answer(self, result: object) -> Outcome[Any, Any, Any] | None:
        """Takes its result; returns its item's outcome if that is done by that."""
        tokens = self.tokens
        if tokens.dropped:
            return None
        tokens.outcome.attempts += self.attempts
        tokens.results[self.place] = result
        tokens.missing -= 1
        if tokens.missing:
            return None
        tokens.outcome.result = tokens.results
        return tokens.outcome

    def fail(self, error: Exception, stage: int, attempts: int) -> Outcome[Any, Any, Any] | None:
        """The same for its failure, which takes its result's place."""
        del stage
        self.attempts = attempts
        return self.answer(error)


Member: TypeAlias = Outcome[Any, Any, Any] | ListedToken


def members_of(call: Call) -> Sequence[Any]:
    """Returns a batch's members; another call is its own."""
    return call.members if isinstance(call, Batch) else (call,)


def failure_of(outcome: Outcome[Any, Any, Any], *, many: bool) -> Exception | None:
    """Returns an item's failure, also that of one of its tokens if it has `many`."""
    if outcome.exception is not None or not many:
        return outcome.exception
    return next((one for one in outcome.result if isinstance(one, Exception)), None)


def item_of(member: Member) -> Outcome[Any, Any, Any]:
    """Returns the outcome of the item that a member belongs to."""
    return member.outcome if isinstance(member, ListedToken) else member


def told(call: Call, members: Sequence[Member] | None = None) -> str:
    """Returns what messages call the items of a call, or of some of its members."""
    if members is None:
        members = members_of(call)
    first = item_of(members[0])
    return brief(first.item) if len(members) == 1 else f"{len(members)} items from {brief(first.item)}"
