"""The forms of a job, each of which returns results in the items' order: a list, a stream, one in order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from twostage import aiter_two_stage, arun_two_stage, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import Callable

Run: TypeAlias = "Callable[..., list[Any]]"


def run(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    return run_two_stage(*args, **settings)


def iterate(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    results = {}
    with iter_two_stage(*args, **settings) as outcomes:
        for outcome in outcomes:
            assert outcome.index not in results
            results[outcome.index] = outcome.result if outcome.exception is None else outcome.exception
    return [results[index] for index in sorted(results)]


def iterate_in_order(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    with iter_two_stage(*args, ordered=True, **settings) as outcomes:
        return [outcome.result if outcome.exception is None else outcome.exception for outcome in outcomes]


def arun(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    return asyncio.run(arun_two_stage(*args, **settings))


def aiterate(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    async def main() -> list[Any]:
        results = {}
        async with aiter_two_stage(*args, **settings) as outcomes:
            async for outcome in outcomes:
                assert outcome.index not in results
                results[outcome.index] = outcome.result if outcome.exception is None else outcome.exception
        return [results[index] for index in sorted(results)]

    return asyncio.run(main())


def aiterate_in_order(*args: Any, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
    async def main() -> list[Any]:
        async with aiter_two_stage(*args, ordered=True, **settings) as outcomes:
            return [
                outcome.result if outcome.exception is None else outcome.exception
                async for outcome in outcomes
            ]

    return asyncio.run(main())


FORMS = [run, iterate, iterate_in_order]
ASYNC_FORMS = [arun, aiterate, aiterate_in_order]

each_way = pytest.mark.parametrize("job", FORMS)
each_async_way = pytest.mark.parametrize("job", ASYNC_FORMS)
