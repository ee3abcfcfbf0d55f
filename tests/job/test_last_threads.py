"""Where no thread can be started any more, and where the interpreter ends: the job does as well."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from common import ALWAYS, ours, source_of
from forms import Run, each_way
from scripts import ran

if TYPE_CHECKING:
    from collections.abc import Callable


# --- threads that cannot be started


@each_way
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_submit_that_raises_ends_the_job_and_repeats_no_call(
    job: Run, monkeypatch: pytest.MonkeyPatch, *, queued: bool, return_exceptions: bool
) -> None:
    """Python's own raises when no thread can be started, and may have queued the call by then."""
    for nth in (1, 2, 3, 5):
        with monkeypatch.context() as patch:
            ends_at_submit(nth, job, patch, queued=queued, return_exceptions=return_exceptions)


def ends_at_submit(
    nth: int, job: Run, monkeypatch: pytest.MonkeyPatch, *, queued: bool, return_exceptions: bool
) -> None:
    submit, counted = ThreadPoolExecutor.submit, itertools.count(1)
    begun: list[tuple[int, int]] = []
    done: list[tuple[int, int]] = []
    error = RuntimeError("can't start new thread")

    def fail_once(pool: ThreadPoolExecutor, *call: Any) -> object:  # noqa: ANN401 - any call
        fails = next(counted) == nth
        future = None if fails and not queued else submit(pool, *call)
        if fails:
            raise error
        return future

    def fetch(stage: int) -> Callable[[int], int]:
        def call(number: int) -> int:
            begun.append((stage, number))
            time.sleep(0.001)  # the tasks that run are not enough for all of it
            done.append((stage, number))
            return number

        return call

    monkeypatch.setattr(ThreadPoolExecutor, "submit", fail_once)
    closed: list[str] = []
    with pytest.raises(RuntimeError) as raised:
        job(
            source_of(itertools.count(), closed),
            fetch(1),
            fetch(2),
            retry=ALWAYS,
            return_exceptions=return_exceptions,
        )
    assert raised.value is error
    assert len(set(begun)) == len(begun)
    assert sorted(done) == sorted(begun)
    assert len(closed) == 1
    assert not ours()


@each_way
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_thread_that_cannot_be_started_ends_the_job(
    nth: int, job: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is the coordinator's."""
    start, counted = threading.Thread.start, itertools.count(1)
    monkeypatch.setattr("twostage.job.driver.LONGEST_GET", 0.01)

    def fail_once(thread: threading.Thread) -> None:
        if thread.name.startswith("twostage") and next(counted) == nth:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    begun: list[int] = []
    source = (number for number in itertools.count())

    def fetch(number: int) -> int:
        begun.append(number)
        time.sleep(0.001)
        return number

    with pytest.raises(RuntimeError, match="can't start new thread"):
        job(source, fetch, int)
    assert len(set(begun)) == len(begun)
    assert list(source) == []  # closed: it would go on for ever
    assert not ours()


# --- the interpreter's end


SCRIPT = """
    import atexit, itertools, sys, threading, time
    from concurrent.futures import ThreadPoolExecutor
    from twostage import Stage, iter_two_stage

    over = threading.Event()
    late = []

    def fetch_tokens(items):
        late.extend(items[:over.is_set()])
        return items

    def fetch_result(token):
        if over.is_set():
            late.append(token)
        time.sleep(0.02)
        return token

    # Hooks run when no thread of a pool is left.
    atexit.register(lambda: print(len(late)))
    EXECUTOR = None
    outcomes = iter_two_stage(
        itertools.count(),
        Stage(fetch_tokens, batch_size=100),
        Stage(fetch_result, workers=4, executor=EXECUTOR),
    )
    for _ in range(3):
        next(outcomes)
    over.set()
"""


ENDS = {
    "end": ("", 0, ""),
    "exception": ("raise ValueError('of the script')", 1, "ValueError: of the script"),
    "exit": ("sys.exit(3)", 3, ""),
}


@pytest.mark.parametrize(
    ("executor", "last_line", "code", "last_word"),
    [
        pytest.param(
            executor,
            *end,
            id=f"{executor}-{name}",
            # Workers of our own go on for half a second: with one end of the three that is enough.
            marks=[pytest.mark.slow] * (executor == "None" and name != "end"),
        )
        for executor in ("None", "ThreadPoolExecutor(2)")
        for name, end in ENDS.items()
    ],
)
def test_script_ends_though_an_iterator_is_left(
    last_line: str, code: int, last_word: str, executor: str
) -> None:
    """Some 800 calls of 20 ms wait for four workers, each of which may go on for half a second."""
    process = ran(dedent(SCRIPT).replace("EXECUTOR = None", f"EXECUTOR = {executor}") + last_line)
    assert process.returncode == code
    assert process.stderr.count("Traceback") == (last_word != "")
    assert "Exception" not in process.stderr  # in a thread, or ignored
    assert process.stderr.endswith(last_word + "\n" if last_word else "")
    assert int(process.stdout) < 300  # 4 * 0.5 s / 20 ms, and some for a slow machine


def test_script_ends_though_an_iterator_with_nothing_to_do_is_left() -> None:
    """It waits for its consumer, who is gone."""
    process = ran(dedent(SCRIPT).replace("time.sleep(0.02)", "pass"))
    assert (process.returncode, process.stderr) == (0, "")
