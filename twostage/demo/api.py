"""A small HTTP API on 127.0.0.1: what the demonstration and the tests run against.

| request | body | answer |
| --- | --- | --- |
| `POST /tokens` | `{"ids": [...]}` | `{"tokens": [token, ...]}` in the same order |
| `POST /orders` | the same | `{"orders": [[token, ...], ...]}`, none to three for each id |
| `POST /tokens?keyed`, `/orders?keyed` | the same | `{"tokens": [[id, token], ...]}` in any order |
| `GET /results/<token>` | | `{"result": {...}}`, or 202 and `{"status": "pending"}` |
| `POST /results` | `{"tokens": [...]}` | `{"results": [[token, what GET answers], ...]}` in any order |

Answers by key are pairs, since a key of a JSON object is text, and an id may be a number. A slot of an answer
for several may be `{"error": status}`. What goes wrong is ordered by name, as `FAULTS` has it.
"""

from __future__ import annotations

import json
import os
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socket import SHUT_RDWR, SO_LINGER, SOL_SOCKET
from typing import TYPE_CHECKING, Any, Final, Self

from twostage.demo.answers import MOST_IDS, PENDING, Answers, ApiError, Faults
from twostage.demo.fates import DROPPED, LOSSES, Fate, Fates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from socket import socket

    from twostage.demo.answers import Content

__all__ = ["EmbeddedApi"]

_BY_RESET: Final = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
"""The value of `SO_LINGER` with which a connection that is closed is reset."""


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
        answers = self.server.answers
        path = self.path.removesuffix("?keyed")
        keyed = path != self.path
        name = path.removeprefix("/")
        if path in ("/tokens", "/orders"):
            self._serve(name, lambda: answers.to_ids(name, body, keyed=keyed), body)
        elif self.path == "/results":
            self._serve(name, lambda: answers.to_tokens(body), body)
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "unknown path"})

    def do_GET(self) -> None:
        if self.path.startswith("/results/"):
            token = self.path.removeprefix("/results/")
            self._serve("results", lambda: self.server.answers.to_token(token))
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "unknown path"})

    def finish(self) -> None:
        """Closes the connection itself: the base class says goodbye first, and then none is reset."""
        super().finish()
        self.connection.close()

    def _serve(self, kind: str, answer: Callable[[], Content], body: bytes = b"") -> None:
        fate = self.server.spend_attempt(kind, f"{self.requestline}\n{body.decode('latin-1')}")
        status = fate.status
        content: Content = {"error": "a fault, as ordered"}
        if status == HTTPStatus.OK:
            try:
                content = answer()
            except ApiError as error:
                status, content = error.status, {"error": error.args[1]}
            else:
                status = HTTPStatus.ACCEPTED if content == PENDING else status
        lost = status == DROPPED or fate.fault in LOSSES
        self.server.count_answer(DROPPED if lost else status)
        if not lost:
            self._send(status, content, fate.headers)
            return
        if fate.fault == "hangs":
            self.rfile.read(1)  # until the client leaves, or the end of the server's context
        elif fate.fault == "resets":
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, _BY_RESET)
        elif fate.fault == "truncated":
            self._send(status, content, part=0.5)
        self.close_connection = True

    def _send(
        self, status: int, content: Content, headers: Iterable[tuple[str, str]] = (), part: float = 1
    ) -> None:
        """Sends an answer, or of its body no more than a part."""
        body = json.dumps(content).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: int(part * len(body))])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Stays quiet."""


# Not http.server's own class: it asks for the machine's name, which takes seconds where DNS is slow.
class EmbeddedApi(socketserver.ThreadingTCPServer):
    """The API, listening on a free port of 127.0.0.1 while its context is open.

    On leaving the context all its connections and threads are ended; requests being served then are cut off.

    Attributes:
        url: Where it listens, as `http://127.0.0.1:<port>`.
        attempts: How many requests came to `"tokens"`, `"orders"` and `"results"`, those that failed among
            them.
        most_at_once: The highest number of requests that were being served at once, of each of the three.
        answered: How many requests were answered by each status; 0 is an answer that did not come, or not
            all of it.
        befallen: How many requests each fault of whole requests has befallen, by its name.
        answers: Has how often each of the `ids` and `tokens` was asked for.
        faults: Tells which ids and tokens are befallen by what: `faults.lasting_status(item)`.

    Args:
        token_latency: Seconds that a `/tokens` or `/orders` request takes at most, drawn evenly from 0 on.
        result_latency: The same for `/results`.
        faults: What goes wrong: the share of each fault of `FAULTS` by its name. A number is the share of
            `errors`, which are in equal parts status 429, status 503, and a connection that ends without an
            answer.
        most_ids: How many ids, or tokens, a request may ask for; more are answered by status 413.
        outage_after: After how many requests the outage begins, if one is ordered.
        seed: Of the draws. Latencies and `errors` are drawn in the order in which requests come.

    Raises:
        ValueError: No fault has this name, or a share is not from 0 to 1.
    """

    request_queue_size = 512  # hundreds of clients connect in the same instant

    def __init__(
        self,
        *,
        token_latency: float = 0.010,
        result_latency: float = 0.005,
        faults: float | Mapping[str, float] = 0.0,
        most_ids: int = MOST_IDS,
        outage_after: int = 100,
        seed: int = 0,
    ) -> None:
        self.faults = Faults(faults, seed=seed)  # before a socket is open that nobody would close
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.attempts = Counter(tokens=0, results=0)
        self.most_at_once = Counter(tokens=0, results=0)
        self.answered: Counter[int] = Counter()
        self.befallen: Counter[str] = Counter()
        self.answers = Answers(self.faults, most_ids)
        self._at_once = Counter(tokens=0, results=0)
        latencies = {"tokens": token_latency, "orders": token_latency, "results": result_latency}
        self._fates = Fates(self.faults, latencies, outage_after, seed=seed)
        self._lock = threading.Lock()  # of the counts and the fates
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

    def spend_attempt(self, kind: str, request: str) -> Fate:
        """Counts one request and takes its time; returns what is to become of it.

        Args:
            kind: How it is counted.
            request: All that it says.
        """
        with self._lock:
            self.attempts[kind] += 1
            self._at_once[kind] += 1
            self.most_at_once[kind] = max(self.most_at_once[kind], self._at_once[kind])
            fate = self._fates.next(kind, request)
        time.sleep(fate.latency)
        with self._lock:
            self._at_once[kind] -= 1
            fate = self._fates.in_outage() or fate  # whatever came before it and is not answered yet
            if fate.fault:
                self.befallen[fate.fault] += 1
        return fate

    def count_answer(self, status: int) -> None:
        """Counts how a request was answered."""
        with self._lock:
            self.answered[status] += 1

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
