"""What a type checker says of the public face: never run, but checked by mypy with everything else.

An `assert_type` is what has to be inferred. A `type: ignore` is what has to be refused: mypy reports
each that is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, assert_type

from tenacity import AsyncRetrying, Retrying, stop_after_attempt

from twostage import (
    AsyncExecutor,
    AsyncOutcomes,
    BatchLengthError,
    Outcome,
    Outcomes,
    Shards,
    Stage,
    aiter_two_stage,
    arun_two_stage,
    is_transient,
    iter_two_stage,
    run_two_stage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from concurrent.futures import Executor
    from pathlib import Path


class Token:
    """What the API gives for an id."""


class SignedToken(Token):
    """A kind of it."""


class Report:
    """What the API gives for a token."""

    pages: int


def fetch_token(item: int) -> Token:
    raise NotImplementedError


def fetch_tokens(items: list[int]) -> list[Token]:
    raise NotImplementedError


def fetch_tuple(items: Sequence[int]) -> tuple[Token, ...]:
    raise NotImplementedError


def fetch_signed(item: int) -> SignedToken:
    raise NotImplementedError


def fetch_report(token: Token) -> Report:
    raise NotImplementedError


def read(path: Path) -> Iterator[int]:
    raise NotImplementedError


# --- run_two_stage


def plain_functions(ids: list[int], *, flag: bool) -> None:
    assert_type(run_two_stage(ids, fetch_token, fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_token, fetch_report, return_exceptions=False), list[Report])
    assert_type(
        run_two_stage(ids, fetch_token, fetch_report, return_exceptions=True), list[Report | Exception]
    )
    assert_type(
        run_two_stage(ids, fetch_token, fetch_report, return_exceptions=flag), list[Report | Exception]
    )
    assert_type(run_two_stage(ids, fetch_token, fetch_report, batch_size=None), list[Report])
    assert_type(
        run_two_stage(
            ids, fetch_token, fetch_report, token_workers=8, result_workers=64, retry=3, window=500
        ),
        list[Report],
    )


def plain_functions_in_batches(ids: list[int], *, flag: bool) -> None:
    assert_type(run_two_stage(ids, fetch_tokens, fetch_report, batch_size=100), list[Report])
    assert_type(run_two_stage(ids, fetch_tuple, fetch_report, batch_size=100), list[Report])
    assert_type(
        run_two_stage(ids, fetch_tokens, fetch_report, batch_size=100, return_exceptions=False), list[Report]
    )
    assert_type(
        run_two_stage(ids, fetch_tokens, fetch_report, batch_size=100, return_exceptions=True),
        list[Report | Exception],
    )
    assert_type(
        run_two_stage(ids, fetch_tokens, fetch_report, batch_size=100, return_exceptions=flag),
        list[Report | Exception],
    )


def sources(path: Path) -> None:
    assert_type(run_two_stage(range(9), fetch_token, fetch_report), list[Report])
    assert_type(run_two_stage({1, 2}, fetch_token, fetch_report), list[Report])
    assert_type(run_two_stage({1: "a"}, fetch_token, fetch_report), list[Report])
    assert_type(run_two_stage(read(path), fetch_tokens, fetch_report, batch_size=9), list[Report])
    assert_type(run_two_stage((int(line) for line in path.open()), fetch_token, fetch_report), list[Report])
    assert_type(run_two_stage("abc", ord, chr), list[str])


def lambdas(ids: list[int]) -> None:
    assert_type(run_two_stage(ids, lambda item: str(item + 1), lambda token: len(token.upper())), list[int])
    assert_type(
        run_two_stage(
            ids,
            lambda batch: [str(item + 1) for item in batch],
            lambda token: len(token.upper()),
            batch_size=2,
        ),
        list[int],
    )
    assert_type(
        run_two_stage(
            ids,
            lambda batch: [fetch_token(item) for item in batch],
            lambda token: fetch_report(token).pages,
            batch_size=2,
            return_exceptions=True,
        ),
        list[int | Exception],
    )
    assert_type(run_two_stage(ids, lambda item: fetch_token(item), fetch_report), list[Report])  # noqa: PLW0108
    assert_type(run_two_stage(ids, fetch_token, lambda token: fetch_report(token).pages), list[int])
    assert_type(run_two_stage(ids, lambda batch: tuple(batch), str, batch_size=2), list[str])  # noqa: PLW0108


def builtins(ids: list[int], words: list[str]) -> None:
    assert_type(run_two_stage(ids, str, len), list[int])
    assert_type(run_two_stage(words, len, str), list[str])
    assert_type(run_two_stage(words, str.upper, ord), list[int])
    assert_type(run_two_stage(words, list, str.upper, batch_size=2), list[str])


def wider_and_narrower(ids: list[int], bits: list[bool]) -> None:
    assert_type(run_two_stage(bits, fetch_token, fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_signed, fetch_report), list[Report])
    assert_type(run_two_stage(ids, Stage(fetch_signed), fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_signed, Stage(fetch_report)), list[Report])
    signed, second, text = Stage(fetch_signed, workers=2), Stage(fetch_report), Stage(str)
    assert_type(run_two_stage(ids, signed, second), list[Report])
    assert_type(run_two_stage(bits, Stage(fetch_token), second), list[Report])
    assert_type(run_two_stage(ids, text, len), list[int])
    assert_type(run_two_stage(ids, text, Stage(len)), list[int])


# --- Stage


def stages(executor: Executor, policy: Retrying) -> None:
    assert_type(Stage(fetch_token), Stage[int, Token])
    assert_type(Stage(fetch_token, batch_size=None), Stage[int, Token])
    assert_type(Stage(fetch_token, workers=8, executor=executor, retry=policy), Stage[int, Token])
    assert_type(Stage(fetch_report, workers=8, executor=None, retry=None), Stage[Token, Report])
    assert_type(Stage(fetch_tokens, batch_size=100), Stage[int, Token])
    assert_type(Stage(fetch_tuple, batch_size=100, workers=4, retry=3), Stage[int, Token])
    assert_type(Stage(fetch_tokens), Stage[list[int], list[Token]])  # a list is one item here
    assert_type(Stage(str), Stage[object, str])


def stages_of_lambdas() -> tuple[Stage[int, str], Stage[int, str]]:
    # pyright does not look at the declared type for the lambda's argument.
    single: Stage[int, str] = Stage(lambda item: str(item + 1), workers=2)  # pyright: ignore[reportOperatorIssue]
    batch: Stage[int, str] = Stage(
        lambda batch: [str(item + 1) for item in batch],  # pyright: ignore[reportOperatorIssue]
        batch_size=2,
    )
    return single, batch


def jobs_of_stages(ids: list[int], *, flag: bool) -> None:
    single, batch, second = Stage(fetch_token), Stage(fetch_tokens, batch_size=100), Stage(fetch_report)
    assert_type(run_two_stage(ids, single, second), list[Report])
    assert_type(run_two_stage(ids, batch, second), list[Report])
    assert_type(run_two_stage(ids, batch, second, return_exceptions=False), list[Report])
    assert_type(run_two_stage(ids, batch, second, return_exceptions=True), list[Report | Exception])
    assert_type(run_two_stage(ids, batch, second, return_exceptions=flag), list[Report | Exception])
    assert_type(run_two_stage(ids, Stage(fetch_tokens, batch_size=9), Stage(fetch_report)), list[Report])
    assert_type(run_two_stage(ids, Stage(lambda item: str(item)), lambda token: len(token)), list[int])  # noqa: PLW0108


def jobs_of_both(ids: list[int]) -> None:
    assert_type(run_two_stage(ids, fetch_token, Stage(fetch_report)), list[Report])
    assert_type(run_two_stage(ids, Stage(fetch_token), fetch_report), list[Report])
    assert_type(run_two_stage(ids, Stage(fetch_tokens, batch_size=9), fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_tokens, Stage(fetch_report), batch_size=9), list[Report])
    assert_type(
        run_two_stage(ids, fetch_tokens, Stage(fetch_report), batch_size=9, return_exceptions=True),
        list[Report | Exception],
    )
    assert_type(
        run_two_stage(ids, Stage(fetch_tokens, batch_size=9), lambda token: fetch_report(token).pages),
        list[int],
    )
    assert_type(run_two_stage(ids, Stage(fetch_token), fetch_report, token_workers=3), list[Report])
    assert_type(run_two_stage(ids, Stage(fetch_tokens, workers=2), fetch_report, batch_size=9), list[Report])
    unbatched = Stage(fetch_tokens, workers=2)
    assert_type(iter_two_stage(ids, unbatched, fetch_report, batch_size=9), Outcomes[int, Token, Report])


# --- iter_two_stage


def outcomes(ids: list[int], *, flag: bool) -> None:
    assert_type(iter_two_stage(ids, fetch_token, fetch_report), Outcomes[int, Token, Report])
    assert_type(
        iter_two_stage(ids, fetch_token, fetch_report, ordered=True, return_exceptions=True),
        Outcomes[int, Token, Report],
    )
    assert_type(
        iter_two_stage(ids, fetch_token, fetch_report, ordered=flag, return_exceptions=flag),
        Outcomes[int, Token, Report],
    )
    assert_type(iter_two_stage(ids, fetch_tokens, fetch_report, batch_size=9), Outcomes[int, Token, Report])
    assert_type(
        iter_two_stage(ids, fetch_tuple, fetch_report, batch_size=9, return_exceptions=flag, window=99),
        Outcomes[int, Token, Report],
    )
    assert_type(iter_two_stage(ids, Stage(fetch_token), Stage(fetch_report)), Outcomes[int, Token, Report])
    assert_type(
        iter_two_stage(ids, Stage(fetch_tokens, batch_size=9), fetch_report), Outcomes[int, Token, Report]
    )
    assert_type(
        iter_two_stage(ids, fetch_tokens, Stage(fetch_report), batch_size=9), Outcomes[int, Token, Report]
    )
    assert_type(
        iter_two_stage(ids, lambda item: str(item + 1), lambda token: len(token.upper())),
        Outcomes[int, str, int],
    )
    assert_type(
        iter_two_stage(
            ids,
            lambda batch: [str(item + 1) for item in batch],
            lambda token: len(token.upper()),
            batch_size=2,
        ),
        Outcomes[int, str, int],
    )
    assert_type(iter_two_stage("abc", ord, chr), Outcomes[str, int, str])


def each_outcome(ids: list[int]) -> Iterator[Report]:
    with iter_two_stage(ids, fetch_token, fetch_report) as job:
        assert_type(job, Outcomes[int, Token, Report])
        assert_type(next(job), Outcome[int, Token, Report])
        assert_type(iter(job), Iterator[Outcome[int, Token, Report]])
        for outcome in job:
            assert_type(outcome, Outcome[int, Token, Report])
            assert_type(outcome.index, int)
            assert_type(outcome.item, int)
            assert_type(outcome.token, Token | None)
            assert_type(outcome.result, Report)
            assert_type(outcome.exception, Exception | None)
            assert_type(outcome.token_attempts, int)
            assert_type(outcome.result_attempts, int)
            yield outcome.result
    job.close()


# --- coroutine functions, and async code


async def fetch_later(item: int) -> Token:
    raise NotImplementedError


async def fetch_all_later(items: list[int]) -> list[Token]:
    raise NotImplementedError


async def fetch_many_later(item: int) -> list[Token]:
    raise NotImplementedError


async def fetch_report_later(token: Token) -> Report:
    raise NotImplementedError


class Client:
    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(self, *_: object) -> None:
        raise NotImplementedError


async def fetch_by(token: Token, client: Client) -> Report:
    raise NotImplementedError


async def fetch_all_by(items: list[int], client: Client) -> list[Token]:
    raise NotImplementedError


def coroutine_functions(ids: list[int]) -> None:
    assert_type(run_two_stage(ids, fetch_later, fetch_report_later), list[Report])
    assert_type(run_two_stage(ids, fetch_later, fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_token, fetch_report_later), list[Report])
    assert_type(run_two_stage(ids, fetch_all_later, fetch_report_later, batch_size=9), list[Report])
    assert_type(run_two_stage(ids, fetch_tokens, fetch_report_later, batch_size=9), list[Report])
    assert_type(run_two_stage(ids, fetch_many_later, fetch_report_later, many=True), list[list[Report]])
    assert_type(
        run_two_stage(ids, fetch_later, fetch_report_later, return_exceptions=True), list[Report | Exception]
    )
    assert_type(run_two_stage(ids, Stage(fetch_later), fetch_report_later), list[Report])
    assert_type(run_two_stage(ids, fetch_later, Stage(fetch_report_later)), list[Report])
    assert_type(iter_two_stage(ids, fetch_later, fetch_report_later), Outcomes[int, Token, Report])
    assert_type(iter_two_stage(ids, fetch_later, str), Outcomes[int, Token, str])
    assert_type(iter_two_stage(ids, fetch_token, str), Outcomes[int, Token, str])
    assert_type(Stage(fetch_later), Stage[int, Token])
    assert_type(Stage(fetch_all_later, batch_size=9), Stage[int, Token])
    assert_type(Stage(fetch_by, context=Client), Stage[Token, Report])
    assert_type(Stage(fetch_all_by, batch_size=9, context=Client), Stage[int, Token])
    run_two_stage(ids, fetch_later, ord)  # type: ignore[arg-type] # takes a str, gets a Token
    Stage(fetch_report_later, context=Client)  # type: ignore[arg-type] # takes no client
    Stage(fetch_by)  # type: ignore[arg-type] # needs one


async def from_async_code(ids: list[int], later: AsyncIterator[int]) -> None:
    assert_type(await arun_two_stage(ids, fetch_later, fetch_report_later), list[Report])
    assert_type(await arun_two_stage(later, fetch_later, fetch_report_later), list[Report])
    assert_type(await arun_two_stage(later, fetch_token, fetch_report), list[Report])
    assert_type(await arun_two_stage(ids, fetch_all_later, fetch_report_later, batch_size=9), list[Report])
    assert_type(
        await arun_two_stage(ids, fetch_later, fetch_report_later, return_exceptions=True),
        list[Report | Exception],
    )
    assert_type(
        await arun_two_stage(ids, Stage(fetch_all_by, batch_size=9, context=Client), Stage(fetch_report)),
        list[Report],
    )
    async with aiter_two_stage(later, fetch_later, fetch_report_later, ordered=True) as job:
        assert_type(job, AsyncOutcomes[int, Token, Report])
        async for outcome in job:
            assert_type(outcome, Outcome[int, Token, Report])
    await arun_two_stage(ids, fetch_later, ord)  # type: ignore[arg-type] # takes a str, gets a Token
    await arun_two_stage(ids, fetch_later, fetch_report, ordered=True)  # type: ignore[call-overload]


def executors() -> None:
    with AsyncExecutor() as executor:
        assert_type(executor.submit(fetch_later, 1), Future[Token])
        executor.submit(fetch_later, "1")  # type: ignore[arg-type]


def others(error: BatchLengthError) -> None:
    assert_type(error.expected, int)
    assert_type(error.returned, int)
    assert_type(is_transient(error), bool)


# --- functions that say nothing of what they return, as those without annotations and of most clients


def fetch_anything(item: int) -> Any:  # noqa: ANN401 - as JSON is
    raise NotImplementedError


def fetch_all_of_anything(items: list[int]) -> Any:  # noqa: ANN401
    raise NotImplementedError


async def fetch_anything_later(item: int) -> Any:  # noqa: ANN401
    raise NotImplementedError


def report_on_anything(token: Any) -> Report:  # noqa: ANN401
    raise NotImplementedError


def anything_of_a_token(token: Token) -> Any:  # noqa: ANN401
    raise NotImplementedError


async def anything_of_a_token_later(token: Token) -> Any:  # noqa: ANN401
    raise NotImplementedError


def any_at_either_stage(ids: list[int]) -> None:
    """Where rows of different results match, mypy says no more than `Any`, and pyright takes the first."""
    assert_type(run_two_stage(ids, fetch_anything, fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_anything, report_on_anything), list[Report])
    assert_type(run_two_stage(ids, fetch_anything_later, fetch_report), list[Report])
    assert_type(run_two_stage(ids, fetch_anything, fetch_report_later), list[Any])  # pyright: ignore[reportAssertTypeFailure]
    assert_type(run_two_stage(ids, fetch_all_of_anything, fetch_report, batch_size=9), list[Report])
    assert_type(run_two_stage(ids, Stage(fetch_anything), fetch_report), list[Any])  # pyright: ignore[reportAssertTypeFailure]
    assert_type(run_two_stage(ids, fetch_token, anything_of_a_token), list[Any])
    assert_type(run_two_stage(ids, fetch_token, anything_of_a_token_later), list[Any])
    assert_type(run_two_stage(ids, fetch_tokens, anything_of_a_token, batch_size=9), list[Any])
    assert_type(run_two_stage(ids, fetch_token, Stage(anything_of_a_token)), list[Any])
    assert_type(iter_two_stage(ids, fetch_token, anything_of_a_token), Outcomes[int, Token, Any])


async def any_in_async_code(ids: list[int]) -> None:
    assert_type(await arun_two_stage(ids, fetch_anything_later, fetch_report), list[Report])
    assert_type(await arun_two_stage(ids, fetch_token, anything_of_a_token_later), Any)  # pyright: ignore[reportAssertTypeFailure]


# --- each function with lambdas in each place, and with each kind of stage


async def lambdas_everywhere(ids: list[int]) -> None:
    assert_type(iter_two_stage(ids, lambda item: str(item + 1), len), Outcomes[int, str, int])
    assert_type(iter_two_stage(ids, str, lambda token: len(token.upper())), Outcomes[int, str, int])
    assert_type(
        iter_two_stage(ids, lambda batch: [str(item + 1) for item in batch], len, batch_size=2),
        Outcomes[int, str, int],
    )
    assert_type(await arun_two_stage(ids, lambda item: str(item + 1), lambda token: len(token)), list[int])  # noqa: PLW0108
    assert_type(
        await arun_two_stage(ids, lambda batch: [str(item + 1) for item in batch], len, batch_size=2),
        list[int],
    )
    assert_type(aiter_two_stage(ids, lambda item: str(item + 1), len), AsyncOutcomes[int, str, int])
    assert_type(
        run_two_stage(ids, lambda item: [item, item + 1], lambda token: str(token + 1), many=True),
        list[list[str]],
    )


async def each_function_with_each_kind_of_stage(ids: list[int]) -> None:
    one, batch, second = Stage(fetch_token), Stage(fetch_tokens, batch_size=9), Stage(fetch_report)
    later, with_client = Stage(fetch_later), Stage(fetch_all_by, batch_size=9, context=Client)
    assert_type(iter_two_stage(ids, one, second), Outcomes[int, Token, Report])
    assert_type(iter_two_stage(ids, batch, second), Outcomes[int, Token, Report])
    assert_type(iter_two_stage(ids, later, second), Outcomes[int, Token, Report])
    assert_type(iter_two_stage(ids, with_client, fetch_report_later), Outcomes[int, Token, Report])
    assert_type(iter_two_stage(ids, fetch_tokens, second, batch_size=9), Outcomes[int, Token, Report])
    assert_type(await arun_two_stage(ids, one, second), list[Report])
    assert_type(await arun_two_stage(ids, batch, second), list[Report])
    assert_type(await arun_two_stage(ids, later, fetch_report), list[Report])
    assert_type(await arun_two_stage(ids, with_client, second), list[Report])
    assert_type(aiter_two_stage(ids, one, second), AsyncOutcomes[int, Token, Report])
    assert_type(aiter_two_stage(ids, batch, fetch_report), AsyncOutcomes[int, Token, Report])
    assert_type(aiter_two_stage(ids, later, fetch_report_later), AsyncOutcomes[int, Token, Report])
    assert_type(aiter_two_stage(ids, with_client, second), AsyncOutcomes[int, Token, Report])


# --- what has to be refused


def fetch_mapping(items: list[int]) -> dict[int, Token]:
    raise NotImplementedError


def generate_tokens(items: list[int]) -> Iterator[Token]:
    raise NotImplementedError


def wrong_functions(ids: list[int], words: list[str]) -> None:
    run_two_stage(words, fetch_token, fetch_report)  # type: ignore[arg-type] # takes an int, gets a str
    run_two_stage(ids, fetch_token, ord)  # type: ignore[arg-type, misc] # takes a str, gets a Token
    run_two_stage(ids, fetch_token, Stage(ord))  # type: ignore[arg-type] # the same
    run_two_stage(ids, fetch_tokens, fetch_report)  # type: ignore[arg-type] # no batch_size
    run_two_stage(ids, fetch_token, fetch_report, batch_size=9)  # type: ignore[arg-type] # takes one item
    run_two_stage(ids, generate_tokens, fetch_report, batch_size=9)  # type: ignore[arg-type] # no length
    iter_two_stage(ids, fetch_tokens, fetch_report)  # type: ignore[arg-type] # no batch_size
    iter_two_stage(ids, fetch_token, fetch_report, batch_size=9)  # type: ignore[arg-type] # takes one item
    Stage(fetch_token, batch_size=9)  # type: ignore[arg-type] # takes one item


def wrong_settings(ids: list[int], later: AsyncRetrying) -> None:
    run_two_stage(3, fetch_token, fetch_report)  # type: ignore[call-overload]
    run_two_stage(ids, 3, fetch_report)  # type: ignore[call-overload]
    run_two_stage(ids, fetch_tokens, fetch_report, 9)  # type: ignore[call-overload]
    run_two_stage(ids, fetch_tokens, fetch_report, batch_size="9")  # type: ignore[call-overload]
    run_two_stage(ids, fetch_token, fetch_report, token_workers=None)  # type: ignore[call-overload]
    run_two_stage(ids, fetch_token, fetch_report, window=9.5)  # type: ignore[call-overload]
    run_two_stage(ids, fetch_token, fetch_report, retry=later)  # type: ignore[call-overload]
    run_two_stage(ids, fetch_token, fetch_report, retry=stop_after_attempt(3))  # type: ignore[call-overload]
    run_two_stage(ids, fetch_token, fetch_report, ordered=True)  # type: ignore[call-overload]
    iter_two_stage(ids, fetch_token, fetch_report, workers=3)  # type: ignore[call-overload]
    Stage(fetch_token, workers="8")  # type: ignore[call-overload]
    Stage(fetch_token, executor=8)  # type: ignore[call-overload]
    Stage(fetch_token, retry=later)  # type: ignore[call-overload]
    Stage(fetch_token, rates=3)  # type: ignore[call-overload]


def wrong_hopes(ids: list[int], outcome: Outcome[int, Token, Report], stage: Stage[int, Token]) -> None:
    results: list[Report]
    results = run_two_stage(ids, fetch_token, fetch_report, return_exceptions=True)  # type: ignore[assignment]
    print(results[0].pages, outcome.result.pages)
    print(outcome.result.words)  # type: ignore[attr-defined]
    fetch_report(outcome.token)  # type: ignore[arg-type] # None, if it failed in stage one
    stage.workers = 8  # type: ignore[misc] # frozen


# --- shards


def shards(ids: list[int], executor: Executor, *, flag: bool) -> None:
    """The types are those of a job on one machine."""
    out = Shards(executor, at_once=2)
    assert_type(run_two_stage(ids, fetch_token, fetch_report, shards=out), list[Report])
    assert_type(
        run_two_stage(ids, fetch_tokens, fetch_report, batch_size=9, shards=out, return_exceptions=flag),
        list[Report | Exception],
    )
    assert_type(
        iter_two_stage(ids, Stage(fetch_tokens, batch_size=9), fetch_report, shards=out, ordered=True),
        Outcomes[int, Token, Report],
    )
    run_two_stage(ids, fetch_token, fetch_report, shards=2)  # type: ignore[call-overload]
    run_two_stage(ids, fetch_tokens, fetch_report, shards=out)  # type: ignore[arg-type]
