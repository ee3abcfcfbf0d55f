"""Pools of each kind that a stage may run in."""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Final

from common import needs_clients

PROCESSES: Final = ("fork", "spawn", "forkserver", "loky")


def new_pool(kind: str, processes: int = 2) -> Executor:
    if kind == "loky":
        needs_clients("loky")
        import loky  # noqa: PLC0415 - it may not be there

        loky_pool: Executor = loky.ProcessPoolExecutor(processes)
        return loky_pool
    if sys.version_info >= (3, 14) and kind == "interpreters":
        from concurrent.futures import InterpreterPoolExecutor  # noqa: PLC0415 - other Pythons have none

        return InterpreterPoolExecutor(processes)
    pool = ProcessPoolExecutor(processes, get_context(kind))
    if kind == "fork":
        with warnings.catch_warnings():  # other tests' clients may have threads
            warnings.simplefilter("ignore")
            pool.submit(int)
    return pool
