"""The scenarios: what the calls of each job take and how often they fail, the same for every peer."""

from __future__ import annotations

import asyncio
import operator
import random
import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Function = Callable[[Any], Any]
    Latency = Callable[[int], float]  # seconds, by the first item of a call

BACK_OFF = 1.0
PATIENT = Retrying(
    retry=retry_if_exception_type(ConnectionError), wait=wait_fixed(BACK_OFF), stop=stop_after_attempt(10)
)
PAUSE = 0.150
RESULTS_A_PAUSE = 900


def nothing(call: Any) -> Any:  # noqa: ANN401 - whatever a call takes
    return call


class Job(NamedTuple):
    """A scenario, and what a peer gets of it.

    `fetch_tokens` takes one of `calls`, a batch (of one item, if the job has none), and returns a token
    for each item in it; `fetch_result` returns a token's negative. With a bound no more items than that
    are to be in progress, those counted whose result is not taken; it may be passed by one batch.
    """

    what: str
    size: int
    batch_size: int | None
    token_workers: int
    result_workers: int
    token_latency: Latency | None = None
    result_latency: Latency | None = None
    fail: float = 0
    pauses: bool = False  # of the consumer
    streams: bool = False  # memory counts too
    calls: Iterable[Any] = ()
    fetch_tokens: Function = nothing
    fetch_result: Function = operator.neg

    @property
    def running(self) -> int:
        """How many items there are with the workers, if all are busy."""
        return self.token_workers * (self.batch_size or 1) + self.result_workers

    @property
    def bound(self) -> int:
        """Twostage's own; 0 is none."""
        return 2 * self.running if self.pauses or self.streams else 0

    @property
    def queues(self) -> tuple[int, int, int]:
        """How many calls, tokens and results may wait, for peers that bound nothing but their queues."""
        return (1, self.batch_size or 1, self.bound - self.running) if self.bound else (0, 0, 0)

    def ready(self, *, coroutines: bool = False) -> Job:
        """Returns the job as it is to be run, with functions that count failures down: for one run."""
        if self.token_latency is None or self.result_latency is None:
            functions = (
                [immediate(nothing), immediate(operator.neg)] if coroutines else [nothing, operator.neg]
            )
        else:
            functions = [
                api(self.token_latency, self.failures(1), nothing, coroutines=coroutines),
                api(self.result_latency, self.failures(2), operator.neg, coroutines=coroutines),
            ]
        return self._replace(calls=self.batches(), fetch_tokens=functions[0], fetch_result=functions[1])

    def batches(self) -> Iterator[Any]:
        items = iter(range(self.size))
        return iter(lambda: list(islice(items, self.batch_size)), []) if self.batch_size else zip(items)

    def failures(self, stage: int) -> Counter[int]:
        """Draws how often the call whose first item it is fails before it succeeds."""
        chance = random.Random(stage)
        drawn: Counter[int] = Counter()
        for item in range(self.size if self.fail else 0):
            while chance.random() < self.fail:
                drawn[item] += 1
        return drawn

    def ideal(self) -> float | None:
        """Returns the seconds below which no schedule can come."""
        if self.token_latency is None or self.result_latency is None:
            return None
        failures, more_failures = self.failures(1), self.failures(2)
        results = [self.result_latency(item) * (1 + more_failures[item]) for item in range(self.size)]
        batches, longest = [], 0.0  # an item's two calls come one after the other
        for batch in self.batches():
            batches.append(self.token_latency(batch[0]) * (1 + failures[batch[0]]))
            waits = failures[batch[0]] + max(more_failures[item] for item in batch)
            longest = max(longest, batches[-1] + BACK_OFF * waits)
        return max(
            sum(batches) / self.token_workers + min(results),
            sum(results) / self.result_workers + min(batches),
            longest,
            self.size // RESULTS_A_PAUSE * PAUSE if self.pauses else 0,
        )


def api(latency: Latency, failures: Counter[int], answer: Function, *, coroutines: bool) -> Function:
    def fetch(call: Any) -> Any:  # noqa: ANN401 - an item or a batch
        first = call if isinstance(call, int) else call[0]
        time.sleep(latency(first))
        return ended(first, call)

    async def fetch_coroutine(call: Any) -> Any:  # noqa: ANN401 - an item or a batch
        first = call if isinstance(call, int) else call[0]
        await asyncio.sleep(latency(first))
        return ended(first, call)

    def ended(first: int, call: object) -> object:
        if failures[first]:
            failures[first] -= 1
            raise ConnectionError
        return answer(call)

    return fetch_coroutine if coroutines else fetch


def immediate(answer: Function) -> Function:
    async def fetch(call: object) -> object:
        return answer(call)

    return fetch


def always(seconds: float) -> Latency:
    return lambda _: seconds


def drawn(calls: int, longest: float, seed: int) -> Latency:
    chance = random.Random(seed)
    return [chance.uniform(0, longest) for _ in range(calls)].__getitem__


def straggling(first: int) -> float:
    return 1.0 if first == 1000 else 0.050


IN_BATCHES = Job("batched", 10_000, 100, 4, 64, always(0.050), always(0.010))
SCENARIOS = {
    "origin": Job("origin's job", 1000, None, 10, 5, drawn(1000, 0.010, 1), drawn(1000, 0.005, 2)),
    "batched": IN_BATCHES,
    "straggler": IN_BATCHES._replace(what="a straggler", token_latency=straggling),
    "failures": IN_BATCHES._replace(what="5 % failures", size=4000, fail=0.05),
    "pauses": IN_BATCHES._replace(what="pauses", pauses=True),
    "thousand": Job("1,000 at once", 20_000, 100, 10, 1000, always(0.050), always(0.100)),
    "no-op": Job("no-op", 50_000, None, 10, 5),
    "no-op-batched": Job("no-op, batched", 50_000, 100, 10, 5),
    "stream": Job("1,000,000 streamed", 1_000_000, 100, 10, 5, streams=True),
}
