"""Shards on MPI: what mpi4py starts, with Debian's OpenMPI, where both are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
    import os

    from mpi4py.futures import MPIPoolExecutor

    from twostage import Shards, run_two_stage


    def fetch_tokens(items):
        return [f"token {item}" for item in items]


    def fetch_result(token):
        return token, os.getpid()


    if __name__ == "__main__":
        with MPIPoolExecutor() as pool:
            shards = Shards(pool, at_once=3, size=100)
            results = run_two_stage(range(1000), fetch_tokens, fetch_result, batch_size=50, shards=shards)
        assert [token for token, _ in results] == [f"token {item}" for item in range(1000)]
        processes = {process for _, process in results}
        print(len(processes), os.getpid() in processes)
"""


def test_shards_run_in_the_processes_of_mpi(tmp_path: Path) -> None:
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("mpiexec is not installed")
    if find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    script = tmp_path / "script.py"
    script.write_text(dedent(SCRIPT), encoding="utf-8")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ran = subprocess.run(  # noqa: S603 - a script of ours
        [mpiexec, "--oversubscribe", "-n", "3", sys.executable, "-m", "mpi4py.futures", script],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, **root},
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "2 False\n"), ran.stderr
