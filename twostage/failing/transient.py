"""What kind of failure it is: decided once, for every client, without importing any."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TYPE_CHECKING

from twostage.base.kinds import Kind
from twostage.failing.clients import CHAIN_LIMIT, behind, causes, class_names, classified, code_of, status_of
from twostage.failing.throttling import Throttled, retry_after

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_throttled", "is_timeout", "is_transient", "kind_of"]

# Request timeout, too early, too many requests, server errors; 529 is "overloaded" at several APIs.
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
THROTTLING_STATUSES = frozenset({429, 529})
GATEWAY_TIMEOUT = 504
UNAVAILABLE = 503  # with a Retry-After it is the API's way to say "slow down"
OUTAGE_STATUSES = frozenset({502, UNAVAILABLE, GATEWAY_TIMEOUT})

# Both from botocore/retries/standard.py, where they are those of ThrottledRetryableChecker and
# TransientRetryableChecker: most come with a status 400. ABORTED is gRPC's, for calls that are to be repeated
# from further up (https://grpc.io/docs/guides/status-codes/), as the whole function is here.
THROTTLING_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "TransactionInProgressException",
    }
)
TRANSIENT_CODES = frozenset({"ABORTED", "RequestTimeout", "RequestTimeoutException"})

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
    ("aiohttp", "InvalidURL"): False,
    ("azure", "ServiceRequestError"): True,
    ("azure", "ServiceResponseError"): True,
    ("botocore", "ConnectionError"): True,
    ("botocore", "HTTPClientError"): True,
    ("botocore", "IncompleteReadError"): True,
    ("http", "BadStatusLine"): True,
    ("http", "IncompleteRead"): True,
    ("httpx", "LocalProtocolError"): False,
    ("httpx", "TransportError"): True,
    ("httpx", "UnsupportedProtocol"): False,
    ("httpx2", "LocalProtocolError"): False,
    ("httpx2", "TransportError"): True,
    ("httpx2", "UnsupportedProtocol"): False,
    ("openai", "APIConnectionError"): True,
    ("requests", "ChunkedEncodingError"): True,
    ("requests", "ConnectionError"): True,
    ("requests", "InvalidSchema"): False,
    ("requests", "InvalidURL"): False,
    ("requests", "MissingSchema"): False,
    ("requests", "Timeout"): True,
    ("urllib3", "NewConnectionError"): True,
    ("urllib3", "ProtocolError"): True,
    ("urllib3", "TimeoutError"): True,
}

LOST_IN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The two of TLS's errors that say no more than that the connection has ended."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later.

    An HTTP status, found on the exception or its `response`, decides alone: 408, 425, 429, 500, 502,
    503, 504 and 529 are transient. A gRPC status counts as the HTTP status that it stands for, but ABORTED
    is transient; so are AWS errors whose code says throttling or timeout, whatever their status, and
    `Throttled`. Without a status, lost connections, timeouts and unreachable networks are, whether they
    are Python's own or those of httpx, requests, urllib3, aiohttp, http.client, botocore, azure-core and
    openai; then the exception behind it is asked: its `reason` (as `urllib.error.URLError` has it),
    `inner_exception`, `__cause__` or first argument. A bad URL, a certificate that does not hold, a host
    that does not exist, or an error in the code is not. Use it in a policy of your own:

    >>> from tenacity import Retrying, retry_if_exception, stop_after_delay
    >>> policy = Retrying(retry=retry_if_exception(is_transient), stop=stop_after_delay(60))

    Args:
        error: What the function raised.

    Returns:
        Whether another attempt makes sense.

    >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
    (True, False)
    """
    return kind_of(error) is not Kind.LASTING


def is_throttled(error: BaseException) -> bool:
    """Whether the API says that the calls are too many."""
    return kind_of(error) is Kind.THROTTLED


def is_timeout(error: BaseException) -> bool:
    """Whether an outage's failure is that the answer is late, as clients say it by classes of their own."""
    known = classified(error)
    if known is not None:
        return known.late
    late = any(isinstance(cause, TimeoutError) for cause in _chain(error))
    return late or any(status_of(asked) == GATEWAY_TIMEOUT for asked in causes(error))


def kind_of(error: BaseException) -> Kind:
    """Returns what a failure says of the API."""
    for asked in causes(error):
        known = classified(asked)
        kind = _kind_by_itself(asked) if known is None else known.kind
        if kind is not None:
            return kind
    return Kind.LASTING


def _kind_by_itself(error: Exception) -> Kind | None:
    """Returns what one exception says of the API; `None`: that its cause has to be asked."""
    code = code_of(error)
    if isinstance(error, Throttled) or code in THROTTLING_CODES:
        return Kind.THROTTLED
    if code in TRANSIENT_CODES:
        return Kind.PASSING
    status = status_of(error)
    if status is not None:
        return _kind_by_status(status, error)
    if any(map(_is_lasting, _chain(error))):
        return Kind.LASTING
    verdict = _verdict_by_class(error)
    return None if verdict is None else Kind.OUTAGE if verdict else Kind.LASTING


def _kind_by_status(status: int, error: Exception) -> Kind:
    if status in THROTTLING_STATUSES or (status == UNAVAILABLE and retry_after(error) is not None):
        return Kind.THROTTLED
    if status in OUTAGE_STATUSES:
        return Kind.OUTAGE
    return Kind.PASSING if status in TRANSIENT_STATUSES else Kind.LASTING


def _verdict_by_class(error: Exception) -> bool | None:
    if isinstance(error, (ConnectionError, TimeoutError, *LOST_IN_TLS)):
        return True
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    verdict = _verdict_by_name(error)
    if verdict is None and isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return verdict


def _verdict_by_name(error: BaseException) -> bool | None:
    return next((TRANSIENT_CLASSES[name] for name in class_names(error) if name in TRANSIENT_CLASSES), None)


def _is_lasting(cause: BaseException) -> bool:
    """Whether it is a cause that clients wrap in a connection error although it will not pass."""
    if isinstance(cause, ssl.SSLError):
        return not isinstance(cause, LOST_IN_TLS)
    if isinstance(cause, socket.gaierror):
        return cause.errno != socket.EAI_AGAIN
    return _verdict_by_name(cause) is False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those behind it, named as causes or not."""
    for _ in range(CHAIN_LIMIT):
        if error is None:
            return
        yield error
        error = behind(error) or error.__context__
