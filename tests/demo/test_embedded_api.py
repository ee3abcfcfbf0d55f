"""The embedded API: what it answers, what each fault does, that its client says so, and what is counted."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from itertools import cycle, islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from common import PATIENCE, until

from twostage import is_transient
from twostage.demo.answers import (
    FAULTS,
    ApiError,
    ExpiredToken,
    Faults,
    is_pending,
    orders_of,
    result_of,
    token_of,
)
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import Client
from twostage.demo.fates import BURST, OUTAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twostage.demo.answers import Item

IDS: Sequence[Item] = [*range(50), *map(str, range(50))]


@contextmanager
def served(
    most_ids: int = 100, seed: int = 1, outage_after: int = 0, timeout: float = PATIENCE, **faults: float
) -> Iterator[tuple[EmbeddedApi, Client]]:
    with (
        EmbeddedApi(
            token_latency=0,
            result_latency=0,
            faults=faults,
            most_ids=most_ids,
            outage_after=outage_after,
            seed=seed,
        ) as api,
        Client(api.url, timeout) as client,
    ):
        yield api, client


def ask(api: EmbeddedApi, path: str, **content: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(api.url).netloc, timeout=30)
    try:
        connection.request("POST" if content else "GET", path, json.dumps(content) if content else None)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def statuses(slots: Sequence[object]) -> Counter[int]:
    return Counter(slot.status for slot in slots if isinstance(slot, ApiError))


# --- without faults


def test_each_request_has_its_answer() -> None:
    with served() as (api, client):
        assert client.fetch_token("a") == token_of("a")
        assert client.fetch_tokens(IDS) == list(map(token_of, IDS))
        assert client.fetch_keyed_tokens(IDS) == {item: token_of(item) for item in IDS}
        assert client.fetch_orders("a") == orders_of("a")
        assert client.fetch_keyed_orders(IDS) == {item: orders_of(item) for item in IDS}
        assert client.fetch_result(token_of("a")) == result_of(token_of("a"))
        tokens = [token for item in IDS for token in orders_of(item)][:100]
        assert client.fetch_results(tokens) == {token: result_of(token) for token in tokens}
        assert api.attempts == {"tokens": 3, "orders": 2, "results": 2}
        assert api.answered == {200: 7}
        assert api.answers.ids == Counter([*IDS] * 3 + ["a"] * 2)
        assert api.answers.tokens == Counter([*tokens, token_of("a")])


def test_answers_by_key_come_in_another_order() -> None:
    with served() as (_, client):
        assert list(client.fetch_keyed_tokens(IDS)) != IDS
        tokens = list(map(token_of, IDS))
        assert list(client.fetch_results(tokens)) != tokens


def test_an_id_has_none_to_three_orders() -> None:
    assert {len(orders_of(item)) for item in IDS} == {0, 1, 2, 3}
    tokens = [token for item in IDS for token in [token_of(item), *orders_of(item)]]
    assert len(set(tokens)) == len(tokens)
    assert len({json.dumps(result_of(token)) for token in tokens}) == len(tokens)


@pytest.mark.parametrize("item", [1, "1", "ü", -5])
def test_token_of_another_generation_is_another_with_the_same_result(item: Item) -> None:
    assert token_of(item, 1) != token_of(item)
    assert result_of(token_of(item, 1)) == result_of(token_of(item))
    assert list(map(result_of, orders_of(item, 1))) == list(map(result_of, orders_of(item)))


@pytest.mark.parametrize(
    "token", ["", "x", "00", token_of(1)[:-2], token_of(1, 2), token_of(1, 0, 3), token_of(1, 0, -1)]
)
def test_unknown_token_is_a_404(token: str) -> None:
    with served() as (_, client):
        with pytest.raises(ApiError) as raised:
            client.fetch_result(token)
        assert raised.value.status == 404
        [slot] = client.fetch_results([token]).values()
        assert statuses([slot]) == {404: 1}


@pytest.mark.parametrize("path", ["/tokens", "/tokens?keyed", "/orders", "/orders?keyed", "/results"])
def test_request_for_too_many_or_for_nonsense_is_refused(path: str) -> None:
    name = "tokens" if path == "/results" else "ids"
    with served(most_ids=3) as (api, _):
        assert ask(api, path, **{name: ["1", "2", "3"]})[0] == 200
        assert ask(api, path, **{name: ["1", "2", "3", "4"]}) == (
            413,
            {"error": f"4 {name}, at most 3 are taken"},
        )
        assert ask(api, path, **{name: [None]})[0] == 400
        assert ask(api, path, **{name: "1"})[0] == 400
        assert ask(api, path, other=["1"])[0] == 400
        assert api.answered == {200: 1, 413: 1, 400: 3}


def test_unknown_path_is_a_404() -> None:
    with served() as (api, _):
        for path in ("/results?keyed", "/tokens?key", "/else", "/"):
            assert ask(api, path, ids=[]) == (404, {"error": "unknown path"})
        assert ask(api, "/tokens") == (404, {"error": "unknown path"})


# --- each fault


def test_errors_are_drawn_for_requests() -> None:
    ends = Counter[str]()
    with served(errors=0.5) as (api, client):
        for item in range(100):
            try:
                client.fetch_token(item)
            except (ApiError, http.client.RemoteDisconnected) as error:
                ends[str(error)[:3]] += 1
        assert set(ends) == {"429", "503", "Rem"}
        assert 30 < ends.total() < 70
        assert api.attempts["tokens"] == 100
        assert api.answered == {200: 100 - ends.total(), 429: ends["429"], 503: ends["503"], 0: ends["Rem"]}
        assert api.answers.ids.total() == api.answered[200]
        assert api.befallen == {"errors": ends.total()}


def test_missing_ids_are_left_out_by_key_and_404_in_order() -> None:
    with served(missing=0.2) as (api, client):
        missing = [item for item in IDS if api.faults.lasting_status(item) == 404]
        assert 5 < len(missing) < 40
        for _ in range(2):
            assert set(IDS) - set(client.fetch_keyed_tokens(IDS)) == set(missing)
            assert set(IDS) - set(client.fetch_keyed_orders(IDS)) == set(missing)
            slots = client.fetch_tokens(IDS)
            assert [item for item, slot in zip(IDS, slots, strict=True) if statuses([slot]) == {404: 1}] == (
                missing
            )
        with pytest.raises(ApiError, match=r"^404: Not Found$"):
            client.fetch_token(missing[0])
        with pytest.raises(ApiError, match=r"^404: Not Found$"):
            client.fetch_orders(missing[0])
        assert api.answered == {200: 8}


def test_denied_ids_are_a_403_in_their_slot() -> None:
    with served(denied=0.2) as (api, client):
        denied = [item for item in IDS if api.faults.lasting_status(item) == 403]
        assert 5 < len(denied) < 40
        for answer in (client.fetch_keyed_tokens(IDS), client.fetch_keyed_orders(IDS)):
            assert {item for item in IDS if statuses([answer[item]])} == set(denied)
            assert statuses(list(answer.values())) == {403: len(denied)}
        assert statuses(client.fetch_tokens(IDS)) == {403: len(denied)}
        with pytest.raises(ApiError, match=r"^403: Forbidden$"):
            client.fetch_token(denied[0])


def test_refused_ids_fail_each_request_that_asks_for_them() -> None:
    with served(refused=0.2) as (api, client):
        refused = [item for item in IDS if api.faults.lasting_status(item) == 400]
        good = [item for item in IDS if item not in refused]
        assert 5 < len(refused) < 40
        assert len(client.fetch_tokens(good)) == len(good)
        for fetch in (client.fetch_tokens, client.fetch_keyed_tokens, client.fetch_keyed_orders):
            with pytest.raises(ApiError, match=r"^400: one of the ids is refused$"):
                fetch([*good, refused[0]])
        assert api.answers.ids == Counter(good * 4 + refused[:1] * 3)


def test_an_id_has_one_lasting_status() -> None:
    with served(refused=0.4, missing=0.4, denied=0.4) as (api, client):
        found = Counter[int | None]()
        for item in IDS:
            status = None
            try:
                client.fetch_token(item)
            except ApiError as error:
                status = error.status
            assert status == api.faults.lasting_status(item)
            found[status] += 1
        assert set(found) == {None, 400, 403, 404}


@pytest.mark.parametrize("lasting", [{}, {"missing": 0.1, "denied": 0.1}])
def test_unprocessed_are_left_out_by_key_for_now(lasting: dict[str, Any]) -> None:
    with served(unprocessed=0.3, **lasting) as (api, client):
        there = [item for item in IDS if api.faults.lasting_status(item) != 404]
        asked, rounds = there, 0
        tokens: dict[Item, str] = {}
        while asked:
            answer = client.fetch_keyed_tokens(asked)
            if rounds < 2:
                assert 0 < len(answer) < len(asked)
            tokens |= answer
            asked = [item for item in asked if item not in answer]
            rounds += 1
        assert set(tokens) == set(there)
        assert client.fetch_tokens(there[:1]) == [tokens[there[0]]] or lasting
        assert 0 < len(client.fetch_results(list(map(token_of, IDS)))) < len(IDS)


@pytest.mark.parametrize("kind", ["tokens", "orders", "results"])
def test_slots_are_a_503_for_now(kind: str) -> None:
    with served(slots=0.3) as (_, client):
        fetches: dict[str, Callable[[Any], dict[Any, Any]]] = {
            "tokens": client.fetch_keyed_tokens,
            "orders": client.fetch_keyed_orders,
            "results": client.fetch_results,
        }
        fetch = fetches[kind]
        asked = list(map(token_of, IDS)) if kind == "results" else IDS
        first, second = fetch(asked), fetch(asked)
        failed = [{key for key in asked if statuses([answer[key]]) == {503: 1}} for answer in (first, second)]
        assert all(10 < len(keys) < 50 for keys in failed)
        assert failed[0] != failed[1]
        assert statuses([*first.values(), *second.values()]) == {503: sum(map(len, failed))}
        assert all(slot.headers == {} for slot in first.values() if isinstance(slot, ApiError))


def test_expired_token_is_a_401_until_its_id_is_asked_for_again() -> None:
    with served(expired=0.2) as (api, client):
        tokens = client.fetch_tokens(IDS)
        expired = [item for item in IDS if api.faults.is_expired(token_of(item))]
        assert 5 < len(expired) < 40
        assert client.fetch_tokens(IDS) == tokens  # none has been used yet
        for item in expired:
            with pytest.raises(ExpiredToken, match=r"^401: the token has expired$"):
                client.fetch_result(token_of(item))
        answers = client.fetch_results(tokens)
        assert {type(answers[token_of(item)]) for item in expired} == {ExpiredToken}
        renewed = client.fetch_tokens(IDS)
        assert renewed == [token_of(item, int(item in expired)) for item in IDS]
        assert client.fetch_results(renewed) == {token: result_of(token) for token in renewed}
        assert api.answered == {200: 5, 401: len(expired)}


def test_expired_token_renews_all_orders_of_its_id() -> None:
    with served(expired=0.5) as (api, client):
        item = next(item for item in IDS if any(map(api.faults.is_expired, orders_of(item))))
        client.fetch_results(client.fetch_orders(item))
        assert client.fetch_orders(item) == orders_of(item, 1)


def test_pending_result_comes_after_a_request_or_two() -> None:
    with served(pending=0.5) as (api, client):
        requests = Counter[int]()
        for item in IDS[:50]:
            token, times = token_of(item), api.faults.times_pending(token_of(item))
            requests[times] += 1
            for _ in range(times):
                assert is_pending(client.fetch_result(token))
            assert client.fetch_result(token) == result_of(token)
            assert not is_pending(client.fetch_result(token))
        assert set(requests) == {0, 1, 2}
        assert api.answered == {200: 100, 202: requests[1] + 2 * requests[2]}
        tokens = list(map(token_of, IDS[50:]))
        pending = {token for token, result in client.fetch_results(tokens).items() if is_pending(result)}
        assert pending == {token for token in tokens if api.faults.times_pending(token)}


# --- each fault of whole requests


def failure_of(client: Client, item: Item) -> Exception | None:
    """Returns how a request for one id fails, if it does."""
    try:
        client.fetch_token(item)
    except (ApiError, OSError, http.client.HTTPException) as error:
        return error
    return None


def ends_of(client: Client, times: int) -> list[Any]:
    """Returns how this many requests end: by 200, another status, or a type of exception."""
    failures = [failure_of(client, item) for item in range(times)]
    assert all(map(is_transient, filter(None, failures)))
    return [200 if failure is None else getattr(failure, "status", type(failure)) for failure in failures]


@pytest.mark.parametrize(
    ("fault", "error", "timeout"),
    [
        ("resets", ConnectionResetError, PATIENCE),
        ("truncated", http.client.IncompleteRead, PATIENCE),
        ("hangs", TimeoutError, 0.05),
    ],
)
def test_answer_is_lost_of_a_call_that_was_carried_out(
    fault: str, error: type[Exception], timeout: float
) -> None:
    faults: dict[str, Any] = {fault: 1.0}
    with served(timeout=timeout, **faults) as (api, client):
        calls: list[tuple[Callable[[Any], object], object]] = [
            (client.fetch_token, "a"),
            (client.fetch_keyed_orders, IDS),
            (client.fetch_result, token_of("a")),
            (client.fetch_results, [token_of("a")]),
            (client.fetch_result, "unknown"),
        ]
        for fetch, asked in calls:
            with pytest.raises(error) as raised:
                fetch(asked)
            assert type(raised.value) is error  # http.client has a ConnectionResetError of its own
            assert is_transient(raised.value)
            if isinstance(raised.value, http.client.IncompleteRead):
                assert raised.value.partial.startswith(b'{"')
                assert raised.value.expected is not None
        until(lambda: api.answered.total() == len(calls))
        assert api.answered == {0: len(calls)}
        assert api.befallen == {fault: len(calls)}
        assert api.answers.ids == Counter([*IDS, "a"])
        assert api.answers.tokens == {token_of("a"): 2, "unknown": 1}


def test_request_that_hangs_ends_with_its_server() -> None:
    api = EmbeddedApi(faults={"hangs": 1.0})
    with ThreadPoolExecutor(1) as pool, Client(api.url) as client:
        with api:
            call = pool.submit(client.fetch_token, "a")
            until(lambda: api.befallen["hangs"])
        with pytest.raises(http.client.RemoteDisconnected):  # and not a timeout
            call.result()


def test_request_that_hangs_ends_when_its_client_leaves() -> None:
    with served(hangs=1.0, timeout=0.05) as (api, client):
        assert ends_of(client, 3) == [TimeoutError] * 3
        until(lambda: api.answered.total() == 3)
        until(lambda: not any(thread.is_alive() for thread in api._connections))


def test_throttled_request_is_told_how_long_to_wait_in_each_form() -> None:
    found = []
    with served(throttled=1.0) as (api, client):
        for item in range(8):
            with pytest.raises(ApiError, match=r"^429: a fault, as ordered$") as raised:
                client.fetch_token(item)
            found.append({name.lower(): text for name, text in raised.value.headers.items()})
        assert api.answered == {429: 8}
        assert api.befallen == {"throttled": 8}
        assert not api.answers.ids
    for headers in found:
        assert int(headers.pop("content-length")) > 0
        assert headers.pop("content-type") == "application/json"
    for seconds, date, milliseconds, malformed in (found[:4], found[4:]):
        assert seconds == {"retry-after": "0"}
        assert set(date) == {"date", "retry-after"}
        begin, end = (parsedate_to_datetime(date[name]) for name in ("date", "retry-after"))
        assert (end - begin).total_seconds() == 1
        assert milliseconds == {"retry-after-ms": "50"}
        assert malformed == {"retry-after": "soon"}


def test_bursts_befall_requests_in_a_row() -> None:
    with served(bursts=0.3) as (api, client):
        failures = [failure_of(client, item) for item in range(200 * BURST)]
        runs = [failures[begin : begin + BURST] for begin in range(0, len(failures), BURST)]
        bursts = [run for run in runs if None not in run]
        assert 40 < len(bursts) < 80
        assert runs.count([None] * BURST) == len(runs) - len(bursts)
        for run in bursts:
            errors = [error for error in run if isinstance(error, ApiError)]
            assert statuses(errors) == {503: BURST}
            assert {error.headers.get("Retry-After") for error in errors} == {None, "0"}
        assert api.befallen == {"bursts": BURST * len(bursts)}
        assert api.answered == {200: failures.count(None), 503: BURST * len(bursts)}
        assert api.answers.ids.total() == api.answered[200]


class Clock:
    """Stands for the time by which an outage ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("twostage.demo.fates.monotonic", lambda: self.now)


