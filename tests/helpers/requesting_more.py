"""The same by clients that a part of the users have, which the extra `test-clients` brings."""

# ruff: noqa: E402 - what is imported last may not be there

from __future__ import annotations

from functools import cache
from typing import Any

import requests
from common import needs_clients
from requesting import LONG

needs_clients()

import botocore.config
import botocore.session
import google.api_core.exceptions
import grpc
import httpx2
import openai
from azure.core import PipelineClient
from azure.core.rest import HttpRequest


def httpx2_get(url: str, timeout: float = LONG) -> None:
    httpx2.get(url, timeout=timeout).raise_for_status()


@cache  # it reads the service's description, which takes longer than a call
def botocore_session() -> botocore.session.Session:
    return botocore.session.Session()


def botocore_call(url: str, timeout: float = LONG) -> None:
    client = botocore_session().create_client(
        "dynamodb",
        region_name="us-east-1",
        endpoint_url=url,
        aws_access_key_id="none",
        aws_secret_access_key="none",  # noqa: S106 - nobody's
        config=botocore.config.Config(
            connect_timeout=timeout, read_timeout=timeout, retries={"total_max_attempts": 1}
        ),
    )
    try:
        client.list_tables()
    finally:
        client.close()


def google_get(url: str, timeout: float = LONG) -> None:
    """As Google's clients do it: requests or google-auth carries, google-api-core makes the exception."""
    response = requests.get(url, timeout=timeout)
    if not response.ok:
        raise google.api_core.exceptions.from_http_response(response)


def azure_get(url: str, timeout: float = LONG) -> None:
    with PipelineClient[HttpRequest, Any](url, policies=[]) as client:
        response = client.send_request(
            HttpRequest("GET", url), connection_timeout=timeout, read_timeout=timeout
        )
        response.raise_for_status()


def openai_get(url: str, timeout: float = LONG) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout) as client:
        client.models.list()


def grpc_call(url: str, timeout: float = LONG, method: str = "any") -> None:
    with grpc.insecure_channel(url.partition("://")[2]) as channel:
        channel.unary_unary(f"/twostage/{method}")(b"", timeout=timeout)


def grpc_stream(url: str, timeout: float = LONG, method: str = "any") -> None:
    with grpc.insecure_channel(url.partition("://")[2]) as channel:
        list(channel.unary_stream(f"/twostage/{method}")(b"", timeout=timeout))


def google_grpc_call(url: str, timeout: float = LONG, method: str = "any") -> None:
    try:
        grpc_call(url, timeout, method)
    except grpc.RpcError as error:
        raise google.api_core.exceptions.from_grpc_error(error) from error
