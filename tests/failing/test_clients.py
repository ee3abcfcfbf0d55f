"""What the clients that users have really raise, and what it is taken for, with an answer and without."""

# ruff: noqa: E402 - what is imported last may not be there

from __future__ import annotations

import json
import socket
import socketserver
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import aiohttp
import pytest
from common import needs_clients
from requesting import aiohttp_get, failure_of, httpx_get, requests_get, urllib3_get_checked, urllib_get
from servers import Quiet, serving, url_of

needs_clients()

import azure.core.exceptions
import botocore.exceptions
import google.api_core.exceptions
import grpc
import httpx2
import openai
from requesting_more import (
    azure_get,
    botocore_call,
    google_get,
    google_grpc_call,
    grpc_call,
    grpc_stream,
    httpx2_get,
    openai_get,
)

from twostage import is_transient
from twostage.base.kinds import Kind
from twostage.failing.clients import code_of, status_of
from twostage.failing.throttling import retry_after
from twostage.failing.transient import THROTTLING_CODES, is_throttled, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Get: TypeAlias = "Callable[..., None]"

HTTP_CLIENTS: list[Get] = [
    requests_get,
    httpx_get,
    httpx2_get,
    urllib_get,
    urllib3_get_checked,
    aiohttp_get,
    botocore_call,
    google_get,
    azure_get,
    openai_get,
]
GRPC_CLIENTS: list[Get] = [grpc_call, grpc_stream, google_grpc_call]

each_http_client = pytest.mark.parametrize("get", HTTP_CLIENTS)
each_client = pytest.mark.parametrize("get", [*HTTP_CLIENTS, *GRPC_CLIENTS])
each_grpc_client = pytest.mark.parametrize("get", GRPC_CLIENTS)

pytestmark = pytest.mark.usefixtures("no_proxy")


class Answer(NamedTuple):
    """What the server says: as most APIs do, and with an AWS error's code in the body as well."""

    status: int
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    code: str = "SomeException"

    def body(self) -> bytes:
        return json.dumps({"__type": f"api#{self.code}", "error": {"message": "as ordered"}}).encode()


class Taken(NamedTuple):
    """What a failure is taken for."""

    transient: bool
    throttled: bool
    outage: bool
    retry_after: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Taken:
        return cls(
            is_transient(error), is_throttled(error), kind_of(error) is Kind.OUTAGE, retry_after(error)
        )


LASTING = Taken(transient=False, throttled=False, outage=False)
PASSING = Taken(transient=True, throttled=False, outage=False)
THROTTLED = Taken(transient=True, throttled=True, outage=False)
OUTAGE = Taken(transient=True, throttled=False, outage=True)


class Handler(Quiet):
    """Gives the answer that the test has ordered, or ends the connection if that is `None`."""

    server: Server

    def handle(self) -> None:
        if self.server.answer is None:
            self.connection.recv(65536)
        else:
            super().handle()

    def do_GET(self) -> None:
        assert self.server.answer is not None
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {"Content-Type": "application/json", **self.server.answer.headers}
        self.answer(self.server.answer.status, self.server.answer.body(), headers)

    def do_POST(self) -> None:
        self.do_GET()


class Server(socketserver.TCPServer):
    """One connection after the other, each ended after one answer (HTTP/1.0), so no thread is left by any."""

    answer: Answer | None = None

    @property
    def url(self) -> str:
        return url_of(self)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Server(("127.0.0.1", 0), Handler)) as http_server:
        yield http_server


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[str]:
    """The URL of a server whose methods have the names of statuses, and end with them."""

    class Aborting(grpc.GenericRpcHandler):  # type: ignore[misc] # grpcio has no types
        def service(self, details: Any) -> Any:  # noqa: ANN401
            status = getattr(grpc.StatusCode, details.method.rpartition("/")[2])
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(status, "as ordered"))

    with ThreadPoolExecutor(1) as pool:
        rpc_server = grpc.server(pool, handlers=[Aborting()])
        url = f"grpc://127.0.0.1:{rpc_server.add_insecure_port('127.0.0.1:0')}"
        rpc_server.start()
        failure_of(grpc_call, url, method="ABORTED")  # the pool's thread begins here, and in no test
        yield url
        rpc_server.stop(None).wait()


