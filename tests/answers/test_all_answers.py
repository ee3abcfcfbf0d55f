"""All that real APIs answer, at once and over real sockets: each item one outcome, and no call too many.

Every fault but `errors` is a function of the seed and of how often an id or a token was asked for, so what
one of them needs is known. The server counts what requests ask for if no error has befallen them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
from common import PATIENCE
from tenacity import wait_random

from twostage import MissingToken, Stage, iter_two_stage, run_two_stage
from twostage.demo.answers import ApiError, ExpiredToken, orders_of, result_of, token_of
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import Client
from twostage.demo.ways import PATIENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twostage import Outcome
    from twostage.demo.answers import Faults, Item

FAULTS: Final = {
    "errors": 0.02,
    "missing": 0.01,
    "denied": 0.01,
    "refused": 0.01,
    "slots": 0.04,
    "unprocessed": 0.04,
    "expired": 0.04,
    "pending": 0.1,
}
SEED: Final = 9  # nobody is put off so often that a policy of twenty attempts could give up
BATCH_SIZE: Final = 40  # of both stages
MOST_IDS: Final = 25  # that the API takes, so that each stage learns to ask for 20
LEARNED: Final = 20
TOKEN_WORKERS: Final = 4
RESULT_WORKERS: Final = 3
HELD_BACK: Final = 300  # tokens are there before stage two goes on, so that more than MOST_IDS wait
SPLITS: Final = math.ceil(math.log2(BATCH_SIZE))  # until an item of a batch stands alone
MOST_ANSWERS: Final = 20  # that PATIENT has for what is always left out

NUMBER: Final = 1000
DISTINCT: Final = 750
IDS: Final[Sequence[Item]] = [f"id {number}" if number % 2 else number for number in range(DISTINCT)]
FAR_APART: Final = [IDS[place % DISTINCT] for place in range(NUMBER)]
# The stream asks for equal items once if both are in its window: these are even read at once.
CLOSE: Final = [IDS[place // BATCH_SIZE * 30 + place % BATCH_SIZE % 30] for place in range(NUMBER)]

POLICY: Final = PATIENT.copy(wait=wait_random(0, 0.004))


class Recorder:
    """A client's call that keeps what it was called with."""

    def __init__(self, fetch: Callable[[Any], dict[Any, Any]]) -> None:
        self.fetch = fetch
        self.calls: list[list[Any]] = []  # an append needs no lock

    def __call__(self, asked: list[Any]) -> dict[Any, Any]:
        self.calls.append(list(asked))
        return self.fetch(asked)

    def begun_too_large(self) -> list[int]:
        """Returns which calls were too large, those left out that repeat one."""
        seen: set[Any] = set()
        found = []
        for place, asked in enumerate(self.calls):
            if len(asked) > LEARNED and not seen.issuperset(asked):
                found.append(place)
            seen.update(asked)
        return found


class Setting(NamedTuple):
    """An API, and how it is asked."""

    api: EmbeddedApi
    kind: str
    tokens: Recorder
    results: Recorder
    stages: tuple[Stage[Item, Any], Stage[str, Any]]

    def job(self) -> dict[str, Any]:
        return {
            "retry": POLICY,
            "refresh_token_on": ExpiredToken,
            "key": lambda item: item,
            "return_exceptions": True,
        }


@contextmanager
def served(*, many: bool) -> Iterator[Setting]:
    with (
        EmbeddedApi(
            token_latency=0.002, result_latency=0.002, faults=FAULTS, most_ids=MOST_IDS, seed=SEED
        ) as api,
        Client(api.url) as client,
    ):
        enough = threading.Event()
        given: set[str] = set()

        def fetch_tokens(items: list[Item]) -> dict[Any, Any]:
            answer = client.fetch_keyed_orders(items) if many else client.fetch_keyed_tokens(items)
            for found in answer.values():
                if not isinstance(found, ApiError):
                    given.update(found if many else [found])
            if len(given) >= HELD_BACK:
                enough.set()
            return answer

        def fetch_results(tokens: list[str]) -> dict[Any, Any]:
            assert enough.wait(PATIENCE)
            return client.fetch_results(tokens)

        first, second = Recorder(fetch_tokens), Recorder(fetch_results)
        options: dict[str, Any] = {"batch_size": BATCH_SIZE, "retry_missing": True}
        of_items: dict[str, Any] = options | {"workers": TOKEN_WORKERS, "many": many}
        yield Setting(
            api,
            "orders" if many else "tokens",
            first,
            second,
            (
                Stage(first, **of_items),
                Stage(second, workers=RESULT_WORKERS, **options),
            ),
        )


