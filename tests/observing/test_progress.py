"""The bar of `progress=True`: what it says, where it is shown, and what is left of it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from forms import each_way, iterate, run
from pacing import asking

from twostage import Progress
from twostage.observing.bar import postfix
from twostage.testing import SimulatedApi, VirtualTime, sleep

if TYPE_CHECKING:
    from forms import Run


@each_way
def test_bar_is_shown_to_its_end(job: Run, capsys: pytest.CaptureFixture[str]) -> None:
    job(range(50), str, str, progress="always")
    shown = capsys.readouterr()
    assert re.search(r"100%\|█+\| 50/50 \[00:00<00:00, [\d.]+item/s, 0\+0 calls\] *\n$", shown.err)
    assert shown.out == ""


def test_bar_says_what_is_where(virtual: VirtualTime, capsys: pytest.CaptureFixture[str]) -> None:
    raised: list[Exception] = [asking(12)]

    def fetch_result(token: str) -> str:
        sleep(1)
        if raised:
            raise raised.pop()
        return token

    run("abc", str, fetch_result, progress="always", result_workers=1)
    shown = capsys.readouterr().err
    assert re.search(r" 0/3 \[.*, 0\+1 calls, 2 tokens wait\]", shown)
    assert re.search(r"0\+0 calls, 2 tokens wait, 1 to retry, stage two paused 12 s by Retry-After\]", shown)
    assert re.search(r" 3/3 \[.*, 0\+0 calls\] *\n$", shown)


def test_postfix_is_short_where_there_is_little_to_say() -> None:
    quiet = Progress(1.0, 5, 0, None, 0, 4, 32, 0, "")
    assert postfix(quiet) == "4+32 calls"
    busy = Progress(1.0, 5, 3, 10, 1234, 4, 32, 7, "API down, probing")
    assert postfix(busy) == "4+32 calls, 1,234 tokens wait, 7 to retry, 3 failed, API down, probing"


def test_bar_without_a_total_counts(capsys: pytest.CaptureFixture[str]) -> None:
    run(iter(range(50)), str, str, progress="always")
    assert re.search(r"50item \[00:00, [\d.]+item/s, 0\+0 calls\] *\n$", capsys.readouterr().err)


def test_nothing_is_printed_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    run(range(50), str, str, progress=True)
    assert capsys.readouterr() == ("", "")


SCRIPT = """
    from twostage import run_two_stage
    run_two_stage(range(50), str, str, progress=True)
"""


def test_bar_is_shown_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(  # noqa: S603 - a script of our own
        [sys.executable, "-c", dedent(SCRIPT)], stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
    os.close(ours)
    assert process.returncode == 0
    assert "50/50" in shown.decode()


def test_notebook_has_its_bar_though_it_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm  # noqa: PLC0415 - this test alone

    notebook: Any = type("tqdm_notebook", (tqdm,), {"__module__": "tqdm.notebook"})
    monkeypatch.setattr("tqdm.auto.tqdm", notebook)
    run(range(50), str, str, progress=True)
    assert "50/50" in capsys.readouterr().err


def test_no_thread_of_tqdm_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    during: list[int] = []

    def fetch(token: str) -> str:
        during.extend(1 for one in threading.enumerate() if "tqdm" in type(one).__module__)
        return token

    run(range(5), str, fetch, progress="always")
    assert during == []
    assert not [one for one in threading.enumerate() if "tqdm" in type(one).__module__]
    assert capsys.readouterr().err


def test_missing_tqdm_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'twostage\[progress\]'"):
        run("a", lambda _: 1 // 0, str, progress=True)
    seen: list[Progress] = []
    run("a", str, str, progress=seen.append)
    assert seen[-1].done == 1


def test_bar_is_closed_if_the_job_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        iterate(range(50), str, lambda _: 1 // 0, progress="always", window=1)
    assert capsys.readouterr().err.endswith("\n")


def test_redraws_are_ten_a_second_at_most(
    virtual: VirtualTime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm.auto import tqdm  # noqa: PLC0415 - this test alone

    drawn: list[float] = []
    display = tqdm.display

    def note(bar: Any, *arguments: Any, **more: Any) -> Any:  # noqa: ANN401 - tqdm's
        drawn.append(virtual.now)
        return display(bar, *arguments, **more)

    monkeypatch.setattr(tqdm, "display", note)
    run(range(1000), SimulatedApi(str, latency=0.01), str, progress="always", token_workers=1)
    assert virtual.now == pytest.approx(10)
    assert 90 <= len(drawn) <= 104  # two at the beginning and two at the end are tqdm's own
    assert capsys.readouterr().err
