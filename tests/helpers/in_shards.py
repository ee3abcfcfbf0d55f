"""Jobs in shards, by settings that a test may put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twostage import Shards, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from twostage import Outcomes


def run_in_shards(  # any job
    *job: Any,  # noqa: ANN401
    executor: Executor,
    at_once: int = 8,
    size: int = 1000,
    **settings: Any,  # noqa: ANN401
) -> list[Any]:
    return run_two_stage(*job, shards=Shards(executor, at_once, size), **settings)


def iterate_in_shards(
    *job: Any,  # noqa: ANN401 - as above
    executor: Executor,
    at_once: int = 8,
    size: int = 1000,
    **settings: Any,  # noqa: ANN401
) -> Outcomes[Any, Any, Any]:
    return iter_two_stage(*job, shards=Shards(executor, at_once, size), **settings)
