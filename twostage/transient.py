"""Which failures pass by themselves: decided once, for every HTTP client, without importing any."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_transient", "status_of"]

# Request timeout, too early, too many requests, server errors; 529 is "overloaded" at several APIs.
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 529})

TRANSIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EADDRNOTAVAIL",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETRESET",
        "ENETUNREACH",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
)

# For clients whose errors derive from no built-in one: package and class, looked up along the MRO, so the
# most special class that is named here decides. They are compared by name, so no client is imported.
TRANSIENT_CLASSES = {
    ("aiohttp", "ClientConnectionError"): True,
    ("aiohttp", "ClientPayloadError"): True,
    ("http", "BadStatusLine"): True,
    ("http", "IncompleteRead"): True,
    ("httpx", "LocalProtocolError"): False,
    ("httpx", "TransportError"): True,
    ("httpx", "UnsupportedProtocol"): False,
    ("requests", "ChunkedEncodingError"): True,
    ("requests", "ConnectionError"): True,
    ("requests", "InvalidProxyURL"): False,
    ("requests", "Timeout"): True,
    ("urllib3", "NewConnectionError"): True,
    ("urllib3", "ProtocolError"): True,
    ("urllib3", "TimeoutError"): True,
}

LOST_IN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The two of TLS's errors that say no more than that the connection has ended."""

CHAIN_LIMIT = 10
"""How many causes are looked at; a chain can be a circle."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later.

    An HTTP status, found on the exception or its `response`, decides alone: 408, 425, 429, 500, 502,
    503, 504 and 529 are transient. Without one, lost connections, timeouts and unreachable networks
    are, whether they are Python's own or those of httpx, requests, urllib3, aiohttp and http.client;
    then the exception behind it is asked: its `reason` (as `urllib.error.URLError` has it), `__cause__`
    or first argument. A bad URL, a certificate that does not hold, a host that does not exist, or an
    error in the code is not. Use it in a policy of your own:

    >>> from tenacity import Retrying, retry_if_exception, stop_after_delay
    >>> policy = Retrying(retry=retry_if_exception(is_transient), stop=stop_after_delay(60))

    Args:
        error: What the function raised.

    Returns:
        Whether another attempt makes sense.

    >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
    (True, False)
    """
    asked: object = error
    for _ in range(CHAIN_LIMIT):
        if not isinstance(asked, Exception):
            break
        status = status_of(asked)
        if status is not None:
            return status in TRANSIENT_STATUSES
        if any(map(_is_lasting, _chain(asked))):
            return False
        verdict = _verdict_by_class(asked)
        if verdict is not None:
            return verdict
        asked = _behind(asked)
    return False


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status that an exception carries, or `None`."""
    response = _read(error, "response")  # `is None` below: a requests.Response of a 503 is falsy
    holders = [
        (error, "status_code"),
        (error, "status"),
        (response, "status_code"),
        (response, "status"),
        (error, "code"),
    ]
    for holder, name in holders:
        status = _read(holder, name)
        if isinstance(status, int) and not isinstance(status, bool) and 100 <= status <= 599:  # noqa: PLR2004
            return int(status)
    return None


def _read(holder: object, name: str) -> object:
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - httpx' `request` raises RuntimeError; whose property it is, we can't know
        return None


def _verdict_by_class(error: Exception) -> bool | None:
    if isinstance(error, (ConnectionError, TimeoutError, *LOST_IN_TLS)):
        return True
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    for kind in type(error).__mro__:
        verdict = TRANSIENT_CLASSES.get((kind.__module__.partition(".")[0], kind.__name__))
        if verdict is not None:
            return verdict
    return True if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS else None


def _is_lasting(cause: BaseException) -> bool:
    """Whether it is a cause that clients wrap in a connection error although it will not pass."""
    if isinstance(cause, ssl.SSLError):
        return not isinstance(cause, LOST_IN_TLS)
    return isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN


def _behind(error: BaseException) -> BaseException | None:
    """Returns the cause that a client names: urllib and urllib3 do it by an attribute or an argument."""
    named = (_read(error, "reason"), error.__cause__, *error.args[:1])
    return next((cause for cause in named if isinstance(cause, BaseException)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those behind it, named as causes or not."""
    for _ in range(CHAIN_LIMIT):
        if error is None:
            return
        yield error
        error = _behind(error) or error.__context__
