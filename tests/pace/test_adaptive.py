"""A limit that is found out: it follows what the API takes at once, and stays between 1 and `workers`."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest
from fakes import Fake, Made, outcomes_of, stage
from forms import each_way
from pacing import AnsweredError, answered_between, asking, failing, most_at_once, starts

from twostage import run_two_stage
from twostage.failing.transient import GATEWAY_TIMEOUT
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import Callable

    from forms import Run

ROUND_TRIP: Final = 0.1


class Limited(Fake):
    """An API that refuses at once what is above a limit, which may change with the time."""

    def __init__(
        self,
        virtual: VirtualTime,
        limit: Callable[[float], float],
        latency: tuple[float, float] = (ROUND_TRIP, ROUND_TRIP),
        refusal: Callable[[], Exception] = lambda: AnsweredError(429),
    ) -> None:
        super().__init__(lambda argument: argument, virtual=virtual)
        self.limit = limit
        self.span = latency
        self.refusal = refusal
        self.rng = random.Random(1)
        self.running: list[Made] = []

    def __call__(self, argument: Any) -> Any:  # noqa: ANN401 - items and tokens of any kind
        now = self._now()
        self.running = [made for made in self.running if made.ended > now]
        made = Made(argument, now, now)
        self.calls.append(made)
        if len(self.running) >= self.limit(now):
            raise self.refusal()
        sleep(self.rng.uniform(*self.span))
        made.ended = self._now()
        made.failed = False
        self.running.append(made)
        return argument

    @property
    def refused(self) -> int:
        return sum(made.failed for made in self.calls)


def job(
    limit: float,
    items: int,
    latency: tuple[float, float],
    **settings: Any,  # noqa: ANN401 - a stage's
) -> tuple[float, Limited]:
    """Returns how long a job takes whose stage two is limited, and its API."""
    with VirtualTime() as virtual:
        api = Limited(virtual, lambda _: limit, latency)
        run_two_stage(range(items), stage(list, batch_size=100), stage(api, **settings))
        return virtual.now, api


# --- the figures


@pytest.mark.parametrize("limit", [8, 16, 64, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("latency", [(0.1, 0.1), (0.05, 0.15)], ids=["constant", "varied"])
def test_limit_is_found_with_little_loss(limit: int, latency: tuple[float, float]) -> None:
    items = limit * 150
    fixed, known = job(limit, items, latency, workers=limit)
    found, api = job(limit, items, latency, workers=2 * limit, adaptive=True)
    share = api.refused / len(api.calls)
    print(f"limit {limit}, {latency}: {fixed / found:.3f} of the throughput, {share:.2%} throttled")
    assert known.refused == 0
    assert fixed / found >= 0.90
    assert share < (0.15 if limit == 8 else 0.05)


@pytest.mark.parametrize("limit", [16, 64, 200])
def test_limit_that_halves_and_doubles_is_followed_within_20_round_trips(
    virtual: VirtualTime, limit: int
) -> None:
    since, until = 4.0, 8.0
    api = Limited(virtual, lambda now: limit / 2 if since <= now < until else limit)
    items = int(limit * (until + 2) / ROUND_TRIP)
    run_two_stage(range(items), stage(list, batch_size=100), stage(api, workers=2 * limit, adaptive=True))
    for begins, possible in ((since, limit / 2), (until, limit)):
        after = begins + 20 * ROUND_TRIP
        followed = answered_between(api, after, after + 5 * ROUND_TRIP) / (5 * possible)
        print(f"limit {limit}, from {begins} s on {possible:g}: {followed:.3f} after 20 round trips")
        assert followed >= 0.95


# --- its bounds


@pytest.mark.parametrize(("workers", "first"), [(1, 1), (3, 3), (8, 8), (64, 8)])
def test_begins_at_8_or_at_workers(virtual: VirtualTime, workers: int, first: int) -> None:
    results = Fake(int, 1, virtual=virtual)
    run_two_stage(range(100), int, stage(results, workers=workers, adaptive=True))
    assert len(starts(results, until=1)) == first


@pytest.mark.parametrize("workers", [1, 8, 20, 64])
def test_grows_up_to_workers_and_no_further(virtual: VirtualTime, workers: int) -> None:
    results = Fake(int, 1, virtual=virtual)
    run_two_stage(range(3000), int, stage(results, workers=workers, adaptive=True))
    assert most_at_once(results.calls) == workers
    assert most_at_once(results.calls[-2 * workers :]) == workers


def test_does_not_grow_where_it_holds_nothing_back(virtual: VirtualTime) -> None:
    def source() -> Any:  # noqa: ANN401 - a generator
        for item in range(300):
            sleep(1 if item < 200 else 0)
            yield item

    results = Fake(int, 4, virtual=virtual)  # of which four run at once, until the source is faster
    run_two_stage(source(), int, stage(results, workers=64, adaptive=True))
    since = max(made.began for made in results.calls if made.argument <= 200)
    assert len(starts(results, since, since + 4)) <= 8


@pytest.mark.parametrize("taken", [1, 2])
def test_comes_down_to_what_little_an_api_takes(virtual: VirtualTime, taken: int) -> None:
    api = Limited(virtual, lambda _: taken)
    run_two_stage(range(300), int, stage(api, workers=64, adaptive=True))
    print(f"limit {taken}: {api.refused / len(api.calls):.1%} throttled, {virtual.now:.1f} s")
    assert api.refused < 0.4 * len(api.calls)
    assert virtual.now < 1.1 * 300 * ROUND_TRIP / taken


@pytest.mark.parametrize(("limit", "fall"), [(64, 8), (200, 10), (64, 1)])
def test_follows_a_limit_that_falls_far_at_once(virtual: VirtualTime, limit: int, fall: int) -> None:
    since = 4.0
    api = Limited(virtual, lambda now: fall if now >= since else limit)
    run_two_stage(
        range(int(limit * since / ROUND_TRIP) + 100 * fall),
        stage(list, batch_size=100),
        stage(api, workers=2 * limit, adaptive=True),
    )
    refused = sum(made.failed for made in api.calls if since <= made.began < since + 1)
    print(f"from {limit} to {fall}: {refused} throttled in a second")
    assert refused < 2 * limit
    assert answered_between(api, since + 0.5, since + 2.5) >= 0.95 * 20 * fall


def test_one_worker_goes_on_whatever_is_refused(virtual: VirtualTime) -> None:
    api = SimulatedApi(int, latency=1, fail=0.2)
    results = Fake(failing({item: [AnsweredError(429)] for item in range(0, 100, 3)}, api), virtual=virtual)
    assert run_two_stage(range(100), int, stage(results, workers=1, adaptive=True)) == list(range(100))
    assert api.most_at_once == 1


# --- what it comes down for


def late(error: Callable[[], Exception]) -> Callable[[int, VirtualTime], int]:
    """Makes an API that takes 1 s, but fails after 5 s above 10 calls at once."""
    ends: list[float] = []

    def answer(item: int, virtual: VirtualTime) -> int:
        now = virtual.now
        ends[:] = [end for end in ends if end > now]
        slow = len(ends) >= 10
        ends.append(now + (5 if slow else 1))
        sleep(5 if slow else 1)
        if slow:
            raise error()
        return item

    return answer


def timeout_of_a_client() -> Exception:
    error = Exception("a client's own")
    error.__cause__ = TimeoutError()
    return error


@pytest.mark.parametrize(
    "error",
    [TimeoutError, timeout_of_a_client, lambda: ApiError(GATEWAY_TIMEOUT)],
    ids=["built-in", "a client's", "504"],
)
def test_comes_down_when_the_api_times_out(virtual: VirtualTime, error: Callable[[], Exception]) -> None:
    answer = late(error)
    results = Fake(lambda item: answer(item, virtual), virtual=virtual)
    assert run_two_stage(range(1000), int, stage(results, workers=64, adaptive=True)) == list(range(1000))
    failed = Counter(made.failed for made in results.calls)[True]
    print(f"{failed} of {len(results.calls)} timed out, {virtual.now:.0f} s")
    assert failed <= 0.35 * len(results.calls)  # with a limit of 64 it is 0.8
    assert virtual.now <= 3 * 1000 / 10


def test_comes_down_when_attempts_take_too_long(virtual: VirtualTime) -> None:
    def answer(item: int) -> int:
        now = virtual.now
        ends[:] = [end for end in ends if end > now]
        ends.append(now + (20 if len(ends) >= 10 else 1))
        sleep(ends[-1] - now)
        return item

    ends: list[float] = []
    results = stage(answer, workers=64, adaptive=True, attempt_timeout=3.0)
    assert run_two_stage(range(1000), int, results) == list(range(1000))
    print(f"{virtual.now:.0f} s with attempts that are given up, and run on")
    assert virtual.now <= 1500  # with a limit of 64 it is 2100, and half of the items are lost


@pytest.mark.parametrize("error", [ApiError(500), ConnectionResetError(), ApiError(503)], ids=repr)
def test_other_failures_leave_it(virtual: VirtualTime, error: Exception) -> None:
    results = Fake(failing({item: [error] for item in range(0, 2000, 20)}), 1, virtual=virtual)
    run_two_stage(range(2000), int, stage(results, workers=32, adaptive=True))
    assert most_at_once(results.calls[-200:]) == 32


def test_slots_that_are_throttled_bring_it_down(virtual: VirtualTime) -> None:
    running: list[float] = []

    def answer(batch: list[int]) -> list[int | Exception]:
        now = virtual.now
        running[:] = [end for end in running if end > now]
        full = len(running) >= 5
        running.append(now + 1)
        sleep(1)
        return [AnsweredError(429) if full and at else item for at, item in enumerate(batch)]

    results = Fake(answer, virtual=virtual)
    answered = run_two_stage(
        range(3000), stage(list, batch_size=100), stage(results, batch_size=5, workers=40, adaptive=True)
    )
    assert answered == list(range(3000))
    print(f"{len(results.calls)} calls, {virtual.now:.0f} s")
    assert virtual.now <= 1.4 * 600 / 5


# --- beside a pause, an outage, a rate


def test_pause_holds_and_what_was_found_is_kept(virtual: VirtualTime) -> None:
    asked: list[float] = []

    def refusal() -> Exception:
        if api._now() > 5 and not asked:
            asked.append(api._now())
            return asking(30)
        return AnsweredError(429)

    api = Limited(virtual, lambda _: 16, refusal=refusal)
    run_two_stage(range(4000), int, stage(api, workers=64, adaptive=True))
    assert starts(api, asked[0] + 1e-6, asked[0] + 30) == []
    after = [made for made in api.calls if made.began >= asked[0] + 30]
    assert most_at_once(after[:5]) <= 8  # half of what was found
    assert most_at_once(after) >= 16


@each_way
@pytest.mark.parametrize("seed", range(3))
def test_requests_a_second_that_an_api_takes(job: Run, seed: int) -> None:
    """It has no limit of calls at once, which is what is looked for, but answers 429 without a wait."""
    with VirtualTime(seed=seed) as virtual:
        tokens_left, last, refused = 20.0, 0.0, 0

        def fetch_result(item: int) -> int:
            nonlocal tokens_left, last, refused
            tokens_left = min(20.0, tokens_left + 50 * (virtual.now - last))
            last = virtual.now
            if tokens_left < 1:
                refused += 1
                raise AnsweredError(429)
            tokens_left -= 1
            sleep(0.1)
            return item

        assert job(range(3000), int, stage(fetch_result, workers=64, adaptive=True)) == list(range(3000))
        share = refused / (3000 + refused)
        print(f"50 a second: {3000 / virtual.now:.1f} a second, {share:.1%} throttled")
        assert 3000 / virtual.now >= 40
        assert share < 0.25


def test_attempts_of_items_that_were_throttled_are_told(virtual: VirtualTime) -> None:
    api = Limited(virtual, lambda _: 10)
    outcomes = outcomes_of(range(1000), int, stage(api, workers=64, adaptive=True))
    assert sum(outcome.result_attempts for outcome in outcomes) == len(api.calls)
    assert all(outcome.exception is None for outcome in outcomes)
