"""What belongs to an event loop, as clients do: it is made, entered and left on the loop of its stage."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import httpx
import pytest
from common import (
    AT_ONCE,
    PATIENCE,
    Clock,
    LeaveError,
    as_it_is,
    frames,
    given_up_in,
    nothing_collected,
    ours,
    until,
)
from fakes import each, notes, stage
from forms import Run, each_way, run

from twostage import AttemptTimeout, RunTimeout, iter_two_stage
from twostage.demo.answers import token_of
from twostage.demo.api import EmbeddedApi
from twostage.testing import VirtualTime, sleep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


class Client:
    """Knows what happened to it, and where; and that it is used only meanwhile."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.tasks: set[asyncio.Task[Any] | None] = set()
        self.running = 0

    def __call__(self) -> Self:
        self._happen("made")
        return self

    async def __aenter__(self) -> Self:
        self._happen("entered")
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert error == (None, None, None)
        assert self.running == 0
        self._happen("left")
        await asyncio.sleep(0)

    def _happen(self, what: str) -> None:
        self.happened.append(what)
        self.tasks.add(asyncio.current_task())

    async def fetch(self, argument: Any) -> Any:  # noqa: ANN401 - of both stages
        assert self.happened == ["made", "entered"]
        assert asyncio.current_task() not in self.tasks
        self.running += 1
        await asyncio.sleep(0)
        self.running -= 1
        return argument


async def fetch(argument: Any, client: Client) -> Any:  # noqa: ANN401 - of both stages
    return await client.fetch(argument)


ONCE = ["made", "entered", "left"]


@each_way
def test_it_is_entered_once_before_the_first_call_and_left_after_the_last(
    job: Run, on: dict[str, Any]
) -> None:
    clients = Client(), Client()
    stages = [stage(fetch, context=client, **on) for client in clients]
    assert job(range(200), *stages) == list(range(200))
    for client in clients:
        assert client.happened == ONCE
        assert len(client.tasks) == 1


def test_it_is_entered_once_in_each_job_of_a_stage(on: dict[str, Any]) -> None:
    client = Client()
    one = stage(fetch, context=client, **on)
    for _ in range(3):
        client.happened.clear()
        assert run(range(9), as_it_is, one) == list(range(9))
        assert client.happened == ONCE


def test_it_is_not_made_if_there_is_no_call(on: dict[str, Any]) -> None:
    client = Client()
    both = stage(fetch, context=client, **on)
    no_tokens: dict[int, int] = {}
    assert run([], both, both) == []
    with iter_two_stage([1], as_it_is, both):
        pass
    with pytest.raises(LookupError):
        run([1], no_tokens.__getitem__, both, retry=None)
    assert client.happened == []


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_it_is_left_after_a_failure(on: dict[str, Any], *, return_exceptions: bool) -> None:
    client = Client()

    async def fail(item: int, client: Client) -> int:
        await client.fetch(item)
        if item == 3:
            raise LookupError
        return item

    failing = stage(fail, context=client, **on)
    with nullcontext() if return_exceptions else pytest.raises(LookupError):
        run(range(9), as_it_is, failing, return_exceptions=return_exceptions)
    assert client.happened == ONCE


@pytest.mark.parametrize("way", ["close", "raise", "interrupt", "drop"])
def test_it_is_left_when_the_stream_is(way: str, ending: threading.Event, on: dict[str, Any]) -> None:
    """And not before the calls that run have ended."""
    client = Client()
    begun: list[int] = []

    async def wait(item: int, client: Client) -> int:
        begun.append(item)
        client.running += 1
        if item > 0:
            assert await asyncio.to_thread(ending.wait, PATIENCE)
            await asyncio.sleep(0)
        client.running -= 1
        return item

    error = {"raise": LookupError, "interrupt": KeyboardInterrupt}.get(way)

    def consume() -> None:
        waiting = stage(wait, context=client, workers=3, **on)
        outcomes = iter_two_stage(itertools.count(), each(int), waiting, batch_size=9)
        next(outcomes)
        until(lambda: len(begun) == 4)
        if way != "drop":
            with outcomes:
                if error is not None:
                    raise error

    with nullcontext() if error is None else pytest.raises(error):
        consume()
    until(lambda: len(ours()) == len(on))
    assert client.happened == ONCE
    assert len(begun) == 4


def test_it_is_left_in_its_own_task_as_cancel_scopes_need_it(on: dict[str, Any]) -> None:
    @asynccontextmanager
    async def scope() -> AsyncIterator[Client]:
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
            client = Client()
            client.happened = ["made", "entered"]
            yield client

    assert run(range(9), as_it_is, stage(fetch, context=scope, **on)) == list(range(9))