# --- answers

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
IN_A_MINUTE = "Sun, 06 Nov 1994 08:50:37 GMT"

ANSWERS = {
    "429": (Answer(429), THROTTLED),
    "429 and seconds": (Answer(429, {"Retry-After": "7"}), THROTTLED._replace(retry_after=7)),
    "429 and a date": (
        Answer(429, {"Retry-After": IN_A_MINUTE, "Date": DATE}),
        THROTTLED._replace(retry_after=60),
    ),
    "429 and milliseconds": (
        Answer(429, {"retry-after-ms": "1500.5", "Retry-After": "7"}),
        THROTTLED._replace(retry_after=1.5005),
    ),
    "429 and nonsense": (Answer(429, {"Retry-After": "soon"}), THROTTLED),
    "529": (Answer(529), THROTTLED),
    "503": (Answer(503), OUTAGE),
    "503 and seconds": (Answer(503, {"RETRY-AFTER": "7"}), THROTTLED._replace(retry_after=7)),
    "503 and nonsense": (Answer(503, {"Retry-After": "-7"}), OUTAGE),
    "502": (Answer(502), OUTAGE),
    "504": (Answer(504), OUTAGE),
    "500": (Answer(500), PASSING),
    "500 and seconds": (Answer(500, {"Retry-After": "7"}), PASSING._replace(retry_after=7)),
    "404": (Answer(404), LASTING),
    "400": (Answer(400), LASTING),
}


@each_http_client
@pytest.mark.parametrize(("answer", "taken"), ANSWERS.values(), ids=ANSWERS)
def test_answer(get: Get, answer: Answer, taken: Taken, server: Server) -> None:
    server.answer = answer
    error = failure_of(get, server.url)
    assert status_of(error) == answer.status
    assert Taken.of(error) == taken


@pytest.mark.parametrize("code", sorted(THROTTLING_CODES))
def test_aws_error_that_names_throttling(code: str, server: Server) -> None:
    server.answer = Answer(400, {"Retry-After": "7"}, code)
    error = failure_of(botocore_call, server.url)
    assert isinstance(error, botocore.exceptions.ClientError)
    assert (status_of(error), code_of(error)) == (400, code)
    assert Taken.of(error) == THROTTLED._replace(retry_after=7)


@pytest.mark.parametrize(
    ("status", "code", "taken"),
    [
        (400, "RequestTimeout", PASSING),
        (400, "RequestTimeoutException", PASSING),
        (503, "SlowDown", THROTTLED),
        (400, "ValidationException", LASTING),
        (400, "ConditionalCheckFailedException", LASTING),
        (500, "InternalServerError", PASSING),
    ],
)
def test_aws_error_of_another_name(status: int, code: str, taken: Taken, server: Server) -> None:
    server.answer = Answer(status, code=code)
    assert Taken.of(failure_of(botocore_call, server.url)) == taken


GRPC_STATUSES = {
    "CANCELLED": (499, LASTING),
    "UNKNOWN": (500, PASSING),
    "INVALID_ARGUMENT": (400, LASTING),
    "DEADLINE_EXCEEDED": (504, OUTAGE),
    "NOT_FOUND": (404, LASTING),
    "ALREADY_EXISTS": (409, LASTING),
    "PERMISSION_DENIED": (403, LASTING),
    "RESOURCE_EXHAUSTED": (429, THROTTLED),
    "FAILED_PRECONDITION": (400, LASTING),
    "ABORTED": (409, PASSING),
    "OUT_OF_RANGE": (400, LASTING),
    "UNIMPLEMENTED": (501, LASTING),
    "INTERNAL": (500, PASSING),
    "UNAVAILABLE": (503, OUTAGE),
    "DATA_LOSS": (None, LASTING),
    "UNAUTHENTICATED": (401, LASTING),
}


