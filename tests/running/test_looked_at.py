"""A job that somebody looks into while it runs, with what newer Pythons have for that."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import PATIENCE, as_it_is, until
from forms import each_way
from scripts import running

from twostage import arun_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from forms import Run

NUMBER: Final = 200


def test_tasks_are_called_what_the_user_calls_their_functions() -> None:
    seen: set[str] = set()

    async def fetch_token(item: int) -> int:
        await asyncio.sleep(0)
        seen.update(task.get_name() for task in asyncio.all_tasks())
        return item

    async def fetch_result(token: int) -> int:
        return await fetch_token(token)

    async def source() -> AsyncIterator[int]:
        for item in range(NUMBER):
            seen.update(task.get_name() for task in asyncio.all_tasks())
            yield item

    inside = f"{test_tasks_are_called_what_the_user_calls_their_functions.__name__}.<locals>."
    names = {"twostage: stage one", "twostage: stage two"}
    names |= {f"twostage: stage one, {inside}fetch_token", f"twostage: stage two, {inside}fetch_result"}
    run_two_stage(range(NUMBER), fetch_token, fetch_result)
    assert seen >= names
    asyncio.run(arun_two_stage(source(), fetch_token, fetch_result))
    assert seen >= {*names, "twostage: source"}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is new in Python 3.12")
@each_way
def test_job_is_right_while_each_line_of_it_is_monitored(job: Run) -> None:
    monitoring: Any = vars(sys)["monitoring"]
    lines = 0

    def count(*_: object) -> None:
        nonlocal lines
        lines += 1

    monitoring.use_tool_id(monitoring.DEBUGGER_ID, "twostage's tests")
    try:
        monitoring.register_callback(monitoring.DEBUGGER_ID, monitoring.events.LINE, count)
        monitoring.set_events(monitoring.DEBUGGER_ID, monitoring.events.LINE)
        assert job(range(NUMBER), str, int) == list(range(NUMBER))
        assert job(range(NUMBER), as_it_is, str) == [str(item) for item in range(NUMBER)]
    finally:
        monitoring.free_tool_id(monitoring.DEBUGGER_ID)
    assert lines > NUMBER


# --- from another process

JOB: Final = """
    import asyncio, sys, threading
    from twostage import arun_two_stage, run_two_stage

    goes_on = threading.Event()

    async def fetch_token(item):
        return item

    async def fetch_result(token):
        if token < 100:
            return token
        print("running", flush=True)
        while not goes_on.is_set():
            await asyncio.sleep(0.001)
        return token

    threading.Thread(target=lambda: (sys.stdin.readline(), goes_on.set()), daemon=True).start()
    job = range(101), fetch_token, fetch_result
    print(sum(FORM))
"""


@contextmanager
def running_job(form: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a job whose last call waits for a line; and sees to it that it ends well."""
    with running(JOB.replace("FORM", form), options=()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
        output, errors = process.communicate("\n", timeout=PATIENCE)
        assert (output, errors) == (f"{sum(range(101))}\n", "")


@pytest.mark.skipif(sys.version_info < (3, 14), reason="remote debugging is new in Python 3.14")
class TestFromAnotherProcess:
    def test_debugger_that_is_attached_does_no_harm(self, tmp_path: Path) -> None:
        script, seen = tmp_path / "look.py", tmp_path / "seen"
        script.write_text(
            "import os, threading\n"
            f"with open({str(tmp_path / 'part')!r}, 'w') as file:\n"
            "    file.write(' '.join(thread.name for thread in threading.enumerate()))\n"
            f"os.rename({str(tmp_path / 'part')!r}, {str(seen)!r})\n"
        )
        remote_exec: Any = vars(sys)["remote_exec"]
        with running_job("run_two_stage(*job)") as process:
            try:
                remote_exec(process.pid, str(script))
            except PermissionError:
                process.communicate("\n")
                pytest.skip("this system lets no process look into another one")
            until(seen.exists, "the debugger's script")
        assert {"twostage-coordinator", "twostage-loop"} <= set(seen.read_text().split())

    def test_asyncio_ps_lists_the_users_functions(self) -> None:
        # In other threads than the main one 3.14 sees no loop; 3.15 does.
        with running_job("asyncio.run(arun_two_stage(*job))") as process:
            listed = subprocess.run(  # noqa: S603 - Python's own
                [sys.executable, "-m", "asyncio", "ps", str(process.pid)],
                capture_output=True,
                text=True,
                check=False,
            )
            if "permission" in listed.stderr.lower():
                process.communicate("\n")
                pytest.skip("this system lets no process look into another one")
            assert "twostage: stage two, fetch_result" in listed.stdout, listed.stderr