def test_value_of_any_kind_is_the_second_argument(on: dict[str, Any]) -> None:
    async def fetch(argument: int, value: object) -> tuple[int, object]:
        return argument, value

    for value in (None, 0, [1]):
        given = stage(fetch, context=lambda: nullcontext(value), **on)  # noqa: B023 - called at once
        assert run([5], as_it_is, given) == [(5, value)]


def test_client_is_not_kept_when_the_job_is_over(on: dict[str, Any]) -> None:
    made: list[weakref.ref[Client]] = []

    def make() -> Client:
        client = Client()
        made.append(weakref.ref(client))
        return client()

    both = stage(fetch, context=make, **on)
    with nothing_collected(), iter_two_stage(range(9), both, both) as outcomes:
        list(outcomes)
        assert len(made) == 2
        until(lambda: [client() for client in made] == [None, None])


span: ContextVar[str] = ContextVar("span", default="none")


def test_it_is_made_among_the_variables_of_where_the_job_was(on: dict[str, Any]) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def make() -> AsyncIterator[None]:
        seen.append(span.get())
        span.set("the context's")
        yield
        seen.append(span.get())

    async def fetch(argument: int, _: None) -> str:
        return span.get()

    token = span.set("the caller's")
    try:
        outcomes = iter_two_stage([1], as_it_is, stage(fetch, context=make, **on))
        span.set("a later one")
        with outcomes:
            assert [outcome.result for outcome in outcomes] == ["the caller's"]
    finally:
        span.reset(token)
    assert seen == ["the caller's", "the context's"]


# --- contexts that fail, or take their time