@each_grpc_client
@pytest.mark.parametrize("name", [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_grpc_status(get: Get, name: str, grpc_server: str) -> None:
    error = failure_of(get, grpc_server, method=name)
    assert code_of(error) == name
    assert (status_of(error), Taken.of(error)) == GRPC_STATUSES[name]


# --- no answer


@each_client
def test_dead_port(get: Get) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # ours, so nobody listens there
        assert Taken.of(failure_of(get, f"http://127.0.0.1:{closed.getsockname()[1]}")) == OUTAGE


@each_client
def test_connection_that_ends(get: Get, server: Server) -> None:
    server.answer = None
    assert Taken.of(failure_of(get, server.url)) == OUTAGE


@each_client
def test_answer_that_does_not_come(get: Get) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert Taken.of(failure_of(get, url, 0.05)) == OUTAGE


@pytest.mark.parametrize("get", [azure_get, openai_get])
@pytest.mark.parametrize("url", ["example", "ftp://example/", "http://"])
def test_bad_url_is_lasting_although_the_client_calls_it_a_connection_error(get: Get, url: str) -> None:
    assert Taken.of(failure_of(get, url)) == LASTING


# --- as they are raised without a call


@pytest.mark.parametrize(
    ("error", "taken"),
    [
        (openai.APIConnectionError(request=httpx2.Request("GET", "http://api")), OUTAGE),
        (openai.APITimeoutError(httpx2.Request("GET", "http://api")), OUTAGE),
        (azure.core.exceptions.ServiceRequestError("lost"), OUTAGE),
        (azure.core.exceptions.ServiceResponseTimeoutError("late"), OUTAGE),
        (azure.core.exceptions.IncompleteReadError("cut", error=ConnectionResetError()), OUTAGE),
        (azure.core.exceptions.HttpResponseError("a mistake", error=ValueError()), LASTING),
        (azure.core.exceptions.ServiceRequestError("url", error=aiohttp.InvalidURL("http://[")), LASTING),
        (azure.core.exceptions.SerializationError("a mistake"), LASTING),
        (botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), OUTAGE),
        (botocore.exceptions.ResponseStreamingError(error="cut"), OUTAGE),
        (botocore.exceptions.NoCredentialsError(), LASTING),
        (botocore.exceptions.ParamValidationError(report="a mistake"), LASTING),
        (botocore.exceptions.ClientError({}, "ListTables"), LASTING),
        (botocore.exceptions.ClientError({"Error": {"Code": ["no text"]}}, "ListTables"), LASTING),
        (botocore.exceptions.EventStreamError({"Error": {"Code": "ThrottlingException"}}, "Say"), THROTTLED),
        (httpx2.LocalProtocolError("a header of two lines"), LASTING),
        (google.api_core.exceptions.GoogleAPICallError("with no status"), LASTING),
        (grpc.RpcError("with no status"), LASTING),
        (grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, (), ()), THROTTLED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exception(error: Exception, taken: Taken) -> None:
    assert Taken.of(error) == taken


def test_google_s_own_retries_that_gave_up_are_taken_as_their_cause() -> None:
    cause = google.api_core.exceptions.TooManyRequests("slow down")
    error = google.api_core.exceptions.RetryError("gave up", cause)
    error.__cause__ = cause
    assert Taken.of(error) == THROTTLED


def test_code_is_called_only_of_an_rpc_error() -> None:
    class Foreign(Exception):  # noqa: N818
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    assert (status_of(Foreign()), code_of(Foreign()), is_transient(Foreign())) == (None, None, False)


@pytest.mark.parametrize("code", [None, 14, "UNAVAILABLE", SimpleNamespace(name=14), ValueError])
def test_code_that_is_no_status_is_passed_over(code: object) -> None:
    class Odd(grpc.RpcError):  # type: ignore[misc] # grpcio has no types
        def code(self) -> object:
            if code is ValueError:
                raise ValueError
            return code

    assert (status_of(Odd()), code_of(Odd()), is_transient(Odd())) == (None, None, False)
