"""Runs a job in virtual time and holds it against the contract: each item exactly one outcome, and so on."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tenacity import Retrying, wait_fixed

from twostage import Stage, iter_two_stage, run_two_stage
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twostage import Outcome

__all__ = ["Plan", "check", "drawn_plan"]

WAIT = 1.0
"""Between the attempts of a call."""


@dataclass(frozen=True)
class Plan:
    """A job and all that goes wrong in it."""

    items: int
    batch_size: int | None
    workers: tuple[int, int]
    window: int
    latency: Callable[[random.Random], float]
    fail: float
    """Share of attempts with a failure that passes."""
    lasting: frozenset[int]
    """Items whose stage two fails for good."""
    miscounted: frozenset[int]
    """Items whose batch comes back with a token too many."""
    source_fails_at: int | None
    leave_after: int | None
    """How many outcomes the consumer takes before it leaves its loop."""
    listed: bool
    ordered: bool
    return_exceptions: bool
    source_pause: float
    consumer_pause: float
    seed: int

    @property
    def may_end_early(self) -> bool:
        failing = self.lasting or (self.miscounted and self.batch_size)
        return self.source_fails_at is not None or bool(failing and not self.return_exceptions)


def drawn_plan(seed: int) -> Plan:
    """Returns the plan that belongs to a seed."""
    rng = random.Random(seed)
    items = rng.choice((0, 1, 7, 40, 150, 400))
    batch_size = rng.choice((None, 1, 2, 10, 37))
    some = rng.randrange(items + 1)
    return Plan(
        items=items,
        batch_size=batch_size,
        workers=(rng.choice((1, 2, 5, 40)), rng.choice((1, 3, 20, 100))),
        window=(batch_size or 1) + rng.choice((0, 3, 50, 10_000)),
        latency=rng.choice(
            (lambda _: 0.0, lambda _: 1.0, lambda rng: rng.uniform(0, 2), lambda rng: rng.paretovariate(1.2))
        ),
        fail=rng.choice((0.0, 0.05, 0.5)),
        lasting=frozenset(rng.sample(range(items), min(items, rng.choice((0, 0, 1, 5))))),
        miscounted=frozenset(rng.sample(range(items), min(items, rng.choice((0, 0, 0, 2))))),
        source_fails_at=some if rng.random() < 0.1 else None,
        leave_after=some if rng.random() < 0.1 else None,
        listed=rng.random() < 0.4,
        ordered=rng.random() < 0.4,
        return_exceptions=rng.random() < 0.7,
        source_pause=rng.choice((0.0, 0.0, 0.3)),
        consumer_pause=rng.choice((0.0, 0.0, 0.3)),
        seed=seed,
    )


class Watch:
    """What happened in one job."""

    def __init__(self, plan: Plan, virtual: VirtualTime) -> None:
        self.plan = plan
        self.virtual = virtual
        self.rng = random.Random(plan.seed)
        self.read = 0
        self.most_read = 0
        self.taken = 0
        self.source_closed = False
        # For each stage and the first item of a call: when each attempt began and ended.
        self.attempts: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)

    def source(self) -> Iterator[int]:
        try:
            for item in range(self.plan.items):
                sleep(self.plan.source_pause)
                if item == self.plan.source_fails_at:
                    raise EOFError
                self.read += 1
                self.most_read = max(self.most_read, self.read - self.taken)
                yield item
        finally:
            self.source_closed = True

    def attempt(self, stage: str, first: int) -> None:
        began = self.virtual.now
        attempts = self.attempts[stage, first]
        assert not attempts or began >= attempts[-1][1] + WAIT, f"{stage} of {first} begins before it is due"
        sleep(self.plan.latency(self.rng))
        attempts.append((began, self.virtual.now))
        if self.rng.random() < self.plan.fail:
            raise ApiError(503)

    def fetch_token(self, item: int) -> str:
        self.attempt("stage one", item)
        return f"token {item}"

    def fetch_tokens(self, items: list[int]) -> list[str]:
        assert 1 <= len(items) <= (self.plan.batch_size or 0)
        self.attempt("stage one", items[0])
        tokens = [f"token {item}" for item in items]
        return tokens + tokens[:1] if self.plan.miscounted.intersection(items) else tokens

    def fetch_result(self, token: str) -> int:
        item = int(token.removeprefix("token "))
        self.attempt("stage two", item)
        if item in self.plan.lasting:
            raise LookupError(item)
        return -item

    def most_at_once(self, stage: str) -> int:
        """The highest number of attempts that ran at the same time; one that ends makes room at once."""
        changes = []
        for (of, _), attempts in self.attempts.items():
            if of == stage:
                for began, ended in attempts:
                    changes += [(began, 1), (ended, -1)]
        running = most = 0
        for _, change in sorted(changes):
            running += change
            most = max(most, running)
        return most


class Ended(NamedTuple):
    """How a job ended, and what it handed over."""

    error: Exception | None = None
    left: bool = False
    results: Sequence[Any] = ()
    outcomes: Sequence[Outcome[int, str, int]] = ()


def run(plan: Plan, watch: Watch) -> Ended:
    """Runs the plan's job."""
    retry = Retrying(
        retry=lambda state: isinstance(state.outcome and state.outcome.exception(), ApiError),
        stop=lambda _: False,
        wait=wait_fixed(WAIT),
    )
    first: Any = (
        Stage(watch.fetch_token, workers=plan.workers[0], retry=retry)
        if plan.batch_size is None
        else Stage(watch.fetch_tokens, batch_size=plan.batch_size, workers=plan.workers[0], retry=retry)
    )
    second = Stage(watch.fetch_result, workers=plan.workers[1], retry=retry)
    settings: dict[str, Any] = {"window": plan.window, "return_exceptions": plan.return_exceptions}
    outcomes: list[Outcome[int, str, int]] = []
    try:
        if plan.listed:
            return Ended(results=run_two_stage(watch.source(), first, second, **settings))
        with iter_two_stage(watch.source(), first, second, ordered=plan.ordered, **settings) as stream:
            for outcome in stream:
                watch.taken += 1
                outcomes.append(outcome)
                if len(outcomes) == plan.leave_after:
                    return Ended(left=True, outcomes=outcomes)
                sleep(plan.consumer_pause)
    except (LookupError, ValueError, EOFError) as error:
        return Ended(error, outcomes=outcomes)
    return Ended(outcomes=outcomes)


