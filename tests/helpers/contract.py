"""Runs a job in virtual time and holds it against the contract: each item exactly one outcome, and so on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from common import books, part
from tenacity import Retrying, retry_if_exception, wait_fixed

from twostage import MissingToken, Outcome, RunTimeout, Stage, TooManyFailures, iter_two_stage, run_two_stage
from twostage.answers.refreshing import Refreshing
from twostage.testing import ApiError, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twostage.core.coordinator import Coordinator

__all__ = ["Answers", "Pace", "Plan", "check", "drawn_plan"]

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
    answers: Answers | None = None
    """What else an API may answer."""
    timeout: float | None = None
    max_failures: float | None = None
    linger: float | None = None
    pace: Pace | None = None
    awaited: tuple[bool, bool] = (False, False)
    """Which stages have coroutine functions."""

    @property
    def may_end_early(self) -> bool:
        failing = self.lasting or (self.miscounted and self.batch_size) or self.answers or self.timeout
        limited = self.source_fails_at is not None or self.max_failures is not None
        return limited or bool(failing and not self.return_exceptions)

    @property
    def asks_once(self) -> bool:
        """Whether no item is asked for again when an equal one has been handed over."""
        return self.listed or self.answers is None or self.answers.distinct is None

    def item_at(self, index: int) -> int:
        return (
            index if self.answers is None or self.answers.distinct is None else index % self.answers.distinct
        )


@dataclass(frozen=True)
class Pace:
    """What the API of a job bears, and what its stages know of that."""

    asks: float
    """Share of the failures that pass which ask for a wait."""
    down: tuple[float, float]
    """From when until when all attempts fail."""
    stage: dict[str, Any]
    """Settings of both stages."""


@dataclass(frozen=True)
class Answers:
    """How the API of a job answers, beyond tokens in the items' order."""

    keyed: bool
    """Batches are answered by mappings."""
    left_out: float
    """Share of items that an answer by key leaves out this time."""
    slots: float
    """Share of a batch's slots with a failure that passes."""
    refuses: bool
    """Each seventh item makes its whole batch be refused, and another one is never in an answer by key."""
    many: bool
    expiring: float
    """Share of items whose first token has expired when it is used; of many, some."""
    distinct: int | None
    """How many items there are, if they come again and again."""
    result_batch: int | None

    def is_refused(self, item: int) -> bool:
        return self.refuses and item % 7 == 3

    def is_missing(self, item: int) -> bool:
        # Where what was left out is asked for again, it must come in the end.
        return self.refuses and self.keyed and not self.left_out and item % 7 == 5

    def expires(self, item: int) -> bool:
        return random.Random(item).random() < self.expiring

    def tokens(self, item: int) -> int:
        return item * 7 % 5 if self.many else 1


def drawn_plan(seed: int) -> Plan:
    """Returns the plan that belongs to a seed."""
    rng = random.Random(seed)
    items = rng.choice((0, 1, 7, 40, 150, 400))
    batch_size = rng.choice((None, 1, 2, 10, 37))
    some = rng.randrange(items + 1)
    answers = None if rng.random() < 0.5 else drawn_answers(rng, batched=batch_size is not None)
    plan = Plan(
        items=items,
        batch_size=batch_size,
        workers=(rng.choice((1, 2, 5, 40)), rng.choice((1, 3, 20, 100))),
        window=(batch_size or 1) + rng.choice((0, 3, 50, 10_000)),
        latency=rng.choice(
            (lambda _: 0.0, lambda _: 1.0, lambda rng: rng.uniform(0, 2), lambda rng: rng.paretovariate(1.2))
        ),
        fail=rng.choice((0.0, 0.05, 0.5)),
        lasting=frozenset(rng.sample(range(items), min(items, rng.choice((0, 0, 1, 5))))),
        miscounted=frozenset(
            rng.sample(range(items), min(items, rng.choice((0, 0, 0, 2)))) if answers is None else ()
        ),
        source_fails_at=some if rng.random() < 0.1 else None,
        leave_after=some if rng.random() < 0.1 else None,
        listed=rng.random() < 0.4,
        ordered=rng.random() < 0.4,
        return_exceptions=rng.random() < 0.7,
        source_pause=rng.choice((0.0, 0.0, 0.3)),
        consumer_pause=rng.choice((0.0, 0.0, 0.3)),
        seed=seed,
        answers=answers,
    )
    plan = with_pace(with_ends(plan, random.Random(-1 - seed)), random.Random(f"pace {seed}"))
    awaited = random.Random(f"awaited {seed}")
    return replace(plan, awaited=(awaited.random() < 0.3, awaited.random() < 0.3))


