"""One request by each of the clients that users have: functions of a URL and a time limit, which may raise.

What a client does by itself, tries again, follows or waits, is switched off.
"""

from __future__ import annotations

import asyncio
import http.client
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import aiohttp
import httpx
import pytest
import requests
import urllib3

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = 10.0
"""A time limit that no test reaches."""


def requests_get(url: str, timeout: float = LONG) -> None:
    requests.get(url, timeout=timeout).raise_for_status()


def httpx_get(url: str, timeout: float = LONG) -> None:
    httpx.get(url, timeout=timeout).raise_for_status()


def aiohttp_get(url: str, timeout: float = LONG) -> None:
    async def get() -> None:
        limit = aiohttp.ClientTimeout(timeout)
        async with aiohttp.ClientSession(timeout=limit) as session, session.get(url) as response:
            response.raise_for_status()
            await response.read()

    asyncio.run(get())


def urllib_get(url: str, timeout: float = LONG) -> None:
    try:
        # An opener of its own: the shared one keeps the proxies that it was made with.
        with urllib.request.build_opener().open(url, timeout=timeout) as response:
            response.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise


def urllib3_get(url: str, timeout: float = LONG) -> None:
    with urllib3.PoolManager() as pool:
        pool.request("GET", url, timeout=timeout)


def urllib3_get_once(url: str, timeout: float = LONG) -> None:
    with urllib3.PoolManager() as pool:
        pool.request("GET", url, timeout=timeout, retries=False)


class RefusedError(Exception):
    """As a user makes it of an answer by a client that raises nothing for a status."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        super().__init__(f"status {response.status}")
        self.response = response


def urllib3_get_checked(url: str, timeout: float = LONG) -> None:
    with urllib3.PoolManager() as pool:
        response = pool.request("GET", url, timeout=timeout, retries=False)
    if response.status >= http.client.BAD_REQUEST:
        raise RefusedError(response)


def http_client_get(url: str, timeout: float = LONG) -> None:
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = kind(host, timeout=timeout)
    try:
        connection.request("GET", f"/{path}")
        connection.getresponse().read()
    finally:
        connection.close()


def failure_of(get: Callable[..., None], url: str, timeout: float = LONG, **settings: str) -> Exception:
    """Returns what the client raises."""
    try:
        get(url, timeout, **settings)
    except Exception as error:  # noqa: BLE001 - whatever the client raises
        return error
    pytest.fail("the request did not fail")
