"""The ways in which the demonstration has twostage do its job if faults are ordered by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tenacity import RetryCallState, Retrying, retry_if_exception, retry_if_result, wait_random_exponential

from twostage import Stage, is_transient, run_two_stage
from twostage.demo.answers import ExpiredToken, is_pending

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from twostage.demo.client import Client

__all__ = ["PATIENT", "both_by_key", "by_key", "one_item_a_call", "orders_by_key"]


def asked_often_enough(state: RetryCallState) -> bool:
    """Whether it was asked for twenty times and the last request did not fail, or forty times.

    An id that is always left out does not exist; but a request that fails does not say so, and an outage
    fails several of one call's in a row.
    """
    error = state.outcome and state.outcome.exception()
    return state.attempt_number >= (40 if error and is_transient(error) else 20)


PATIENT: Final = Retrying(
    retry=retry_if_exception(is_transient) | retry_if_result(is_pending),
    stop=asked_often_enough,
    wait=wait_random_exponential(multiplier=0.02, max=0.2),
)
"""The policy where faults are named: a result that is not ready yet is asked for again, too."""


def one_item_a_call(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[object]:
    """The two stages without batches."""
    workers = options.result_workers
    return through_faults(
        options,
        items,
        Stage(client.fetch_token, workers=workers),
        Stage(client.fetch_result, workers=workers),
    )


def by_key(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[object]:
    """The two stages, the first in batches that are answered by key."""
    return through_faults(
        options,
        items,
        Stage(client.fetch_keyed_tokens, **by_key_options(options, options.token_workers)),
        Stage(client.fetch_result, workers=options.result_workers),
    )


def both_by_key(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[object]:
    """The two stages, both in batches that are answered by key."""
    return through_faults(
        options,
        items,
        Stage(client.fetch_keyed_tokens, **by_key_options(options, options.token_workers)),
        Stage(client.fetch_results, **by_key_options(options, options.result_workers)),
    )


def orders_by_key(client: Client, items: Sequence[int], options: argparse.Namespace) -> list[object]:
    """The two stages, the first in batches that are answered by key, with any number of tokens an item."""
    return through_faults(
        options,
        items,
        Stage(client.fetch_keyed_orders, many=True, **by_key_options(options, options.token_workers)),
        Stage(client.fetch_result, workers=options.result_workers),
    )


def by_key_options(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Returns what a stage is told of batches that are answered by key."""
    # What an API has only left out for now is not told from what does not exist: both are asked for again.
    return {
        "batch_size": options.batch_size,
        "workers": workers,
        "retry_missing": "unprocessed" in options.faults,
    }


def through_faults(
    options: argparse.Namespace, items: Sequence[int], first: Stage[Any, Any], second: Stage[Any, Any]
) -> list[object]:
    """Runs a job that ends with an outcome for each item, whatever is ordered."""
    return run_two_stage(
        items,
        first,
        second,
        retry=PATIENT,
        refresh_token_on=ExpiredToken,
        return_exceptions=True,
        trace=options.trace,
        progress=options.progress,
    )