def with_ends(plan: Plan, rng: random.Random) -> Plan:
    """Returns the plan with what ends a job early, at times; drawn apart, so that the rest stays as it is."""
    timeout = rng.choice((0.5, 1.0, 2.5, 10.0, 60.0)) if rng.random() < 0.2 else None
    most = rng.choice((1, 3, 20, 0.05, 0.5)) if rng.random() < 0.2 else None
    linger = rng.choice((0.2, 1.0, 5.0)) if rng.random() < 0.2 else None
    return replace(
        plan,
        timeout=timeout,
        max_failures=most if plan.return_exceptions else None,
        linger=None if plan.listed else linger,
    )


def with_pace(plan: Plan, rng: random.Random) -> Plan:
    """Returns the plan with an API that asks for waits and is down for a while, at times."""
    if rng.random() < 0.7:
        return plan
    since = rng.choice((0.5, 2.5, 8.0))
    patience = rng.choice((None, 5.0, 300.0))
    settings = {"adaptive": rng.random() < 0.5, "pause": rng.random() < 0.8, "patience": patience}
    down = (since, since + rng.choice((0.0, 20.0, 400.0)))
    return replace(plan, pace=Pace(rng.choice((0.1, 1.0)), down, settings))


def drawn_answers(rng: random.Random, *, batched: bool) -> Answers:
    """Returns how an API answers; what only batches can show is off where there are none."""
    return Answers(
        keyed=batched and rng.random() < 0.5,
        left_out=rng.choice((0.0, 0.2)),
        slots=rng.choice((0.0, 0.2)),
        refuses=rng.random() < 0.5,
        many=rng.random() < 0.4,
        expiring=rng.choice((0.0, 0.1, 1.0)),
        distinct=rng.choice((None, None, 1, 5, 60)),
        result_batch=rng.choice((None, None, 1, 8)),
    )


class ExpiredError(Exception):
    """A token has been kept for too long."""