# --- what is right


def tokens_of(item: Item, generation: int, *, many: bool) -> list[str]:
    return orders_of(item, generation) if many else [token_of(item, generation)]


def last_generation(faults: Faults, item: Item, *, many: bool) -> int:
    """Returns 1 for an item that goes back to stage one, else 0."""
    if faults.lasting_status(item) is not None:
        return 0
    return int(any(map(faults.is_expired, tokens_of(item, 0, many=many))))


def right_tokens(faults: Faults, item: Item, *, many: bool) -> list[str]:
    """Returns the tokens that the item's results come from; none if it has no results."""
    if faults.lasting_status(item) is not None:
        return []
    return tokens_of(item, last_generation(faults, item, many=many), many=many)


def assert_right(faults: Faults, item: Item, found: object, *, many: bool) -> None:
    status = faults.lasting_status(item)
    if status is None:
        results = list(map(result_of, right_tokens(faults, item, many=many)))
        assert found == (results if many else results[0])
    elif status == 404:
        assert type(found) is MissingToken
    else:
        assert type(found) is ApiError
        assert found.status == status


# --- what is enough


def answers_needed(faults: Faults, subject: Item, times: int = 1, *, slots: bool = True) -> int:
    """Returns how many answers it takes until an id or token has not been put off, so many times.

    Put off is who is left out, or else has a 503 in its slot, where nothing else stands there.
    """
    asked = in_slots = there = 0
    while there < times:
        asked += 1
        if faults.hits("unprocessed", subject, asked):
            continue
        in_slots += 1
        if not (slots and faults.hits("slots", subject, in_slots)):
            there += 1
    return asked


def assert_ids_asked_no_more_than_needed(api: EmbeddedApi, *, many: bool) -> None:
    """Holds against the rules how often each id was in a request that had no error.

    A request that is answered draws for each id: to be left out, to be a 503. `answers_needed` is what
    an id needs, and each refresh needs it again. One that does not exist is left out until the policy gives
    up. The other requests were refused: for their size, or for a refused id among them. A refused call goes
    on in halves, and what an answer leaves over is a part of an accepted call, so that is never refused. So
    an id sees at most as many refusals as a batch can be halved; a refused one that of itself alone as well;
    and one that is refreshed is in a new batch, that can be halved as often.
    """
    faults = api.faults
    for item in IDS:
        asked = api.answers.ids[item]
        status = faults.lasting_status(item)
        if status == 400:
            assert 1 <= asked <= SPLITS + 1, item
        elif status == 404:
            assert 1 <= asked <= MOST_ANSWERS + SPLITS, item
        else:
            times = 1 + last_generation(faults, item, many=many)
            needed = answers_needed(faults, item, times, slots=status is None)
            assert needed <= asked <= needed + times * SPLITS, item
    assert set(api.answers.ids) == set(IDS)


def assert_tokens_asked_no_more_than_needed(api: EmbeddedApi, *, many: bool) -> None:
    """Holds against the rules how often each token was in a request that had no error.

    As with ids; a token that is there may be pending for a request or two. An expired one is asked for once
    it is there and never again: the item's next token is another one. None is refused, and of 40 a half is
    not too large, so that a token sees one refusal at most. A token of many whose item began again may have
    been dropped at any time.
    """
    faults, counts = api.faults, api.answers.tokens
    allowed: set[str] = set()
    for item in IDS:
        if faults.lasting_status(item) is not None:
            continue
        last = last_generation(faults, item, many=many)
        for generation in range(last + 1):
            for token in tokens_of(item, generation, many=many):
                allowed.add(token)
                times = 1 if faults.is_expired(token) else 1 + faults.times_pending(token)
                needed = answers_needed(faults, token, times)
                dropped = many and generation < last
                assert (0 if dropped else needed) <= counts[token] <= needed + 1, token
    assert set(counts) <= allowed


