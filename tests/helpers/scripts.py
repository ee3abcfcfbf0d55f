"""Scripts in a Python of their own, as a user runs them: to their end, or until they say something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from textwrap import dedent
from typing import TYPE_CHECKING

from common import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STRICT = ("-W", "error")


def ran(
    script: str, *arguments: str, options: tuple[str, ...] = STRICT, patience: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return subprocess.run(  # noqa: S603 - a script of the tests
        [sys.executable, *options, "-c", dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )


@contextmanager
def running(
    *parts: str, options: tuple[str, ...] = STRICT, file: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Runs a script, which is no more there afterwards.

    Args:
        parts: The script's, each indented as it likes.
        options: Of Python.
        file: Where it is written to, if other processes are to import it. Those are of its group, and are
            killed with it.
    """
    text = "".join(map(dedent, parts))
    if file is not None:
        file.write_text(text)
    with subprocess.Popen(  # noqa: S603 - as above
        [sys.executable, *options, *(["-c", text] if file is None else [file])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=file is not None,
    ) as process:
        try:
            yield process
        finally:
            if file is None:
                process.kill()
            else:
                with suppress(ProcessLookupError):  # there is nobody left, unless the test has failed
                    os.killpg(process.pid, signal.SIGKILL)


def interrupt_when(line: str, process: subprocess.Popen[str]) -> None:
    """Waits for a line of the process, then interrupts it."""
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"
    process.send_signal(signal.SIGINT)