def test_outage_befalls_every_request_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    down = cycle([502, 503, 504, http.client.RemoteDisconnected])
    with served(outage=0.5, outage_after=3) as (api, client):
        clock.now += 100  # when it begins is a matter of requests alone
        assert ends_of(client, 3) == [200] * 3
        assert ends_of(client, 5) == list(islice(down, 5))
        clock.now += 0.5 * OUTAGE - 0.01
        assert ends_of(client, 6) == list(islice(down, 6))
        clock.now += 0.02
        assert ends_of(client, 5) == [200] * 5
        assert api.befallen == {"outage": 11}
        assert api.answered == {200: 8, 502: 3, 503: 3, 504: 3, 0: 2}
        assert api.answers.ids.total() == 8


def test_outage_befalls_requests_that_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    has_begun = threading.Event()
    with served(outage=0.5, outage_after=1) as (api, client), ThreadPoolExecutor(1) as pool:

        def sleep(_: float) -> None:
            if api.attempts.total() == 1:
                assert has_begun.wait(PATIENCE)

        monkeypatch.setattr("twostage.demo.api.time", SimpleNamespace(sleep=sleep))
        first = pool.submit(ends_of, client, 1)
        until(lambda: api.attempts.total() == 1)
        assert ends_of(client, 1) == [502]
        has_begun.set()
        assert first.result() == [503]


