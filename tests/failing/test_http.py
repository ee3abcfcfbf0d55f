"""Whole jobs over real sockets, with the clients that users have: nothing lost, nothing asked for twice."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
import requests
from requests.adapters import HTTPAdapter

from twostage import Stage, iter_two_stage, run_two_stage
from twostage.demo.answers import MOST_IDS, ApiError, result_of, token_of
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import Client as PlainClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from twostage import Outcome
    from twostage.demo.answers import Item, Result
    from twostage.demo.fates import Fate

TOKEN_WORKERS = 3
RESULT_WORKERS = 8
LONG = 10.0
"""A time limit that no test reaches."""


class Client(NamedTuple):
    """The two calls, as a user writes them with one library."""

    fetch_tokens: Callable[[Sequence[Item]], list[str]]
    fetch_result: Callable[[str], Result]

    def fetch_token(self, item: Item) -> str:
        [token] = self.fetch_tokens([item])
        return token


@contextmanager
def plain(url: str) -> Iterator[Client]:
    with PlainClient(url) as client:
        yield Client(client.fetch_tokens, client.fetch_result)


@contextmanager
def with_requests(url: str) -> Iterator[Client]:
    with requests.Session() as session:
        session.trust_env = False  # no proxy to a loopback address
        workers = TOKEN_WORKERS + RESULT_WORKERS
        session.mount(url, HTTPAdapter(pool_connections=1, pool_maxsize=workers, pool_block=True))

        def fetch_tokens(items: Sequence[Item]) -> list[str]:
            response = session.post(f"{url}/tokens", json={"ids": items}, timeout=LONG)
            response.raise_for_status()
            tokens: list[str] = response.json()["tokens"]
            return tokens

        def fetch_result(token: str) -> Result:
            response = session.get(f"{url}/results/{token}", timeout=LONG)
            response.raise_for_status()
            result: Result = response.json()["result"]
            return result

        yield Client(fetch_tokens, fetch_result)


@contextmanager
def with_httpx(url: str) -> Iterator[Client]:
    limits = httpx.Limits(max_connections=TOKEN_WORKERS + RESULT_WORKERS)
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default one takes long to load
    with httpx.Client(base_url=url, limits=limits, timeout=LONG, trust_env=False, verify=no_tls) as client:

        def fetch_tokens(items: Sequence[Item]) -> list[str]:
            response = client.post("/tokens", json={"ids": items})
            tokens: list[str] = response.raise_for_status().json()["tokens"]
            return tokens

        def fetch_result(token: str) -> Result:
            result: Result = client.get(f"/results/{token}").raise_for_status().json()["result"]
            return result

        yield Client(fetch_tokens, fetch_result)


@contextmanager
def with_urllib(url: str) -> Iterator[Client]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, body: bytes | None = None) -> dict[str, Any]:
        try:
            with opener.open(url + path, body, timeout=LONG) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            error.close()  # or it keeps its connection for as long as somebody keeps it
            raise

    def fetch_tokens(items: Sequence[Item]) -> list[str]:
        tokens: list[str] = ask("/tokens", json.dumps({"ids": items}).encode())["tokens"]
        return tokens

    def fetch_result(token: str) -> Result:
        result: Result = ask(f"/results/{token}")["result"]
        return result

    yield Client(fetch_tokens, fetch_result)


class Library(NamedTuple):
    """A way to talk HTTP, and what it raises."""

    client: Callable[[str], AbstractContextManager[Client]]
    refused: type[Exception]
    status: Callable[[Any], int]
    dropped: type[Exception]
    keeps_connections: bool = True


LIBRARIES = {
    "plain": Library(plain, ApiError, lambda error: error.status, http.client.RemoteDisconnected),
    "requests": Library(
        with_requests, requests.HTTPError, lambda error: error.response.status_code, requests.ConnectionError
    ),
    "httpx": Library(
        with_httpx, httpx.HTTPStatusError, lambda error: error.response.status_code, httpx.RemoteProtocolError
    ),
    "urllib": Library(
        with_urllib,
        urllib.error.HTTPError,
        lambda error: error.code,
        http.client.RemoteDisconnected,
        keeps_connections=False,
    ),
}

each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


class ScriptedApi(EmbeddedApi):
    """Answers the first attempts of a kind with these statuses, 0 for a dropped connection."""

    def __init__(self, kind: str, *statuses: int) -> None:
        super().__init__(token_latency=0, result_latency=0)
        self.kind = kind
        self.statuses = list(statuses)
        self.connections = 0

    def spend_attempt(self, kind: str, request: str) -> Fate:
        fate = super().spend_attempt(kind, request)
        scripted = kind == self.kind and self.statuses
        return fate._replace(status=self.statuses.pop(0)) if scripted else fate

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class
        self.connections += 1
        super().process_request(request, client_address)


@contextmanager
def quick_api(**settings: Any) -> Iterator[EmbeddedApi]:  # noqa: ANN401 - as EmbeddedApi
    with EmbeddedApi(**{"token_latency": 0.002, "result_latency": 0.002} | settings) as api:
        yield api


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostage.failing.retry.FIRST_WAIT", 0.001)


def stages(client: Client, batch_size: int | None) -> tuple[Stage[Item, str], Stage[str, Result]]:
    return (
        Stage(client.fetch_token, workers=TOKEN_WORKERS)
        if batch_size is None
        else Stage(client.fetch_tokens, batch_size=batch_size, workers=TOKEN_WORKERS),
        Stage(client.fetch_result, workers=RESULT_WORKERS),
    )


def right_results(items: Sequence[Item]) -> list[Result]:
    return [result_of(token_of(item)) for item in items]


def attempts_made(outcomes: Sequence[Outcome[Any, Any, Any]], batch_size: int) -> dict[str, int]:
    """Returns how many attempts the outcomes tell of; a batch's are those of any of its items."""
    of_batches = {outcome.index // batch_size: outcome.token_attempts for outcome in outcomes}
    return {
        "tokens": sum(of_batches.values()),
        "results": sum(outcome.result_attempts for outcome in outcomes),
    }


# --- whole jobs


@each_library
@pytest.mark.parametrize(("batch_size", "faults"), [(None, 0.2), (7, 0.2), (7, 0.0)])
def test_job_loses_nothing_and_asks_for_nothing_twice(
    library: Library, batch_size: int | None, faults: float
) -> None:
    items: list[Item] = [f"item {number}" if number % 2 else number for number in range(60)]
    with quick_api(faults=faults, seed=3) as api, library.client(api.url) as client:
        with iter_two_stage(items, *stages(client, batch_size), retry=20) as job:
            outcomes = sorted(job, key=lambda outcome: outcome.index)
        assert [outcome.item for outcome in outcomes] == items
        assert [outcome.token for outcome in outcomes] == list(map(token_of, items))
        assert [outcome.result for outcome in outcomes] == right_results(items)
        assert attempts_made(outcomes, batch_size or 1) == api.attempts
        calls = len(items) + (len(items) if batch_size is None else -(-len(items) // batch_size))
        assert (api.attempts.total() > calls) == (faults > 0)
        assert api.most_at_once["tokens"] <= TOKEN_WORKERS
        assert api.most_at_once["results"] <= RESULT_WORKERS


@each_library
def test_list_form_is_right_and_in_order(library: Library) -> None:
    items: Sequence[Item] = range(100)
    with quick_api(faults=0.1, seed=5) as api, library.client(api.url) as client:
        assert run_two_stage(items, *stages(client, 10)) == right_results(items)
        assert api.attempts["tokens"] >= 10
        assert api.attempts["results"] >= 100
        assert api.most_at_once["tokens"] <= TOKEN_WORKERS
        assert api.most_at_once["results"] <= RESULT_WORKERS


def test_shorthands_limit_what_the_api_sees() -> None:
    with quick_api(faults=0.1) as api, PlainClient(api.url) as client:
        results = run_two_stage(
            range(60),
            client.fetch_tokens,
            client.fetch_result,
            batch_size=5,
            token_workers=2,
            result_workers=3,
        )
        assert results == right_results(range(60))
        assert api.most_at_once["tokens"] <= 2
        assert api.most_at_once["results"] <= 3


def test_both_stages_work_at_once_and_up_to_their_limits() -> None:
    together = threading.Barrier(2 + 4, timeout=LONG)
    with quick_api(token_latency=0, result_latency=0) as api, PlainClient(api.url) as client:

        def fetch_tokens(items: list[int]) -> list[str]:
            tokens = client.fetch_tokens(items)
            if items[0] >= 4:  # the third and the fourth batch, while stage two has the first two's tokens
                together.wait()
            return tokens

        def fetch_result(token: str) -> Result:
            result = client.fetch_result(token)
            if int(result["id"]) < 4:
                together.wait()
            return result

        results = run_two_stage(
            range(8), fetch_tokens, fetch_result, batch_size=2, token_workers=2, result_workers=4
        )
        assert results == right_results(range(8))


# --- what passes


@each_library
@pytest.mark.parametrize("kind", ["tokens", "results"])
def test_dropped_connection_is_tried_again(library: Library, kind: str) -> None:
    failures: list[Exception] = []

    with ScriptedApi(kind, 0, 0) as api, library.client(api.url) as client:

        def noting(fetch: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def noted(argument: object) -> object:
                try:
                    return fetch(argument)
                except Exception as error:
                    failures.append(error)
                    raise

            return noted

        fetch_tokens, fetch_result = noting(client.fetch_tokens), noting(client.fetch_result)
        with iter_two_stage([1, 2], fetch_tokens, fetch_result, batch_size=2, result_workers=1) as job:
            outcomes = sorted(job, key=lambda outcome: outcome.index)
        assert [outcome.result for outcome in outcomes] == right_results([1, 2])
        assert attempts_made(outcomes, 2) == api.attempts
        assert api.attempts[kind] == (3 if kind == "tokens" else 4)
    assert [type(error) for error in failures] == [library.dropped] * 2


@each_library
@pytest.mark.parametrize("status", [429, 503])
def test_status_that_passes_is_tried_again(library: Library, status: int) -> None:
    with ScriptedApi("results", status, status, status) as api, library.client(api.url) as client:
        with iter_two_stage([1], client.fetch_token, client.fetch_result) as job:
            [outcome] = job
        assert outcome.result == result_of(token_of(1))
        assert (outcome.token_attempts, outcome.result_attempts) == (1, 4)
        assert api.attempts == {"tokens": 1, "results": 4}


@each_library
def test_what_does_not_pass_in_ten_attempts_is_raised(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostage.failing.retry.FIRST_WAIT", 0.0)
    with ScriptedApi("tokens", *[503] * 20) as api, library.client(api.url) as client:
        with pytest.raises(library.refused) as raised:
            run_two_stage([1], client.fetch_token, client.fetch_result)
        assert api.attempts == {"tokens": 10, "results": 0}
    assert library.status(raised.value) == 503
    assert raised.value.__notes__ == ["twostage: stage one, 1, 10 attempts"]


# --- what does not


@each_library
def test_unknown_token_is_raised_at_once_as_the_client_s_own(library: Library) -> None:
    with quick_api() as api, library.client(api.url) as client:
        with pytest.raises(library.refused) as raised:
            run_two_stage(["item"], lambda item: f"0000{item}", client.fetch_result)
        assert api.attempts == {"tokens": 0, "results": 1}
    assert type(raised.value) is library.refused
    assert library.status(raised.value) == 404
    assert raised.value.__notes__ == ["twostage: stage two, 'item', 1 attempt"]


@each_library
def test_unknown_tokens_fail_their_items_alone(library: Library) -> None:
    items = range(40)
    with quick_api(faults=0.1, seed=1) as api, library.client(api.url) as client:

        def fetch_tokens(batch: list[int]) -> list[str]:
            tokens = client.fetch_tokens(batch)
            return [token if item % 10 else "unknown" for item, token in zip(batch, tokens, strict=True)]

        results = run_two_stage(
            items, fetch_tokens, client.fetch_result, batch_size=9, return_exceptions=True
        )
    for item, result in zip(items, results, strict=True):
        if item % 10:
            assert result == result_of(token_of(item))
        else:
            assert isinstance(result, library.refused)
            assert library.status(result) == 404


@each_library
def test_batch_that_is_too_large_is_raised_at_once_if_it_is_not_to_be_split(library: Library) -> None:
    with quick_api() as api, library.client(api.url) as client:
        first = Stage(client.fetch_tokens, batch_size=MOST_IDS + 1, workers=1, bisect=False)
        with pytest.raises(library.refused) as raised:
            run_two_stage(range(300), first, client.fetch_result)
        assert api.attempts == {"tokens": 1, "results": 0}
        assert library.status(raised.value) == 413
        assert raised.value.__notes__ == [f"twostage: stage one, {MOST_IDS + 1} items from 0, 1 attempt"]
        items = range(MOST_IDS + 1)
        assert run_two_stage(
            items, client.fetch_tokens, client.fetch_result, batch_size=MOST_IDS
        ) == right_results(items)


@each_library
def test_batch_that_is_too_large_is_split_and_its_half_is_the_size_from_then_on(library: Library) -> None:
    with quick_api() as api, library.client(api.url) as client:
        first = Stage(client.fetch_tokens, batch_size=MOST_IDS + 1, workers=1)
        assert run_two_stage(range(400), first, client.fetch_result) == right_results(range(400))
        assert 1 <= api.answered[413] <= 2  # the second was handed over already
        assert max(api.answers.ids.values()) == 2


# --- connections


@pytest.mark.parametrize(
    "library",
    [library for library in LIBRARIES.values() if library.keeps_connections],
    ids=["plain", "requests", "httpx"],
)
def test_connections_are_kept(library: Library) -> None:
    items: Sequence[Item] = range(100)
    with ScriptedApi("none") as api, library.client(api.url) as client:
        assert run_two_stage(items, *stages(client, 10)) == right_results(items)
        assert api.connections <= TOKEN_WORKERS + RESULT_WORKERS
        assert api.attempts == {"tokens": 10, "results": 100}
