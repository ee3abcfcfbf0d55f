"""Functions for Dask's workers, which import them: they ask the API that they are told."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

from twostage.demo.client import Client

DEADLY = 21


@cache
def client(url: str) -> Client:
    return Client(url, 30)


def fetch_tokens(url: str, items: list[int]) -> list[Any]:
    return client(url).fetch_tokens(items)


def fetch_results(url: str, last_token: str, killed: str, tokens: list[str]) -> dict[str, Any]:
    """Has its worker killed at one token, the first time that it is asked for."""
    if last_token in tokens and not Path(killed).exists():
        Path(killed).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return client(url).fetch_results(tokens)


def fetch_result(url: str, token: str) -> object:
    return client(url).fetch_result(token)


def die(item: int) -> int:
    if item == DEADLY:
        os._exit(1)
    return item


def fail_at_0(url: str, item: int) -> str:
    if item == 0:
        raise LookupError
    return client(url).fetch_token(item)


def same(token: Any) -> Any:  # noqa: ANN401 - whatever it is
    return token
