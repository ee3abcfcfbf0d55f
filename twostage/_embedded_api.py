"""A small HTTP API on 127.0.0.1 and its client: what the demonstration and the tests run against.

`POST /tokens` with `{"ids": [...]}` answers `{"tokens": [...]}` in the same order, and `GET /results/<token>`
answers `{"result": {...}}`. A token is a function of its id, a result one of its token: each can be checked.
"""

from __future__ import annotations

import http.client
import json
import random
import socketserver
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from socket import socket

__all__ = ["ApiError", "Client", "EmbeddedApi", "Item", "Result", "result_of", "token_of"]

Item: TypeAlias = int | str
Result: TypeAlias = dict[str, int | str]

MOST_IDS: Final = 100  # that one `POST /tokens` takes
_DROPPED: Final = 0  # beside the statuses: the connection ends without an answer
_FAULTS: Final = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, _DROPPED)


class ApiError(Exception):
    """A request that the API refused.

    Attributes:
        status: The HTTP status of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status

    def __str__(self) -> str:
        return f"{self.status}: {self.args[1]}"


def token_of(item: Item) -> str:
    """Returns the token that the API gives for an id: its JSON text behind a checksum, in hexadecimal."""
    text = json.dumps(item).encode()
    return (zlib.crc32(text).to_bytes(4) + text).hex()


def result_of(token: str) -> Result:
    """Returns the result that the API gives for a token.

    Raises:
        ApiError: Of status 404; no id has this token.
    """
    try:
        item = json.loads(bytes.fromhex(token)[4:])
    except ValueError:
        item = None
    if not _is_id(item) or token_of(item) != token:
        raise ApiError(HTTPStatus.NOT_FOUND, "unknown token")
    return {"id": item, "report": f"report {item}"}


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _answer_tokens(body: bytes) -> dict[str, Any]:
    try:
        ids = json.loads(body)["ids"]
    except (ValueError, TypeError, KeyError):
        ids = None
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise ApiError(HTTPStatus.BAD_REQUEST, 'expected {"ids": [...]}, each an integer or a string')
    if len(ids) > MOST_IDS:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{len(ids)} ids, at most {MOST_IDS} are taken")
    return {"tokens": [token_of(item) for item in ids]}


def _answer_result(token: str) -> dict[str, Any]:
    return {"result": result_of(token)}


class _Handler(BaseHTTPRequestHandler):
    """One keep-alive connection."""

    server: EmbeddedApi
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write a response: of two small ones the second waits for a delayed ACK, 40 ms

    def do_POST(self) -> None:
        """Takes the body, whatever comes of it: the next request begins behind it."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self.close_connection = True
            self._send(HTTPStatus.LENGTH_REQUIRED, {"error": "a Content-Length is needed"})
            return
        body = self.rfile.read(int(length))
        if self.path == "/tokens":
            self._serve("tokens", lambda: _answer_tokens(body))
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "unknown path"})

    def do_GET(self) -> None:
        if self.path.startswith("/results/"):
            self._serve("results", lambda: _answer_result(self.path.removeprefix("/results/")))
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "unknown path"})

    def _serve(self, kind: str, answer: Callable[[], dict[str, Any]]) -> None:
        status = self.server.spend_attempt(kind)
        if status == _DROPPED:
            self.close_connection = True
        elif status != HTTPStatus.OK:
            self._send(status, {"error": "a fault, as ordered"})
        else:
            try:
                self._send(status, answer())
            except ApiError as error:
                self._send(error.status, {"error": error.args[1]})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Stays quiet."""


# Not http.server's own class: it asks for the machine's name, which takes seconds where DNS is slow.
class EmbeddedApi(socketserver.ThreadingTCPServer):
    """The API, listening on a free port of 127.0.0.1 while its context is open.

    On leaving the context all its connections and threads are ended; requests being served then are cut off.

    Attributes:
        url: Where it listens, as `http://127.0.0.1:<port>`.
        attempts: How many requests came to `"tokens"` and to `"results"`, those that failed among them.
        most_at_once: The highest number of requests that were being served at once, of each of the two.

    Args:
        token_latency: Seconds that a `/tokens` request takes at most, drawn evenly from 0 on.
        result_latency: The same for `/results`.
        faults: Share of the requests that fail, 0 to 1: in equal parts by status 429, by status 503, and by a
            connection that ends without an answer.
        seed: Of the draws. They are made in the order in which requests come.
    """

    request_queue_size = 512  # hundreds of clients connect in the same instant

    def __init__(
        self,
        *,
        token_latency: float = 0.010,
        result_latency: float = 0.005,
        faults: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.attempts = Counter(tokens=0, results=0)
        self.most_at_once = Counter(tokens=0, results=0)
        self._at_once = Counter(tokens=0, results=0)
        self._latencies = {"tokens": token_latency, "results": result_latency}
        self._faults = faults
        self._random = random.Random(seed)
        self._lock = threading.Lock()  # of the counts and the draws
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._connections: dict[threading.Thread, socket] = {}

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._acceptor.join()
        for connection in self._connections.values():
            with suppress(OSError):  # its client has left already
                connection.shutdown(SHUT_RDWR)  # else its thread waits for the next request
        for thread in self._connections:
            thread.join()
        self.server_close()

    def spend_attempt(self, kind: str) -> int:
        """Counts one request and takes its time; returns its fault's status, `_DROPPED`, or 200 for none."""
        with self._lock:
            self.attempts[kind] += 1
            self._at_once[kind] += 1
            self.most_at_once[kind] = max(self.most_at_once[kind], self._at_once[kind])
            latency = self._random.uniform(0, self._latencies[kind])
            status = self._random.choice(_FAULTS) if self._random.random() < self._faults else HTTPStatus.OK
        time.sleep(latency)
        with self._lock:
            self._at_once[kind] -= 1
        return status

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class
        """Serves a connection in a thread that the end of the context can find."""
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        thread.start()
        self._connections = {t: c for t, c in self._connections.items() if t.is_alive()}
        self._connections[thread] = request

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class
        """Says nothing of clients that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Client:
    """The API's two calls, over one keep-alive connection a thread.

    Nothing is tried again: a status of 400 or more is an `ApiError`, a lost connection what `http.client`
    raises, and the thread's next attempt connects anew. Leaving the context closes all connections.

    Args:
        url: Of the API, as `EmbeddedApi.url`.
    """

    def __init__(self, url: str) -> None:
        self._netloc = urlsplit(url).netloc
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []  # an append needs no lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections of all threads."""
        for connection in self._connections:
            connection.close()

    def fetch_token(self, item: Item) -> str:
        """Returns one item's token."""
        return self.fetch_tokens([item])[0]

    def fetch_tokens(self, items: Sequence[Item]) -> list[str]:
        """Returns the tokens of up to `MOST_IDS` items, in their order."""
        tokens: list[str] = self._ask("POST", "/tokens", json.dumps({"ids": items}))["tokens"]
        return tokens

    def fetch_result(self, token: str) -> Result:
        """Returns a token's result."""
        result: Result = self._ask("GET", f"/results/{token}")["result"]
        return result

    def _ask(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        connection = self._connection()
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            content: dict[str, Any] = json.loads(response.read())
        except BaseException:
            connection.close()  # an answer still to come would be taken for the next attempt's
            raise
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise ApiError(response.status, content["error"])
        return content

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(self._netloc, timeout=30)
            self._connections.append(connection)
        return connection