class Watch:
    """What happened in one job."""

    def __init__(self, plan: Plan, virtual: VirtualTime) -> None:
        self.plan = plan
        self.virtual = virtual
        self.rng = random.Random(plan.seed)
        self.read = 0
        self.most_read = 0
        self.taken = 0
        self.arrived: list[float] = []  # when each item came
        self.exhausted: float | None = None  # when the source had no more of them
        self.source_closed = False
        self.batches: list[tuple[float, list[int]]] = []
        self.blamed: dict[type[Exception], set[int]] = {ApiError: set(), ValueError: set()}
        """Items that were in a batch which was refused, or came back with a token too many."""
        self.answered: set[str] = set()  # tokens with a result
        self.attempts: dict[str, list[tuple[float, float]]] = {"stage one": [], "stage two": []}
        self.made: Counter[str] = Counter()  # attempts of each token's call
        self.due: dict[str, float] = {}  # for an item or a token that has failed and may not be sent before
        self.tokens_given: Counter[int] = Counter()
        self.pauses = {"stage one": (-1.0, -1.0), "stage two": (-1.0, -1.0)}  # the last of each
        self.books: Coordinator | None = None
        self.refreshing: Refreshing | None = None

    def source(self) -> Iterator[int]:
        try:
            for index in range(self.plan.items):
                sleep(self.plan.source_pause)
                if index == self.plan.source_fails_at:
                    raise EOFError
                self.read += 1
                self.most_read = max(self.most_read, self.read - self.taken)
                self.arrived.append(self.virtual.now)
                yield self.plan.item_at(index)
            self.exhausted = self.virtual.now
        finally:
            self.source_closed = True

    @property
    def timed_out(self) -> bool:
        return self.plan.timeout is not None and self.virtual.now >= self.plan.timeout

    def too_late(self, item: int) -> bool:
        """Whether an item, or a token of its, has failed so late that it could not be sent again."""
        assert self.plan.timeout is not None
        return any(
            due >= self.plan.timeout and member.split()[1] == str(item) for member, due in self.due.items()
        )

    def refuse(self, items: list[int]) -> None:
        self.assert_in_time()
        if self.plan.answers is not None and any(map(self.plan.answers.is_refused, items)):
            self.blamed[ApiError].update(items)
            raise ApiError(400)

    def assert_in_time(self) -> None:
        assert self.plan.timeout is None or self.virtual.now <= self.plan.timeout, "a call begins too late"

    def attempt(self, stage: str, members: list[str]) -> None:
        self.assert_in_time()
        began = self.virtual.now
        for member in members:
            due = self.due.pop(member, 0)
            given_up = self.plan.timeout is not None and due >= self.plan.timeout and not self.plan.asks_once
            assert began >= due or given_up, f"{stage} of {member} begins before it is due"
        asked, until = self.pauses[stage]
        assert not asked < began < until, f"{stage} begins an attempt in a pause"
        sleep(self.plan.latency(self.rng))
        self.attempts[stage].append((began, self.virtual.now))
        pace = self.plan.pace
        fails = self.rng.random() < self.plan.fail
        down = pace is not None and pace.down[0] <= began < pace.down[1]
        if fails or down:
            self.pass_on(members)
            raise ApiError(503) if down else self.failure(stage)

    def failure(self, stage: str) -> ApiError:
        error, pace = ApiError(503), self.plan.pace
        if pace is not None and self.rng.random() < pace.asks:
            now, seconds = self.virtual.now, self.rng.choice((1, 5, 40))
            error.headers = {"Retry-After": str(seconds)}  # type: ignore[attr-defined]
            asked, until = self.pauses[stage]
            if pace.stage["pause"] and now + seconds > until:
                self.pauses[stage] = (asked if now < until else now, now + seconds)
        return error

    def pass_on(self, members: list[str]) -> None:
        for member in members:
            self.due[member] = self.virtual.now + WAIT

    def slot(self, member: str, share: float, answer: Callable[[], object]) -> Any:  # noqa: ANN401 - or a failure
        if self.rng.random() < share:
            self.pass_on([member])
            return self.failure("stage one" if member.startswith("item") else "stage two")
        return answer()

    def token(self, item: int) -> str | list[str]:
        answers = self.plan.answers
        if answers is None:
            return f"token {item}"
        self.tokens_given[item] += 1
        given = f"token {item} {self.tokens_given[item]}"
        return [f"{given} {place}" for place in range(answers.tokens(item))] if answers.many else given

    def fetch_token(self, item: int) -> str | list[str]:
        self.refuse([item])
        self.attempt("stage one", [f"item {item}"])
        return self.token(item)

    def fetch_tokens(self, items: list[int]) -> Any:  # noqa: ANN401 - a sequence or a mapping
        assert 1 <= len(items) <= (self.plan.batch_size or 0)
        assert len(set(items)) == len(items), "an item is twice in a batch"
        answers = self.plan.answers
        self.batches.append((self.virtual.now, items))
        self.refuse(items)
        self.attempt("stage one", [f"item {item}" for item in items])
        if answers is None:
            tokens = [f"token {item}" for item in items]
            if not self.plan.miscounted.intersection(items):
                return tokens
            self.blamed[ValueError].update(items)
            return tokens + tokens[:1]
        if not answers.keyed:
            return [self.slot(f"item {item}", answers.slots, partial(self.token, item)) for item in items]
        answered = {}
        for item in self.rng.sample(items, len(items)):
            if answers.is_missing(item):
                continue
            if self.rng.random() < answers.left_out:
                self.pass_on([f"item {item}"])
            else:
                answered[item] = self.slot(f"item {item}", answers.slots, partial(self.token, item))
        return answered

    def result(self, token: str) -> int:
        _, item, *rest = token.split()  # which of the item's tokens it is, and its place if they are many
        answers = self.plan.answers
        if answers is not None and answers.expires(int(item)) and rest[0] == "1" and rest[-1] in "13":
            raise ExpiredError
        if int(item) in self.plan.lasting:
            raise LookupError(item)
        self.answered.add(token)
        return -int(item)

    def fetch_result(self, token: str) -> int:
        self.made[token] += 1
        self.attempt("stage two", [token])
        return self.result(token)

    def fetch_results(self, tokens: list[str]) -> Any:  # noqa: ANN401 - as above
        assert self.plan.answers is not None
        assert 1 <= len(tokens) <= (self.plan.answers.result_batch or 0)
        self.made.update(tokens)
        self.attempt("stage two", tokens)

        def answer(token: str) -> object:
            try:
                return self.result(token)
            except (ExpiredError, LookupError) as error:
                return error

        results = [self.slot(token, self.plan.answers.slots, partial(answer, token)) for token in tokens]
        return dict(zip(tokens, results, strict=True)) if self.plan.answers.keyed else results

    def most_at_once(self, stage: str) -> int:
        """The highest number of attempts that ran at the same time; one that ends makes room at once."""
        changes = []
        for began, ended in self.attempts[stage]:
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