def failing(*, enter: Callable[[], object] = int, leave: Callable[[], object] = int) -> Any:  # noqa: ANN401
    """Makes contexts of which one end does something."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Client]:
        client = Client()
        client.happened = ["made", "entered"]
        await asyncio.sleep(0)
        enter()
        yield client
        await asyncio.sleep(0)
        leave()

    return make


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


@each_way
@pytest.mark.parametrize("kind", [LookupError, ConnectionError, LeaveError, SystemExit])
def test_one_that_fails_as_it_is_entered_ends_the_job(
    kind: type[BaseException], job: Run, on: dict[str, Any]
) -> None:
    error = kind("as it is")
    bad = stage(fetch, context=failing(enter=raising(error)), retry=AT_ONCE, **on)
    with pytest.raises(kind) as raised:
        job(itertools.count(), as_it_is, bad, return_exceptions=True)
    assert raised.value is error
    assert not notes(error)
    assert frames(error)[-2:] == ["make", "fail"]
    assert not {"_serve", "_serve_ended"}.intersection(frames(error))
    assert len(ours()) == len(on)


@pytest.mark.parametrize("end", ["enter", "leave"])
def test_its_failure_is_no_reference_cycle(end: str, on: dict[str, Any]) -> None:
    class KeptError(LookupError):
        pass

    kept: list[weakref.ref[KeptError]] = []

    def fail() -> None:
        error = KeptError()
        kept.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    context = failing(**{end: fail})

    def job() -> None:
        try:
            run([1], as_it_is, stage(fetch, context=context, **on))
        except KeptError:
            assert end == "enter"

    with nothing_collected():
        job()
        assert len(kept) == 1
        until(lambda: kept[0]() is None)


@each_way
@pytest.mark.parametrize("kind", [LookupError, LeaveError, asyncio.CancelledError, SystemExit])
def test_one_that_fails_as_it_is_left_is_logged_and_costs_no_result(
    kind: type[BaseException], job: Run, on: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    bad = stage(fetch, context=failing(leave=raising(kind("secret"))), **on)
    assert job(range(9), as_it_is, bad) == list(range(9))
    logged = [record.getMessage() for record in caplog.records if record.name == "twostage"]
    if kind is asyncio.CancelledError:
        assert logged == []
    else:
        assert logged == [f"stage two: its context has failed as it was left: {kind!r}"]
    assert "secret" not in caplog.text


def test_one_that_is_cancelled_as_it_is_entered_ends_the_job(on: dict[str, Any]) -> None:
    bad = stage(fetch, context=failing(enter=raising(asyncio.CancelledError())), **on)
    with pytest.raises(
        Exception, match="stage two: its task on the event loop was cancelled, not by the job"
    ):
        run([1], as_it_is, bad, return_exceptions=True)


@pytest.mark.parametrize(
    ("context", "made"),
    [
        (lambda: None, "NoneType"),
        (httpx.Client, "Client"),
        (lambda: as_it_is(5), "coroutine"),
        (lambda: httpx.AsyncClient, "type"),
    ],
)
@pytest.mark.parametrize("virtual", [False, True])
def test_what_is_no_context_manager_is_told_before_any_call(
    context: Callable[[], Any], made: str, *, virtual: bool
) -> None:
    calls: list[int] = []

    async def fetch(item: int, _: object) -> None:
        calls.append(item)

    bad = stage(fetch, context=context)
    message = f"^stage two: context returned {made}; expected an async context manager$"
    with VirtualTime() if virtual else nullcontext(), pytest.raises(TypeError, match=message):
        run(range(9), as_it_is if not virtual else int, bad, return_exceptions=True)
    assert not calls


def test_context_that_can_not_be() -> None:
    async def made() -> AsyncIterator[None]:
        yield

    message = "context is an async generator function; put @asynccontextmanager over it"
    with pytest.raises(TypeError, match=message):
        stage(fetch, context=made)
    with pytest.raises(TypeError, match="context is a coroutine function"):
        stage(fetch, context=as_it_is)
    with pytest.raises(TypeError, match="context is 5; expected a function that makes an async context"):
        stage(fetch, context=5)
    with pytest.raises(TypeError, match="context is given, and fetch is no coroutine function"):
        stage(str, context=Client)


class Slow:
    """A context that takes until it is told to go on, or is cancelled."""

    def __init__(self, end: str) -> None:
        self.waits = threading.Event()
        self.cancelled = False
        self.goes_on = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._end = end

    async def __aenter__(self) -> Client:
        await self._wait("enter")
        client = Client()
        client.happened = ["made", "entered"]
        return client

    async def __aexit__(self, *_: object) -> None:
        await self._wait("leave")

    async def _wait(self, end: str) -> None:
        if end != self._end:
            return
        self.loop = asyncio.get_running_loop()
        self.waits.set()
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def go_on(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.goes_on.set)


@each_way
def test_time_out_of_the_run_does_not_wait_for_one_that_is_being_entered(
    job: Run, clock: Clock, on: dict[str, Any]
) -> None:
    slow = Slow("enter")

    def let_time_pass() -> None:
        assert slow.waits.wait(PATIENCE)
        clock.advance(60)

    passing = threading.Thread(target=let_time_pass)
    passing.start()
    slowed = stage(fetch, context=lambda: slow, **on)
    results = job(range(9), as_it_is, slowed, timeout=60, return_exceptions=True)
    passing.join()
    assert {type(one) for one in results} == {RunTimeout}
    assert slow.cancelled


def test_close_does_not_wait_for_one_that_is_being_entered(on: dict[str, Any]) -> None:
    slow = Slow("enter")

    def source() -> Iterator[int]:
        yield from range(9)
        assert slow.waits.wait(PATIENCE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source(), as_it_is, stage(fetch, context=lambda: slow, **on))
    assert slow.cancelled
    assert len(ours()) == len(on)


def test_calls_wait_for_one_that_is_entered_slowly_and_no_attempt_is_given_up(
    clock: Clock, on: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow("enter")

    def source() -> Iterator[int]:
        yield from range(9)
        assert slow.waits.wait(PATIENCE)
        clock.advance(300)
        slow.go_on()

    slowed = stage(fetch, context=lambda: slow, attempt_timeout=30, **on)
    assert run(source(), as_it_is, slowed) == list(range(9))
    assert not given_up_in(caplog)


def test_job_is_over_when_its_contexts_have_been_left(on: dict[str, Any]) -> None:
    slow = Slow("leave")
    over = threading.Event()

    def job() -> None:
        assert run(range(9), as_it_is, stage(fetch, context=lambda: slow, **on)) == list(range(9))
        over.set()

    running = threading.Thread(target=job)
    running.start()
    assert slow.waits.wait(PATIENCE)
    assert not over.is_set()
    slow.go_on()
    running.join()
    assert over.is_set()


def test_it_is_left_though_a_task_refuses_to_end(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, on: dict[str, Any]
) -> None:
    monkeypatch.setattr("twostage.running.tasks.LONGEST_CANCEL", 0.01)
    happened: list[str] = []
    goes_on = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    @asynccontextmanager
    async def make() -> AsyncIterator[None]:
        happened.append("entered")
        yield
        happened.append("left")

    async def refuse(item: int, _: None) -> int:
        loops.append(asyncio.get_running_loop())
        while item and not goes_on.is_set():
            try:
                await goes_on.wait()
            except asyncio.CancelledError:
                happened.append("refused")
        return item

    refusing = stage(refuse, context=make, attempt_timeout=30, retry=None, **on)
    with iter_two_stage([0, 1], each(int), refusing, batch_size=2, return_exceptions=True) as outcomes:
        next(outcomes)
        until(lambda: len(loops) == 2)
        clock.advance(30)
        assert type(next(outcomes).exception) is AttemptTimeout
        assert next(outcomes, None) is None
    assert happened[:3] == ["entered", "refused", "left"]
    loops[0].call_soon_threadsafe(goes_on.set)


# --- virtual time


def test_in_virtual_time_it_is_the_same(virtual: VirtualTime) -> None:
    happened: list[str] = []

    @asynccontextmanager
    async def make() -> AsyncIterator[str]:
        happened.append("entered")
        yield "client"
        happened.append("left")

    async def fetch(item: int, client: str) -> str:
        assert happened == ["entered"]
        sleep(1)
        return client

    assert run(range(300), int, stage(fetch, context=make)) == ["client"] * 300
    assert happened == ["entered", "left"]
    assert virtual.now == 3


@each_way
def test_in_virtual_time_one_that_fails_as_it_is_entered_ends_the_job(job: Run, virtual: VirtualTime) -> None:
    entered = 0

    @asynccontextmanager
    async def make() -> AsyncIterator[None]:
        nonlocal entered
        entered += 1
        if entered:
            raise ConnectionError
        yield

    with pytest.raises(ConnectionError) as raised:
        job(range(300), int, stage(fetch, context=make, retry=AT_ONCE), return_exceptions=True)
    assert not notes(raised.value)
    assert entered == 1


def test_in_virtual_time_one_that_fails_as_it_is_left_is_logged(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[None]:
        yield
        raise LookupError

    async def fetch(item: int, _: None) -> int:
        return item

    assert run(range(3), int, stage(fetch, context=make)) == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "stage two: its context has failed as it was left: <class 'LookupError'>"
    ]


# --- real clients


@pytest.mark.usefixtures("no_proxy")
def test_httpx(on: dict[str, Any]) -> None:
    async def fetch_tokens(ids: list[int], client: httpx.AsyncClient) -> Any:  # noqa: ANN401 - of JSON
        return (await client.post("/tokens", json={"ids": ids})).raise_for_status().json()["tokens"]

    async def fetch_result(token: str, client: httpx.AsyncClient) -> Any:  # noqa: ANN401 - as above
        return (await client.get(f"/results/{token}")).raise_for_status().json()["result"]

    with EmbeddedApi(faults=0.05) as api:
        clients: list[httpx.AsyncClient] = []

        def make() -> httpx.AsyncClient:
            clients.append(httpx.AsyncClient(base_url=api.url, timeout=PATIENCE))
            return clients[-1]

        settings = {"context": make, "workers": 20, "retry": AT_ONCE} | on
        first = stage(fetch_tokens, batch_size=10, **settings)
        results = run(range(100), first, stage(fetch_result, **settings))
        assert [result["id"] for result in results] == list(range(100))
        assert len(clients) == 2
        assert all(client.is_closed for client in clients)
        assert max(api.most_at_once.values()) <= 20


@pytest.mark.usefixtures("no_proxy")
def test_aiohttp(on: dict[str, Any]) -> None:
    async def fetch_tokens(ids: list[int], session: aiohttp.ClientSession) -> Any:  # noqa: ANN401 - of JSON
        async with session.post("/tokens", json={"ids": ids}) as response:
            response.raise_for_status()
            return (await response.json())["tokens"]

    async def fetch_result(token: str, session: aiohttp.ClientSession) -> Any:  # noqa: ANN401 - as above
        async with session.get(f"/results/{token}") as response:
            response.raise_for_status()
            return (await response.json())["result"]

    with EmbeddedApi(faults=0.05) as api:
        sessions: list[aiohttp.ClientSession] = []

        def make() -> aiohttp.ClientSession:
            sessions.append(aiohttp.ClientSession(api.url))
            return sessions[-1]

        settings = {"context": make, "workers": 20, "retry": AT_ONCE} | on
        first = stage(fetch_tokens, batch_size=10, **settings)
        results = run(range(100), first, stage(fetch_result, **settings))
        assert [result["id"] for result in results] == list(range(100))
        assert len(sessions) == 2
        assert all(session.closed for session in sessions)


@pytest.mark.usefixtures("no_proxy")
def test_request_that_hangs_is_given_up_and_its_connection_closed(on: dict[str, Any]) -> None:
    async def fetch_result(token: str, client: httpx.AsyncClient) -> Any:  # noqa: ANN401 - of JSON
        return (await client.get(f"/results/{token}")).raise_for_status().json()["result"]

    async def fetch_token(item: int) -> str:
        return token_of(item)

    with EmbeddedApi(faults={"hangs": 0.2}) as api:

        def make() -> httpx.AsyncClient:
            return httpx.AsyncClient(base_url=api.url, timeout=None)  # noqa: S113 - the attempt has one

        timed = stage(fetch_result, context=make, workers=20, attempt_timeout=0.2, **on)
        ids = [result["id"] for result in run(range(20), fetch_token, timed, retry=AT_ONCE)]
        assert ids == list(range(20))
        assert api.befallen["hangs"] > 0
