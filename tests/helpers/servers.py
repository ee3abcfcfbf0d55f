"""HTTP servers of the tests, on this machine, in a thread that ends with them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import socketserver
    from collections.abc import Iterator, Mapping

ServerT = TypeVar("ServerT", bound="socketserver.BaseServer")


class Quiet(BaseHTTPRequestHandler):
    """Says nothing of the requests."""

    disable_nagle_algorithm = True
    wbufsize = -1  # one write a response: of two small ones the second waits for a delayed ACK, 40 ms

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


class ManyAtOnce(ThreadingHTTPServer):
    """Takes as many connections as come: with a queue of five some are asked for anew, a second later."""

    request_queue_size = 128


@contextmanager
def serving(server: ServerT) -> Iterator[ServerT]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def url_of(server: socketserver.TCPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"
