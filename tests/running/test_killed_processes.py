"""Processes that are killed, forked or interrupted: not beside interpreters, where a fork crashes on 3.14."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import Counter
from concurrent.futures import BrokenExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from away import die_at, double, fail_until_the_end
from common import PATIENCE, needs_clients
from forms import iterate, iterate_in_order, run
from pools_of_processes import PROCESSES, new_pool
from scripts import ran, running

from twostage import Stage, run_two_stage

if TYPE_CHECKING:
    import subprocess
    from contextlib import AbstractContextManager
    from pathlib import Path

    from forms import Run


@pytest.mark.parametrize("kind", PROCESSES)
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


# --- fork


def script(folder: Path, text: str, *options: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return running(text, options=options, file=folder / "script.py")


FORK: Final = """
    import threading
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from twostage import Stage, iter_two_stage, run_two_stage

    def who(item):
        return threading.current_thread().name

    def several(name):
        return name, threading.active_count()

    if __name__ == "__main__":
        BEFORE
        with ProcessPoolExecutor(2, get_context("fork")) as pool:
            results = run_two_stage(range(20), Stage(who, executor=pool), Stage(several, executor=pool))
            print(set(results), flush=True)
            run_two_stage(range(20), Stage(who, executor=pool), len)
        AFTER
"""


def forked(tmp_path: Path, before: str = "", after: str = "") -> tuple[str, str]:
    text = FORK.replace("BEFORE", before or "pass").replace("AFTER", after or "pass")
    with script(tmp_path, text, "-W", "always") as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output, errors


def test_fork_is_done_before_there_are_threads_of_ours_and_without_a_warning(tmp_path: Path) -> None:
    assert forked(tmp_path) == ("{('MainThread', 1)}\n", "")


def test_fork_beside_a_thread_is_warned_of_once_at_the_users_line(tmp_path: Path) -> None:
    over = "over = threading.Event(); threading.Thread(target=over.wait).start()"
    output, errors = forked(tmp_path, over, "over.set()")
    assert output == "{('MainThread', 1)}\n"
    ours = [line for line in errors.splitlines() if "RuntimeWarning" in line]
    assert len(ours) == 1
    assert "script.py:16: RuntimeWarning: the executor's processes were forked while 2 threads ran" in ours[0]
    assert 'mp_context=multiprocessing.get_context("spawn")' in ours[0]


@pytest.mark.parametrize("kind", ["spawn", "forkserver", "loky"])
def test_other_ways_to_start_a_process_are_not_warned_of(kind: str) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        with new_pool(kind, 1) as pool:
            assert run_two_stage(range(3), double, Stage(double, executor=pool)) == [0, 4, 8]
    finally:
        over.set()
        thread.join()


def test_importing_the_library_imports_nothing_of_processes() -> None:
    code = "import sys, twostage; print([name for name in sys.modules if 'multiprocessing' in name])"
    assert ran(code).stdout == "[]\n"


# --- Ctrl-C

INTERRUPTED: Final = """
    import os, time
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from twostage import Stage, run_two_stage

    def say(text):
        os.write(1, f"{text}\\n".encode())

    class Item:
        def __init__(self, number):
            self.number = number

        def __reduce__(self):  # in the main process, when it leaves
            say("left")
            return int, (self.number,)

    def fetch_result(number):
        say("begun")
        for _ in range(60_000 if number < 2 else 0):  # a signal just before a sleep does not wake it
            time.sleep(0.01)
        return number

    if __name__ == "__main__":
        with POOL as pool:
            stage = Stage(fetch_result, executor=pool, workers=WORKERS)
            try:
                run_two_stage(map(Item, range(100)), list, stage, batch_size=100)
            except KeyboardInterrupt:
                say("interrupted")
                raise
"""


@pytest.mark.parametrize(("kind", "workers"), [("fork", 3), ("spawn", 3), ("forkserver", 3), ("loky", 5)])
def test_ctrl_c_ends_the_running_calls_and_begins_no_other(kind: str, workers: int, tmp_path: Path) -> None:
    """So many calls leave for two processes at once; those that wait there can't be cancelled."""
    if kind == "loky":
        needs_clients("loky")
    pool = (
        "__import__('loky').ProcessPoolExecutor(2)"
        if kind == "loky"
        else f"ProcessPoolExecutor(2, get_context({kind!r}))"
    )
    text = INTERRUPTED.replace("POOL", pool).replace("WORKERS", str(workers))
    with script(tmp_path, text) as process:
        assert process.stdout is not None
        said: Counter[str] = Counter()
        while said != {"left": workers, "begun": 2}:
            line = process.stdout.readline()
            assert line, process.communicate()
            said[line.strip()] += 1
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "interrupted\n"
    assert errors.count("Traceback") == 1
    assert errors.endswith("\nKeyboardInterrupt\n")
    assert process.returncode == -signal.SIGINT