def check(plan: Plan) -> None:
    """Runs the plan's job.

    Raises:
        AssertionError: A point of the contract did not hold.
    """
    with VirtualTime(plan.seed) as virtual:
        watch = Watch(plan, virtual)
        ended = run(plan, watch)
        begun = sum(map(len, watch.attempts.values()))
        sleep(1e6)
        assert sum(map(len, watch.attempts.values())) == begun, "an attempt begins after the end"
    assert watch.source_closed or watch.read == 0
    assert plan.listed or watch.most_read <= plan.window
    for stage, limit in zip(("stage one", "stage two"), plan.workers, strict=True):
        assert watch.most_at_once(stage) <= limit
    _check_end(plan, ended)
    over = ended.error is None and not ended.left
    if plan.listed:
        assert len(ended.results) == (plan.items if over else 0)
        for item, result in enumerate(ended.results):
            _check_outcome(plan, item, result, result if isinstance(result, Exception) else None)
        return
    indices = [outcome.index for outcome in ended.outcomes]
    assert len(set(indices)) == len(indices), "an item gave two outcomes"
    assert len(indices) == plan.items or not over, "an item gave no outcome"
    if plan.ordered:
        assert indices == sorted(indices)
        # What is done before a failure is handed over, with gaps; a consumer may leave between them.
        assert plan.may_end_early or indices == list(range(len(indices)))
    for outcome in ended.outcomes:
        assert outcome.item == outcome.index
        _check_outcome(plan, outcome.item, outcome.exception or outcome.result, outcome.exception)
        assert len(watch.attempts["stage two", outcome.item]) == outcome.result_attempts


def _check_end(plan: Plan, ended: Ended) -> None:
    error = ended.error
    if isinstance(error, EOFError):
        assert plan.source_fails_at is not None
    elif isinstance(error, LookupError):
        assert plan.lasting
        assert not plan.return_exceptions
    elif isinstance(error, ValueError):
        assert plan.miscounted
        assert not plan.return_exceptions
    elif not ended.left:
        assert plan.source_fails_at is None or plan.source_fails_at >= plan.items
        assert plan.return_exceptions or not (plan.lasting or (plan.miscounted and plan.batch_size))


def _check_outcome(plan: Plan, item: int, result: object, exception: BaseException | None) -> None:
    size = plan.batch_size
    batch = range(item, item + 1) if size is None else range(item - item % size, item - item % size + size)
    if size is not None and plan.miscounted.intersection(batch):
        assert isinstance(exception, ValueError)
    elif item in plan.lasting:
        assert isinstance(exception, LookupError)
    else:
        assert exception is None
        assert result == -item
