"""What an exception carries of an API's answer, whichever client raised it; none is imported for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from twostage.base.kinds import BaseRemoteError, RemoteTraceback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twostage.base.kinds import Classified

__all__ = [
    "CHAIN_LIMIT",
    "behind",
    "causes",
    "class_names",
    "classified",
    "code_of",
    "headers_of",
    "status_of",
]

CHAIN_LIMIT = 10
"""How many causes are looked at; a chain can be a circle."""

# The "HTTP Mapping" of google/rpc/code.proto (in https://github.com/googleapis/googleapis). DATA_LOSS is
# left out: there it is a 500, and a 500 passes, but data that is lost does not come back.
GRPC_STATUSES = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "UNAUTHENTICATED": 401,
}


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
    statuses = [_read(holder, name) for holder, name in holders]
    statuses.append(_item(_item(response, "ResponseMetadata"), "HTTPStatusCode"))  # botocore's
    for status in statuses:
        if isinstance(status, int) and not isinstance(status, bool) and 100 <= status <= 599:  # noqa: PLR2004
            return int(status)
    return GRPC_STATUSES.get(_grpc_code_of(error) or "")


def headers_of(error: BaseException) -> dict[str, str] | None:
    """Returns the headers of the answer that an exception carries, by their names in lower case."""
    response = _read(error, "response")
    holders = [
        _read(response, "headers"),
        _read(error, "headers"),
        _item(_item(response, "ResponseMetadata"), "HTTPHeaders"),  # botocore's
    ]
    for headers in holders:
        try:
            # Not only mappings: an email.message.Message, as urllib has it, is none.
            return {str(name).lower(): str(value) for name, value in headers.items()}  # type: ignore[attr-defined]
        except Exception:  # noqa: BLE001, S112 - mostly there are none; what else they are, we can't know
            continue
    return None


def code_of(error: BaseException) -> str | None:
    """Returns the name that AWS (by botocore) or gRPC gives to the failure, as "SlowDown" or "ABORTED"."""
    code = _item(_item(_read(error, "response"), "Error"), "Code")
    return code if isinstance(code, str) else _grpc_code_of(error)


def classified(error: BaseException) -> Classified | None:
    """Returns what another process has found out about an exception that comes from there."""
    for holder in (error, error.__cause__):
        if isinstance(holder, BaseRemoteError | RemoteTraceback):
            return holder.known
    return None


def causes(error: BaseException) -> Iterator[Exception]:
    """Yields an exception and, one after the other, those that it names as its causes."""
    asked: BaseException | None = error
    for _ in range(CHAIN_LIMIT):
        if not isinstance(asked, Exception):
            return
        yield asked
        asked = behind(asked)


def behind(error: BaseException) -> BaseException | None:
    """Returns the cause that a client names: urllib, urllib3 and azure by an attribute or an argument."""
    named = (_read(error, "reason"), _read(error, "inner_exception"), error.__cause__, *error.args[:1])
    return next((cause for cause in named if isinstance(cause, BaseException)), None)


def class_names(error: BaseException) -> Iterator[tuple[str, str]]:
    """Yields package and name of an exception's class and of those that it derives from, in MRO order."""
    for kind in type(error).__mro__:
        yield kind.__module__.partition(".")[0], kind.__name__


def _grpc_code_of(error: BaseException) -> str | None:
    """Returns the name of the gRPC status that an exception of grpcio or google-api-core carries."""
    code = _read(error, "grpc_status_code")
    if ("grpc", "RpcError") in class_names(error):
        try:
            code = error.code()  # type: ignore[attr-defined] # of each RpcError that is raised for a call
        except Exception:  # noqa: BLE001 - the base class has none
            return None
    name = _read(code, "name")
    return name if isinstance(name, str) else None


def _read(holder: object, name: str) -> object:
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - httpx' `request` raises RuntimeError; whose property it is, we can't know
        return None


def _item(holder: object, key: str) -> object:
    return cast("object", holder.get(key)) if isinstance(holder, Mapping) else None
