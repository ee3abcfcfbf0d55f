"""The client of the embedded API: its calls, with answers as twostage takes them."""

from __future__ import annotations

import http.client
import json
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from twostage.demo.answers import PENDING, ApiError, ExpiredToken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from twostage.demo.answers import Content, Item, Result

__all__ = ["TIMEOUT", "Client"]

TIMEOUT: Final = 30.0
"""The seconds after which a client gives up a request, if it is not told otherwise."""


class Client:
    """The API's calls, over one keep-alive connection a thread, with answers as twostage takes them.

    Nothing is tried again: a status of 400 or more is an `ApiError`, a lost connection what `http.client`
    raises, and the thread's next attempt connects anew. An error in a slot of an answer for several stands
    there as an `ApiError` object. A 401 is an `ExpiredToken`, either way. Leaving the context closes all
    connections.

    Args:
        url: Of the API, as `EmbeddedApi.url`.
        timeout: After how many seconds without an answer a request fails with `TimeoutError`.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        self._netloc = urlsplit(url).netloc
        self._timeout = timeout
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
        token: str = _raised(self.fetch_tokens([item])[0])
        return token

    def fetch_tokens(self, items: Sequence[Item]) -> list[Any]:
        """Returns the tokens of several items, in their order."""
        return list(map(_slot, self._post("/tokens", "ids", items)["tokens"]))

    def fetch_keyed_tokens(self, items: Sequence[Item]) -> dict[Item, Any]:
        """Returns the tokens of several items by item, without those that the API left out."""
        return _by_key(self._post("/tokens?keyed", "ids", items)["tokens"])

    def fetch_orders(self, item: Item) -> list[str]:
        """Returns one item's tokens: none, one or more."""
        tokens: list[str] = _raised(_slot(self._post("/orders", "ids", [item])["orders"][0]))
        return tokens

    def fetch_keyed_orders(self, items: Sequence[Item]) -> dict[Item, Any]:
        """Returns the tokens of several items, a list by item, without those that the API left out."""
        return _by_key(self._post("/orders?keyed", "ids", items)["orders"])

    def fetch_result(self, token: str) -> Result:
        """Returns a token's result, or what `is_pending` is true of."""
        result: Result = _slot(self._ask("GET", f"/results/{token}"))
        return result

    def fetch_results(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Returns the results of several tokens by token, some of them pending, without those left out."""
        return _by_key(self._post("/results", "tokens", tokens)["results"])

    def _post(self, path: str, name: str, values: Sequence[Item]) -> Content:
        return self._ask("POST", path, json.dumps({name: values}))

    def _ask(self, method: str, path: str, body: str | None = None) -> Content:
        connection = self._connection()
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            content: Content = json.loads(response.read())
        except BaseException:
            connection.close()  # an answer still to come would be taken for the next attempt's
            raise
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise _error(response.status, content["error"], dict(response.getheaders()))
        return content

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(self._netloc, timeout=self._timeout)
            self._local.connection = connection
            self._connections.append(connection)
        return connection


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    return (ExpiredToken if status == HTTPStatus.UNAUTHORIZED else ApiError)(status, message, headers)


def _slot(slot: Any) -> Any:  # noqa: ANN401 - a token, tokens or a result
    """Returns what stands in a slot of an answer: an error as an exception object."""
    if not isinstance(slot, dict) or slot == PENDING:
        return slot
    return slot["result"] if "result" in slot else _error(slot["error"], HTTPStatus(slot["error"]).phrase)


def _by_key(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    return {key: _slot(slot) for key, slot in pairs}


def _raised(slot: Any) -> Any:  # noqa: ANN401 - a token or tokens
    """Returns a slot, or raises the error in it: a call for one item has no other way to say so."""
    if isinstance(slot, ApiError):
        raise slot
    return slot
