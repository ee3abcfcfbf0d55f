"""All faults of the embedded API at once, over real sockets: each item one outcome, and a right one.

Answers are lost though calls were carried out, requests hang until the client gives up, and for a while
nothing is answered at all; the faults of ids, tokens and slots go on meanwhile. Which of them befalls what is
known, and the server counts what it has carried out.
"""

from __future__ import annotations

import http.client
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest
from tenacity import wait_random

from twostage import MissingToken, Stage, iter_two_stage, run_two_stage
from twostage.demo import answers
from twostage.demo.answers import ApiError, ExpiredToken, Faults, orders_of, result_of, token_of
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import Client
from twostage.demo.ways import PATIENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostage.demo.answers import Item

FAULTS: Final = {
    "errors": 0.02,
    "missing": 0.01,
    "denied": 0.01,
    "refused": 0.01,
    "slots": 0.02,
    "unprocessed": 0.02,
    "expired": 0.03,
    "pending": 0.05,
    "spikes": 0.01,
    "resets": 0.02,
    "truncated": 0.02,
    "hangs": 0.005,
    "throttled": 0.004,  # a fourth of them asks for a whole second
    "bursts": 0.02,
    "outage": 0.04,
}
OF_REQUESTS: Final = {"errors", "spikes", "resets", "truncated", "hangs", "throttled", "bursts", "outage"}
LOST: Final = {ConnectionResetError, http.client.IncompleteRead, TimeoutError}
"""How a call can end that was carried out."""

NUMBER: Final = 1000
ITEMS: Final[Sequence[Item]] = [f"id {number}" if number % 2 else number for number in range(NUMBER)]
BATCH_SIZE: Final = 25
TOKEN_WORKERS: Final = 4
RESULT_WORKERS: Final = 16
LIMIT: Final = 1.0  # seconds after which the client gives up: only what hangs takes that long
POLICY: Final = PATIENT.copy(wait=wait_random(0, 0.05))


class Ends:
    """A client's call that keeps how it ended each time, None for an answer."""

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self.fetch = fetch
        self.failures: list[Exception | None] = []  # an append needs no lock

    def __call__(self, asked: object) -> object:
        try:
            answer: object = self.fetch(asked)
        except Exception as error:
            self.failures.append(error)
            raise
        self.failures.append(None)
        return answer


def listed(*stages: Stage[Any, Any], **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    return run_two_stage(ITEMS, *stages, **settings)


def streamed(*stages: Stage[Any, Any], **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    found: dict[int, Any] = {}
    with iter_two_stage(ITEMS, *stages, **settings) as outcomes:
        for outcome in outcomes:
            assert outcome.index not in found
            assert outcome.item == ITEMS[outcome.index]
            found[outcome.index] = outcome.result if outcome.exception is None else outcome.exception
    assert sorted(found) == list(range(NUMBER))
    return [found[index] for index in range(NUMBER)]


def assert_right(faults: Faults, item: Item, found: object, *, many: bool) -> None:
    status = faults.lasting_status(item)
    if status is None:
        assert found == (list(map(result_of, orders_of(item))) if many else result_of(token_of(item)))
    elif status == 404:
        assert type(found) is MissingToken
    else:
        assert type(found) is ApiError
        assert found.status == status


def assert_caller_saw_what_was_ordered(api: EmbeddedApi, failures: Sequence[Exception | None]) -> None:
    """Holds the failures that calls ended with against what befell requests.

    On a machine that is busy enough a request without any fault may be given up, and then nobody sees
    what it is answered.
    """
    assert set(api.befallen) == OF_REQUESTS
    types = Counter(map(type, failures))
    given_up = types[TimeoutError] - api.befallen["hangs"]
    assert given_up >= 0
    for fault, error in (("resets", ConnectionResetError), ("truncated", http.client.IncompleteRead)):
        assert api.befallen[fault] - given_up <= types[error] <= api.befallen[fault]
    assert len(failures) - given_up <= api.attempts.total() <= len(failures)
    errors = [failure for failure in failures if isinstance(failure, ApiError)]
    statuses = Counter(error.status for error in errors)
    for status in (400, 401, 429, 502, 503, 504):
        assert api.answered[status] - given_up <= statuses[status] <= api.answered[status]
        assert statuses[status] > 0
    assert {None, "0", "soon"} <= {error.headers.get("Retry-After") for error in errors}


def tokens_asked_for(faults: Faults, *, many: bool) -> set[str]:
    """Returns the tokens that a job may use, those among them that have expired."""
    tokens: set[str] = set()
    for item in ITEMS:
        if faults.lasting_status(item) is None:
            for generation in (0, 1):
                tokens.update(orders_of(item, generation) if many else [token_of(item, generation)])
    return tokens


def assert_calls_no_more_than_needed(
    api: EmbeddedApi, failures: Sequence[Exception | None], *, many: bool
) -> None:
    """Holds against the faults how often the tokens were asked for in calls that were carried out.

    Each token that is used needs an answer, and another one for each time that its result was not ready; any
    further answer is one that was lost. A token of many whose item began again may have been dropped.
    """
    asked = api.answers.tokens
    assert set(asked) <= tokens_asked_for(api.faults, many=many)
    expired = set(filter(api.faults.is_expired, asked))
    needed = len(asked) + sum(api.faults.times_pending(token) for token in asked if token not in expired)
    lost = sum(type(failure) in LOST for failure in failures)
    assert (len(asked) if many else needed) <= asked.total() <= needed + lost
    assert set(api.answers.ids) == set(ITEMS)
    assert api.attempts["orders" if many else "tokens"] < NUMBER / 2  # in batches, for all that befell them


@pytest.mark.parametrize(
    ("form", "many"),
    [
        (streamed, False),
        pytest.param(listed, True, marks=pytest.mark.slow),
        pytest.param(listed, False, marks=pytest.mark.slow),
        pytest.param(streamed, True, marks=pytest.mark.slow),
    ],
)
def test_job_goes_through_all_faults(form: Callable[..., list[Any]], *, many: bool) -> None:
    assert list(FAULTS) == list(answers.FAULTS)
    with (
        EmbeddedApi(
            token_latency=0.004, result_latency=0.004, faults=FAULTS, seed=8, outage_after=NUMBER // 2
        ) as api,
        Client(api.url, LIMIT) as client,
    ):
        first = Ends(client.fetch_keyed_orders if many else client.fetch_keyed_tokens)
        second = Ends(client.fetch_result)
        of_items: dict[str, Any] = {"batch_size": BATCH_SIZE, "retry_missing": True, "many": many}
        found = form(
            Stage(first, workers=TOKEN_WORKERS, **of_items),
            Stage(second, workers=RESULT_WORKERS),
            retry=POLICY,
            refresh_token_on=ExpiredToken,
            return_exceptions=True,
        )
    assert len(found) == NUMBER
    for item, one in zip(ITEMS, found, strict=True):
        assert_right(api.faults, item, one, many=many)
    assert_caller_saw_what_was_ordered(api, first.failures + second.failures)
    assert_calls_no_more_than_needed(api, second.failures, many=many)
