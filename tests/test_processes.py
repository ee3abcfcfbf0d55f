"""Stages in pools of processes: what becomes of a process that is killed."""

from __future__ import annotations

import warnings
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Final

import loky
import pytest
from away import die_at, double, fail_until_the_end
from common import PATIENCE, iterate, iterate_in_order, run

from twostage import Stage, run_two_stage

if TYPE_CHECKING:
    from common import Run

KINDS: Final = ("fork", "spawn", "forkserver", "loky")


def new_pool(kind: str, processes: int = 2) -> Executor:
    if kind == "loky":
        loky_pool: Executor = loky.ProcessPoolExecutor(processes)
        return loky_pool
    pool = ProcessPoolExecutor(processes, get_context(kind))
    if kind == "fork":
        with warnings.catch_warnings():  # other tests' clients may have threads
            warnings.simplefilter("ignore")
            pool.submit(int)
    return pool


# --- a process that is killed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("job", "return_exceptions"), [(run, True), (iterate, True), (iterate_in_order, False)]
)
def test_killed_process_ends_the_job_as_the_pools_error(
    kind: str, job: Run, *, return_exceptions: bool
) -> None:
    """Its call is the last of all, so that no `submit` says it afterwards."""
    with new_pool(kind) as pool:
        first = Stage(double, executor=pool)
        with pytest.raises(BrokenExecutor) as raised:
            job(
                range(20),
                first,
                Stage(partial(die_at, 38), executor=pool),
                return_exceptions=return_exceptions,
            )
        assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("kind", ["spawn", "loky"])
def test_killed_process_ends_the_job_though_calls_wait_to_be_tried_again(kind: str) -> None:
    with new_pool(kind, 1) as pool, pytest.raises(BrokenExecutor):
        run_two_stage(
            range(4), Stage(double), Stage(fail_until_the_end, executor=pool), return_exceptions=True
        )


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("kind", ["spawn", "loky"])
def test_pool_that_has_ended_before_the_job_is_an_error_and_the_source_is_closed(
    kind: str, *, broken: bool
) -> None:
    source = (number for number in range(9))
    with new_pool(kind, 1) as pool:
        if broken:
            assert isinstance(pool.submit(die_at, 1, 1).exception(PATIENCE), BrokenExecutor)
        pool.shutdown()
        with pytest.raises(BrokenExecutor if broken else RuntimeError, match=r"terminated|after shutdown"):
            run_two_stage(source, Stage(double, executor=pool), double)
    assert list(source) == []  # closed