def latencies_of(monkeypatch: pytest.MonkeyPatch, most: float, **faults: float) -> list[float]:
    """Returns how long 50 requests take."""
    slept: list[float] = []
    with monkeypatch.context() as patched:
        patched.setattr("twostage.demo.api.time", SimpleNamespace(sleep=slept.append))
        with EmbeddedApi(token_latency=most, faults=faults) as api, Client(api.url) as client:
            assert ends_of(client, 50) == [200] * 50
            assert api.answers.ids.total() == 50
            assert (0 < api.befallen["spikes"] < 50) == (0 < faults.get("spikes", 0) < 1)
    return slept


@pytest.mark.parametrize("most", [0.01, 0.03, 1.0])
def test_spikes_take_longer(most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = latencies_of(monkeypatch, most)
    spikes = [max(latency, min(20 * latency, 0.3)) for latency in usual]
    assert latencies_of(monkeypatch, most, spikes=1.0) == spikes
    some = latencies_of(monkeypatch, most, spikes=0.3)
    assert some not in (usual, spikes)
    assert all(found in pair for found, *pair in zip(some, usual, spikes, strict=True))


# --- the draws


EACH: dict[str, Any] = dict.fromkeys(
    ("missing", "denied", "slots", "unprocessed", "expired", "pending"), 0.1
)  # of ids, tokens and slots


def told(order: Callable[[list[Item]], list[Item]], size: int) -> dict[Item, list[object]]:
    """Returns what each id and its token were answered, three times over, in requests of this size."""
    found: dict[Item, list[object]] = {item: [] for item in IDS}
    with served(**EACH) as (_, client):
        for _ in range(3):
            ids = order(list(IDS))
            for batch in (ids[begin : begin + size] for begin in range(0, len(ids), size)):
                tokens = client.fetch_keyed_tokens(batch)
                results = client.fetch_results([token for token in tokens.values() if isinstance(token, str)])
                for item in batch:
                    token = tokens.get(item)
                    found[item] += map(str, (token, results.get(str(token))))
    return found


def test_in_which_order_and_together_with_what_an_id_is_asked_for_changes_nothing() -> None:
    first = told(list, 100)
    assert told(lambda ids: ids[::-1], 7) == first
    assert len(set(map(str, first.values()))) > 50


def ended(order: Callable[[list[Item]], list[Item]]) -> dict[Item, list[str]]:
    """Returns how requests end, by what they ask for, three times over."""
    found: dict[Item, list[str]] = {item: [] for item in IDS}
    with served(resets=0.2, truncated=0.2, throttled=0.2) as (_, client):
        for _ in range(3):
            for item in order(list(IDS)):
                found[item].append(repr(failure_of(client, item)))
    return found


def test_in_which_order_requests_come_changes_nothing_about_what_befalls_each() -> None:
    first = ended(list)
    assert ended(lambda ids: ids[::-1]) == first
    assert len(set(map(str, first.values()))) > 20


def test_another_seed_draws_others() -> None:
    hit = [
        [item for item in IDS if Faults({"missing": 0.3}, seed=seed).hits("missing", item)] for seed in (1, 2)
    ]
    assert hit[0] != hit[1]


@pytest.mark.parametrize("name", FAULTS)
def test_share_of_a_fault_is_its_share(name: str) -> None:
    faults = Faults({name: 0.2})
    assert 0.18 < sum(faults.hits(name, item) for item in range(5000)) / 5000 < 0.22
    assert not any(Faults({name: 0.0}).hits(name, item) for item in range(100))
    assert all(Faults({name: 1.0}).hits(name, item) for item in range(100))


def test_number_is_the_share_of_errors() -> None:
    assert Faults(0.25).shares == {"errors": 0.25}
    assert Faults().shares == {"errors": 0.0}


def test_wrong_name_or_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^no fault is called 'error'; there are errors, missing, denied, "):
        EmbeddedApi(faults={"error": 0.1})
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"^the share of 'slots' is from 0 to 1, not {share}$"):
            EmbeddedApi(faults={"slots": share})