def assert_all_that_was_ordered_has_come(setting: Setting, *, many: bool) -> None:
    statuses = Counter(map(setting.api.faults.lasting_status, IDS))
    assert min(statuses[status] for status in (400, 403, 404)) > 5
    assert sum(last_generation(setting.api.faults, item, many=many) for item in IDS) > 15
    assert all(setting.api.answered[status] > 0 for status in (0, 200, 400, 413, 429, 503))


def assert_calls_no_more_than_the_rules_allow(setting: Setting, *, many: bool) -> None:
    api, kind = setting.api, setting.kind
    assert_ids_asked_no_more_than_needed(api, many=many)
    assert_tokens_asked_no_more_than_needed(api, many=many)
    # Each request is one call of ours, and one is refused only for a refused id that it asks for.
    assert api.attempts == Counter({kind: len(setting.tokens.calls), "results": len(setting.results.calls)})
    refused = sum(api.faults.lasting_status(item) == 400 for item in IDS)
    assert refused <= api.answered[400] <= refused * (SPLITS + 1)
    for calls in (setting.tokens, setting.results):
        too_large = calls.begun_too_large()
        assert len(too_large) >= 1
        assert too_large[-1] < len(calls.calls) / 2
    assert api.most_at_once[kind] <= TOKEN_WORKERS
    assert api.most_at_once["results"] <= RESULT_WORKERS


# --- the jobs


def listed(setting: Setting, items: Sequence[Item], *, many: bool) -> list[Any]:
    return run_two_stage(items, *setting.stages, **setting.job())


def streamed(setting: Setting, items: Sequence[Item], *, many: bool, ordered: bool = False) -> list[Any]:
    outcomes: dict[int, Outcome[Item, Any, Any]] = {}
    with iter_two_stage(items, *setting.stages, ordered=ordered, **setting.job()) as job:
        for outcome in job:
            assert outcome.index not in outcomes
            outcomes[outcome.index] = outcome
    if ordered:
        assert list(outcomes) == list(range(len(items)))
    assert sorted(outcomes) == list(range(len(items)))
    for outcome in outcomes.values():
        assert outcome.item == items[outcome.index]
        if outcome.exception is None:
            tokens = right_tokens(setting.api.faults, outcome.item, many=many)
            assert outcome.token == (tokens if many else tokens[0])
        else:
            assert outcome.token is None
    return [
        outcome.result if outcome.exception is None else outcome.exception
        for _, outcome in sorted(outcomes.items())
    ]


def streamed_in_order(setting: Setting, items: Sequence[Item], *, many: bool) -> list[Any]:
    return streamed(setting, items, many=many, ordered=True)


FORMS: Final = [
    pytest.param(listed, FAR_APART, id="list"),
    pytest.param(streamed, CLOSE, id="stream"),
    pytest.param(streamed_in_order, CLOSE, id="stream in order"),
]


def assert_job_is_right(form: Callable[..., list[Any]], items: Sequence[Item], *, many: bool) -> None:
    with served(many=many) as setting:
        found = form(setting, items, many=many)
        assert len(found) == NUMBER
        shared: dict[Item, object] = {}
        for item, one in zip(items, found, strict=True):
            assert_right(setting.api.faults, item, one, many=many)
            assert shared.setdefault(item, one) is one
        assert_all_that_was_ordered_has_come(setting, many=many)
        assert_calls_no_more_than_the_rules_allow(setting, many=many)


@pytest.mark.parametrize(
    ("form", "items"),
    [FORMS[0], *(pytest.param(*one.values, id=one.id, marks=pytest.mark.slow) for one in FORMS[1:])],
)
def test_job_with_one_token_an_item(form: Callable[..., list[Any]], items: Sequence[Item]) -> None:
    assert_job_is_right(form, items, many=False)


@pytest.mark.parametrize(("form", "items"), FORMS)
def test_job_with_many_tokens_an_item(form: Callable[..., list[Any]], items: Sequence[Item]) -> None:
    assert_job_is_right(form, items, many=True)
