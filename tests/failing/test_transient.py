"""What passes by itself and what does not, asked of the exceptions that real clients really raise."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from concurrent.futures import CancelledError
from email.message import Message
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
import pytest
import requests
import urllib3
from requesting import (
    aiohttp_get,
    failure_of,
    http_client_get,
    httpx_get,
    requests_get,
    urllib3_get,
    urllib3_get_once,
    urllib_get,
)
from scripts import ran

from twostage import is_transient
from twostage.failing.clients import status_of
from twostage.failing.transient import TRANSIENT_STATUSES, is_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STATUS_CLIENTS = [requests_get, httpx_get, aiohttp_get, urllib_get]
CLIENTS = [*STATUS_CLIENTS, urllib3_get, urllib3_get_once, http_client_get]

each_client = pytest.mark.parametrize("get", CLIENTS)

pytestmark = pytest.mark.usefixtures("no_proxy")


ANSWERS = {
    b"/cut": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
    b"/cut-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nonly this",
    b"/404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    b"/503": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A host and port that answers as `ANSWERS` has it; else it reads a request and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(65536).split()
                connection.sendall(ANSWERS.get(request[1], b"") if len(request) > 1 else b"")

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    socket.create_connection(listener.getsockname()).close()
    thread.join()
    listener.close()


# --- what real clients raise


@each_client
def test_refused_connection_is_transient(get: Callable[..., None]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # ours, so nobody listens there
        assert is_transient(failure_of(get, f"http://127.0.0.1:{closed.getsockname()[1]}/"))


@each_client
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_timeout_is_transient(get: Callable[..., None], scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = failure_of(get, f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/", 0.01)
    assert is_transient(error)
    assert is_timeout(error)


@each_client
@pytest.mark.parametrize("path", ["hang-up", "cut", "cut-chunk"])
def test_lost_connection_is_transient(get: Callable[..., None], path: str, server: str) -> None:
    error = failure_of(get, f"http://{server}/{path}")
    assert is_transient(error)
    assert not is_timeout(error)


@each_client
def test_connection_lost_in_the_tls_handshake_is_transient(get: Callable[..., None], server: str) -> None:
    assert is_transient(failure_of(get, f"https://{server}/"))


@pytest.mark.parametrize("get", STATUS_CLIENTS)
@pytest.mark.parametrize("status", [503, 404])
def test_status_of_a_real_answer_decides(get: Callable[..., None], status: int, server: str) -> None:
    error = failure_of(get, f"http://{server}/{status}")
    assert status_of(error) == status
    assert is_transient(error) is (status == 503)


@each_client
def test_certificate_error_is_not_transient(
    get: Callable[..., None], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ssl.SSLCertVerificationError(1, "certificate verify failed")

    for kind in (ssl.SSLSocket, ssl.SSLObject):
        monkeypatch.setattr(kind, "do_handshake", refuse)
    error = failure_of(get, f"https://{server}/")
    assert "certificate verify failed" in str(error)
    assert not is_transient(error)


@each_client
@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_NONAME], ids=["again", "no name"])
def test_name_server_out_of_reach_is_transient_and_a_name_that_does_not_exist_is_not(
    get: Callable[..., None], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "no address")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    error = failure_of(get, "http://api.example/")
    assert "no address" in str(error)
    assert is_transient(error) is (code == socket.EAI_AGAIN)


@pytest.mark.parametrize(
    ("get", "url", "raised"),
    [
        (requests_get, "example", requests.exceptions.MissingSchema),
        (requests_get, "ftp://example/", requests.exceptions.InvalidSchema),
        (requests_get, "http://", requests.exceptions.InvalidURL),
        (requests_get, "http://[::1", requests.exceptions.InvalidURL),
        (httpx_get, "example", httpx.UnsupportedProtocol),
        (httpx_get, "ftp://example/", httpx.UnsupportedProtocol),
        (httpx_get, "http://", httpx.UnsupportedProtocol),
        (httpx_get, "http://[::1", httpx.InvalidURL),
        (aiohttp_get, "example", aiohttp.InvalidUrlClientError),
        (aiohttp_get, "ftp://example/", aiohttp.NonHttpUrlClientError),
        (aiohttp_get, "http://[::1", aiohttp.InvalidUrlClientError),
        (urllib_get, "example", ValueError),
        (urllib_get, "http:///", urllib.error.URLError),
        (urllib_get, "http://a b/", http.client.InvalidURL),
        (urllib3_get, "ftp://example/", urllib3.exceptions.URLSchemeUnknown),
        (urllib3_get, "http://", urllib3.exceptions.LocationValueError),
        (urllib3_get, "http://[::1", urllib3.exceptions.LocationParseError),
        (http_client_get, "http://host:port/", http.client.InvalidURL),
    ],
)
def test_bad_url_is_not_transient(get: Callable[..., None], url: str, raised: type[Exception]) -> None:
    error = failure_of(get, url)
    assert isinstance(error, raised)
    assert not is_transient(error)


def test_header_that_httpx_refuses_to_send_is_not_transient(server: str) -> None:
    with pytest.raises(httpx.LocalProtocolError) as raised:
        httpx.get(f"http://{server}/", headers={"X-Token": "two\nlines"})
    assert not is_transient(raised.value)


@pytest.mark.parametrize("get", [requests_get, httpx_get, urllib_get])
def test_proxy_out_of_reach_is_transient(get: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert is_transient(failure_of(get, "http://203.0.113.1/"))


def test_no_client_is_imported() -> None:
    names = {
        "aiohttp",
        "azure",
        "botocore",
        "google",
        "grpc",
        "httpx",
        "httpx2",
        "openai",
        "requests",
        "urllib3",
    }
    code = f"import sys, twostage; print(*{names} & set(sys.modules))"
    assert ran(code).stdout == "\n"


# --- the status


def on_exception(name: str, value: object) -> Exception:
    error = Exception("asked")
    setattr(error, name, value)
    return error


def with_response(**fields: object) -> Exception:
    return on_exception("response", SimpleNamespace(**fields))


HOLDERS: dict[str, Callable[[Any], Exception]] = {
    "status_code": lambda status: on_exception("status_code", status),
    "status": lambda status: on_exception("status", status),
    "code": lambda status: on_exception("code", status),
    "response.status_code": lambda status: with_response(status_code=status),
    "response.status": lambda status: with_response(status=status),
}


def test_transient_statuses_are_those_of_the_documentation() -> None:
    assert set(TRANSIENT_STATUSES) == {408, 425, 429, 500, 502, 503, 504, 529}


@pytest.mark.parametrize("holding", HOLDERS.values(), ids=HOLDERS)
def test_status_is_found_and_decides(holding: Callable[[Any], Exception]) -> None:
    for status in range(100, 600):
        error = holding(status)
        assert status_of(error) == status
        assert is_transient(error) is (status in TRANSIENT_STATUSES)


@pytest.mark.parametrize(
    "value",
    [True, False, None, 0, 99, 600, 1006, -503, 503.0, "503", (503,), lambda: 503],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_status_is_passed_over(value: object) -> None:
    for holding in HOLDERS.values():
        error = holding(value)
        assert status_of(error) is None
        assert not is_transient(error)
        error.__cause__ = ConnectionResetError()
        assert is_transient(error)


def test_status_of_an_enum_is_a_plain_int() -> None:
    status = status_of(on_exception("status", HTTPStatus.SERVICE_UNAVAILABLE))
    assert status == HTTPStatus.SERVICE_UNAVAILABLE
    assert type(status) is int


def test_exception_s_own_status_goes_before_the_response_s_and_code_comes_last() -> None:
    error = with_response(status_code=404, status=405)
    error.code = 503  # type: ignore[attr-defined]
    assert status_of(error) == 404
    error.status = 500  # type: ignore[attr-defined]
    assert status_of(error) == 500
    error.status_code = 429  # type: ignore[attr-defined]
    assert status_of(error) == 429
    error.status_code = error.status = 0  # type: ignore[attr-defined] # no statuses, so they say nothing
    assert status_of(error) == 404


def test_falsy_response_of_requests_is_asked() -> None:
    response = requests.Response()
    response.status_code = 503
    assert not response
    assert status_of(requests.HTTPError(response=response)) == 503


def test_property_that_raises_is_passed_over() -> None:
    class Closed(Exception):  # noqa: N818
        @property
        def response(self) -> object:
            raise RuntimeError("closed")

        status_code = reason = response

    error = Closed()
    assert status_of(error) is None
    assert not is_transient(error)
    error.code = 503  # type: ignore[attr-defined]
    assert status_of(error) == 503
    assert is_transient(httpx.ConnectError("its `request` raises RuntimeError"))


@pytest.mark.parametrize("kind", [ConnectionResetError, TimeoutError, httpx.ReadError, requests.Timeout])
def test_status_goes_before_the_class(kind: type[Exception]) -> None:
    error = kind("lost")
    assert is_transient(error)
    error.status_code = 404  # type: ignore[attr-defined]
    assert not is_transient(error)


def test_status_goes_before_a_lasting_cause() -> None:
    error = on_exception("status_code", 503)
    error.__cause__ = ssl.SSLCertVerificationError()
    assert is_transient(error)


def test_exit_code_is_no_status() -> None:
    assert not is_transient(SystemExit(503))


# --- classes, without and with something behind them


def os_error(name: str) -> OSError:
    return OSError(getattr(errno, name), name)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError(),
        BrokenPipeError(),
        TimeoutError(),
        ssl.SSLEOFError(),
        *map(
            os_error, ["ECONNREFUSED", "EPIPE", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "EADDRNOTAVAIL"]
        ),
        http.client.RemoteDisconnected("hung up"),
        httpx.PoolTimeout("no connection is free"),
        aiohttp.ServerTimeoutError(),
        type("Lost", (httpx.ReadError,), {})("a subclass of the user's"),
        urllib.error.URLError(TimeoutError()),
    ],
    ids=repr,
)
def test_network_failure_is_transient(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(errno.EACCES, "denied"),
        OSError("no number"),
        *map(os_error, ["EMFILE", "ENOSPC", "ENOENT"]),
        TypeError("a mistake"),
        KeyError("a mistake"),
        ssl.SSLError(1, "wrong version number"),
        CancelledError(),
        http.client.CannotSendRequest(),
        httpx.DecodingError("bad gzip"),
        requests.exceptions.InvalidProxyURL(),
        requests.TooManyRedirects(),
        type("Timeout", (Exception,), {})("a name like a client's"),
        urllib.error.URLError("unknown url type"),
        urllib.error.URLError(FileNotFoundError()),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_failure_is_not_transient(error: BaseException) -> None:
    assert not is_transient(error)


def caused_by(*causes: BaseException) -> Exception:
    error = RuntimeError("wrapped by the user")
    for outer, inner in zip([error, *causes], causes, strict=False):
        outer.__cause__ = inner
    return error


@pytest.mark.parametrize(
    "error",
    [
        caused_by(ConnectionResetError()),
        caused_by(ValueError(), RuntimeError(), httpx.ReadTimeout("late")),
        caused_by(on_exception("status", 503), on_exception("status", 404)),
        caused_by(urllib.error.URLError(ConnectionResetError())),
    ],
)
def test_transient_cause_makes_a_failure_transient(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        caused_by(ValueError()),
        caused_by(on_exception("status", 404), ConnectionResetError()),
        caused_by(ssl.SSLCertVerificationError(), ConnectionResetError()),
        caused_by(KeyboardInterrupt(), ConnectionResetError()),
    ],
)
def test_lasting_cause_does_not(error: Exception) -> None:
    assert not is_transient(error)


def test_failure_in_the_handling_of_a_transient_one_is_not_transient() -> None:
    error = ValueError("a mistake in an except block")
    error.__context__ = ConnectionResetError()
    assert not is_transient(error)


def test_circle_of_causes_and_reasons_ends() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert not is_transient(first)
    itself = on_exception("reason", None)
    itself.reason = itself  # type: ignore[attr-defined]
    assert not is_transient(itself)


def test_reason_of_an_http_error_is_a_text_and_its_status_decides() -> None:
    with urllib.error.HTTPError("http://api", 503, "Service Unavailable", Message(), None) as error:
        assert status_of(error) == 503
        assert is_transient(error)
