"""What the coordinator says: the moments that parts hear of, and its messages to the caller's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.base.records import Call, Member
    from twostage.core.handover import AnyOutcome
    from twostage.core.lines import Line

__all__ = ["Hears", "Message"]


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


class Hears:
    """What the parts of a job hear of: functions, none where nobody wants to. Who comes first is told first.

    Attributes:
        begins: That the job is about to begin, in the caller's thread; and the time.
        closes: That nothing goes on any more, whoever tells; maybe twice.
        read: Takes items that were read, and their keys; returns those that are still to be asked for.
        tokens: Items that have their tokens now.
        results: Members of a call that have an answer, and the answers.
        given: Members whose answer was given by a policy, as its last word.
        failed: A line, its members that have failed, how, and whether that may pass.
        done: Each outcome.
        attempts: A line, a call, its first member and its size, the number of answers, the failure.
        retries: A line, members of a call, their failure, the attempt's number, and when they are due.
        before_message: That outcomes are about to be handed over.
        handled: What was told, if anything, at the end of each `handle`.
        due: Is asked when to be called again.
    """

    def __init__(self) -> None:
        self.begins: list[Callable[[float], None]] = []
        self.closes: list[Callable[[], None]] = []
        self.read: list[Callable[[list[AnyOutcome], Any], list[AnyOutcome]]] = []
        self.tokens: list[Callable[[Sequence[AnyOutcome]], None]] = []
        self.results: list[Callable[[Sequence[Member], Sequence[Any]], None]] = []
        self.given: list[Callable[[Sequence[Member]], None]] = []
        self.failed: list[Callable[[int, Sequence[Member], Exception, bool], None]] = []
        self.done: list[Callable[[AnyOutcome], None]] = []
        self.attempts: list[Callable[[Line, Call, Member, int, int, BaseException | None], None]] = []
        self.retries: list[Callable[[Line, Sequence[Member], Exception | None, int, float], None]] = []
        self.before_message: list[Callable[[], None]] = []
        self.handled: list[Callable[[Message | None], None]] = []
        self.due: list[Callable[[], float]] = []

    def tell_tokens(self, outcomes: Sequence[AnyOutcome]) -> None:
        """Tells of items that have their tokens."""
        for hear in self.tokens:
            hear(outcomes)

    def tell_given(self, members: Sequence[Member]) -> None:
        """Tells of members whose answer a policy has given."""
        for hear in self.given:
            hear(members)

    def tell_retry(
        self, line: Line, members: Sequence[Member], error: Exception | None, attempt: int, due: float
    ) -> None:
        """Tells of members of a call that are tried again."""
        for hear in self.retries:
            hear(line, members, error, attempt, due)