def same(fetch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return fetch


def awaited(fetch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a coroutine function of a plain one."""

    async def call(argument: Any) -> Any:  # noqa: ANN401 - of any stage
        return fetch(argument)

    return call


def run(plan: Plan, watch: Watch) -> Ended:
    """Runs the plan's job."""
    retry = Retrying(
        retry=retry_if_exception(lambda error: getattr(error, "status", None) == 503),
        stop=lambda _: False,
        wait=wait_fixed(WAIT),
    )
    paced = {} if plan.pace is None else plan.pace.stage
    awaits_first, awaits_second = (awaited if one else same for one in plan.awaited)
    first: Any = (
        Stage(awaits_first(watch.fetch_token), workers=plan.workers[0], retry=retry, **paced)
        if plan.batch_size is None
        else Stage(
            awaits_first(watch.fetch_tokens),
            batch_size=plan.batch_size,
            workers=plan.workers[0],
            retry=retry,
            retry_missing=plan.answers is not None and plan.answers.left_out > 0,
            **paced,
        )
    )
    fetch_result = awaits_second(watch.fetch_result)
    second: Any = Stage(fetch_result, workers=plan.workers[1], retry=retry, **paced)
    settings: dict[str, Any] = {
        "window": plan.window,
        "return_exceptions": plan.return_exceptions,
        "timeout": plan.timeout,
        "max_failures": plan.max_failures,
    }
    if plan.answers is not None:
        settings |= {"many": plan.answers.many, "refresh_token_on": ExpiredError}
        if plan.answers.distinct is not None:
            settings["key"] = str
        if plan.answers.result_batch is not None:
            size = plan.answers.result_batch
            second = Stage(
                awaits_second(watch.fetch_results),
                batch_size=size,
                workers=plan.workers[1],
                retry=retry,
                **paced,
            )
    outcomes: list[Outcome[int, str, int]] = []
    try:
        if plan.listed:
            return Ended(results=run_two_stage(watch.source(), first, second, **settings))
        settings |= {"ordered": plan.ordered, "linger": plan.linger}
        with iter_two_stage(watch.source(), first, second, **settings) as stream:
            watch.books, watch.refreshing = books(stream), part(stream, Refreshing)
            for outcome in stream:
                watch.taken += 1
                outcomes.append(outcome)
                if len(outcomes) == plan.leave_after:
                    return Ended(left=True, outcomes=outcomes)
                sleep(plan.consumer_pause)
    except TooManyFailures as error:
        return Ended(error, outcomes=error.outcomes if plan.listed else outcomes)
    except (ApiError, LookupError, ValueError, EOFError, RunTimeout) as error:
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
        check_ended(watch, ended)
        begun = sum(map(len, watch.attempts.values()))
        sleep(1e6)
        assert sum(map(len, watch.attempts.values())) == begun, "an attempt begins after the end"


def check_ended(watch: Watch, ended: Ended) -> None:
    """Holds a job that has ended against its plan."""
    plan = watch.plan
    assert watch.source_closed or watch.read == 0
    assert plan.listed or watch.most_read <= plan.window
    for stage, limit in zip(("stage one", "stage two"), plan.workers, strict=True):
        assert watch.most_at_once(stage) <= limit
    _check_end(watch, ended)
    _check_failures(plan, ended)
    _check_part_full(watch)
    over = ended.error is None and not ended.left
    if plan.listed:
        assert len(ended.results) == (plan.items if over else 0)
        for index, result in enumerate(ended.results):
            _check_outcome(watch, index, result, result if isinstance(result, Exception) else None)
    if over and watch.books is not None:  # nothing is left in them but outcomes that are on their way
        left = watch.books.in_progress - (watch.books.reading.number - watch.books.handing.taken)
        # A token that was dropped may still run when all is done, and then fail unheard.
        assert left == 0 or (left > 0 and plan.answers is not None and plan.answers.many)
        assert watch.books.handing.surplus_tokens == sum(watch.books.handing._surplus.values())
        assert watch.refreshing is None or not watch.refreshing._times
    indices = [outcome.index for outcome in ended.outcomes]
    assert len(set(indices)) == len(indices), "an item gave two outcomes"
    assert len(indices) == plan.items or plan.listed or not over, "an item gave no outcome"
    if plan.ordered or plan.listed:
        assert indices == sorted(indices)
        # What is done before a failure is handed over, with gaps; a consumer may leave between them.
        assert plan.may_end_early or indices == list(range(len(indices)))
    for outcome in ended.outcomes:
        assert outcome.item == plan.item_at(outcome.index)
        failed = outcome.exception is not None
        _check_outcome(watch, outcome.index, None if failed else outcome.result, outcome.exception)
        tokens: Any = outcome.token
        made = sum(watch.made[token] for token in (tokens if isinstance(tokens, list) else [tokens]))
        assert made == outcome.result_attempts


def _check_end(watch: Watch, ended: Ended) -> None:
    plan, error, answers = watch.plan, ended.error, watch.plan.answers
    late = plan.timeout is not None and any(due >= plan.timeout for due in watch.due.values())
    if isinstance(error, TooManyFailures):
        assert plan.max_failures is not None
    elif isinstance(error, RunTimeout):
        _check_timeout(watch, ended)
    elif isinstance(error, EOFError):
        assert plan.source_fails_at is not None
    elif isinstance(error, MissingToken):
        assert answers is not None
        assert any(map(answers.is_missing, range(plan.items))) or (late and answers.left_out)
        assert not plan.return_exceptions
    elif isinstance(error, ApiError):
        assert error.status == (400 if watch.blamed[ApiError] and error.status == 400 else 503)
        assert error.status == 400 or late
        assert not plan.return_exceptions
    elif isinstance(error, LookupError):
        assert plan.lasting
        assert not plan.return_exceptions
    elif isinstance(error, ValueError):
        assert plan.miscounted
        assert not plan.return_exceptions
    elif not ended.left:
        assert plan.source_fails_at is None or plan.source_fails_at >= plan.items
        assert plan.return_exceptions or not (plan.miscounted and plan.batch_size)
        assert plan.return_exceptions or answers is not None or not plan.lasting


def _check_timeout(watch: Watch, ended: Ended) -> None:
    """Checks that a job had to end with its timeout."""
    plan = watch.plan
    assert plan.timeout is not None
    assert watch.timed_out
    if plan.return_exceptions:  # the source was not at its end, and what had been read is handed over
        assert not plan.listed
        assert watch.exhausted is None or (plan.linger is not None and watch.exhausted > plan.timeout)
        came = sum(time <= plan.timeout for time in watch.arrived)
        on_its_way = 0 if plan.linger is None else 1  # to a thread that is not waited for
        assert max(came, watch.read - on_its_way) <= len(ended.outcomes) <= watch.read
    elif plan.answers is None:
        done = len(watch.answered)
        assert done < plan.items if plan.listed else done < watch.read or watch.exhausted is None


def _failures(outcome: Outcome[int, str, Any]) -> list[Exception]:
    if outcome.exception is not None:
        return [outcome.exception]
    result = outcome.result
    return [one for one in result if isinstance(one, Exception)] if isinstance(result, list) else []


def _check_failures(plan: Plan, ended: Ended) -> None:
    """Checks that a job ends with too many failures when there are too many, and else does not."""
    if plan.max_failures is None:
        return
    ends = isinstance(ended.error, TooManyFailures)
    outcomes = [*ended.outcomes, *map(_as_outcome, ended.results)]
    failures = [_failures(outcome) for outcome in outcomes]
    failed = [bool(one) for one in failures]
    if plan.max_failures >= 1:
        passed_at = [at for at in range(len(failed)) if sum(failed[: at + 1]) > plan.max_failures]
    else:
        recent = {at: failed[max(0, at - 99) : at + 1] for at in range(19, len(failed))}
        passed_at = [at for at, last in recent.items() if sum(last) > plan.max_failures * len(last)]
    in_turn = not (plan.listed or plan.ordered)  # as they were done
    if in_turn or plan.max_failures >= 1:
        assert not ends or passed_at
        assert ends or not passed_at or ended.left or ended.error is not None
    if ends:
        assert ended.error is not None
        last = max(at for at in range(passed_at[0] + 1) if failed[at]) if in_turn else None
        causes = failures[last] if last is not None else [one for some in failures for one in some]
        assert any(ended.error.__cause__ is one for one in causes)


def _as_outcome(result: Any) -> Outcome[int, str, Any]:  # noqa: ANN401 - of a list
    outcome = Outcome[int, str, Any](0, 0)
    outcome.result = result if not isinstance(result, Exception) else None
    outcome.exception = result if isinstance(result, Exception) else None
    return outcome


def _check_part_full(watch: Watch) -> None:
    """Checks that a batch leaves part-full only when its first item has waited, or there are no others."""
    plan = watch.plan
    disturbed = (
        plan.fail or plan.answers or plan.pace or plan.window < 10_000 or plan.source_fails_at is not None
    )
    if plan.linger is None or disturbed:
        return
    for began, items in watch.batches:
        if len(items) < (plan.batch_size or 1) and not (
            watch.exhausted is not None and watch.exhausted <= began
        ):
            assert began >= watch.arrived[items[0]] + plan.linger, "a batch leaves too early"


def _check_outcome(watch: Watch, index: int, result: Any, exception: BaseException | None) -> None:  # noqa: ANN401
    plan = watch.plan
    item = plan.item_at(index)
    if plan.timeout is not None and _is_late(watch, item, exception):
        return
    size, answers = plan.batch_size, plan.answers
    batch = range(item, item + 1) if size is None else range(item - item % size, item - item % size + size)
    if size is not None and (
        plan.miscounted.intersection(batch) if plan.linger is None else item in watch.blamed[ValueError]
    ):
        assert isinstance(exception, ValueError)
    elif answers is not None and answers.is_refused(item):
        assert isinstance(exception, ApiError)
        assert exception.status == 400
    elif answers is not None and answers.is_missing(item):
        assert isinstance(exception, MissingToken)
    elif answers is not None and answers.many:
        assert exception is None
        assert isinstance(result, list)
        assert len(result) == answers.tokens(item)
        for one in result:
            assert (
                plan.timeout is not None and isinstance(one, Exception) and _is_late(watch, item, one)
            ) or (isinstance(one, LookupError) if item in plan.lasting else one == -item)
    elif item in plan.lasting:
        assert isinstance(exception, LookupError)
    else:
        assert exception is None
        assert result == -item


def _is_late(watch: Watch, item: int, exception: BaseException | None) -> bool:
    """Whether an item, or one of its tokens, failed because the time was over, or would soon be."""
    answers = watch.plan.answers
    if isinstance(exception, RunTimeout):
        assert watch.timed_out
        if watch.plan.asks_once and not (
            answers and answers.many
        ):  # it has no result, and no failure of its own that was too late to be tried again
            assert not any(token.split()[1] == str(item) for token in watch.answered)
            assert not watch.too_late(item)
        return True
    if isinstance(exception, ApiError) and exception.status == 400:
        assert item in watch.blamed[ApiError]
        return watch.timed_out  # its batch waited for another one's halves
    left_out = answers is not None and answers.left_out and isinstance(exception, MissingToken)
    if left_out or isinstance(exception, ApiError):
        assert watch.too_late(item) or not watch.plan.asks_once
        return True
    return False
