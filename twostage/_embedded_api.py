"""A small HTTP API on 127.0.0.1: what the demonstration and the tests run against.

| request | body | answer |
| --- | --- | --- |
| `POST /tokens` | `{"ids": [...]}` | `{"tokens": [token, ...]}` in the same order |
| `POST /orders` | the same | `{"orders": [[token, ...], ...]}`, none to three for each id |
| `POST /tokens?keyed`, `/orders?keyed` | the same | `{"tokens": [[id, token], ...]}` in any order |
| `GET /results/<token>` | | `{"result": {...}}`, or 202 and `{"status": "pending"}` |
| `POST /results` | `{"tokens": [...]}` | `{"results": [[token, what GET answers], ...]}` in any order |

Answers by key are pairs, since a key of a JSON object is text, and an id may be a number. A slot of an answer
for several may be `{"error": status}`. What goes wrong is ordered by name; `_embedded_answers.py` has them.
"""

from __future__ import annotations

import json
import random
import socketserver
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any, Final, Self

from twostage._embedded_answers import MOST_IDS, PENDING, Answers, ApiError, Faults

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from socket import socket

    from twostage._embedded_answers import Content

__all__ = ["EmbeddedApi"]

_DROPPED: Final = 0  # beside the statuses: the connection ends without an answer
_ERRORS: Final = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, _DROPPED)


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
            self._serve(name, lambda: answers.to_ids(name, body, keyed=keyed))
        elif self.path == "/results":
            self._serve(name, lambda: answers.to_tokens(body))
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "unknown path"})

    def do_GET(self) -> None:
        if self.path.startswith("/results/"):
            token = self.path.removeprefix("/results/")
            self._serve("results", lambda: self.server.answers.to_token(token))
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "unknown path"})

    def _serve(self, kind: str, answer: Callable[[], Content]) -> None:
        status = self.server.spend_attempt(kind)
        content: Content = {"error": "a fault, as ordered"}
        if status == HTTPStatus.OK:
            try:
                content = answer()
            except ApiError as error:
                status, content = error.status, {"error": error.args[1]}
            else:
                status = HTTPStatus.ACCEPTED if content == PENDING else status
        self.server.count_answer(status)
        if status == _DROPPED:
            self.close_connection = True
        else:
            self._send(status, content)

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
        attempts: How many requests came to `"tokens"`, `"orders"` and `"results"`, those that failed among
            them.
        most_at_once: The highest number of requests that were being served at once, of each of the three.
        answered: How many requests were answered by each status; 0 is a connection that was ended.
        answers: Has how often each of the `ids` and `tokens` was asked for.
        faults: Tells which ids and tokens are befallen by what: `faults.lasting_status(item)`.

    Args:
        token_latency: Seconds that a `/tokens` or `/orders` request takes at most, drawn evenly from 0 on.
        result_latency: The same for `/results`.
        faults: What goes wrong: the share of each fault of `FAULTS` by its name. A number is the share of
            `errors`, which are in equal parts status 429, status 503, and a connection that ends without an
            answer.
        most_ids: How many ids, or tokens, a request may ask for; more are answered by status 413.
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
        seed: int = 0,
    ) -> None:
        self.faults = Faults(faults, seed=seed)  # before a socket is open that nobody would close
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.attempts = Counter(tokens=0, results=0)
        self.most_at_once = Counter(tokens=0, results=0)
        self.answered: Counter[int] = Counter()
        self.answers = Answers(self.faults, most_ids)
        self._at_once = Counter(tokens=0, results=0)
        self._latencies = {"tokens": token_latency, "orders": token_latency, "results": result_latency}
        self._errors = self.faults.shares.get("errors", 0.0)
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
        """Counts one request and takes its time; returns its error's status, `_DROPPED`, or 200 for none."""
        with self._lock:
            self.attempts[kind] += 1
            self._at_once[kind] += 1
            self.most_at_once[kind] = max(self.most_at_once[kind], self._at_once[kind])
            latency = self._random.uniform(0, self._latencies[kind])
            status = self._random.choice(_ERRORS) if self._random.random() < self._errors else HTTPStatus.OK
        time.sleep(latency)
        with self._lock:
            self._at_once[kind] -= 1
        return status

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
