"""Ctrl-C: wherever it lands in the caller's half of a job, the job ends, and the caller hears of it."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import PATIENCE, ours, until
from interrupting import SHARES, Interrupter, World, interrupt, interrupt_everywhere
from scripts import interrupt_when, running

from twostage import iter_two_stage, run_two_stage
from twostage.core.coordinator import Coordinator

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from interrupting import Job, Place

FEW: Final[dict[str, Any]] = {"token_workers": 2, "result_workers": 2, "window": 6}


def run(world: World) -> None:
    run_two_stage(world.source(range(7)), list, world.fetch, batch_size=2, **FEW)


def run_that_fails(world: World) -> None:
    run_two_stage(world.source(itertools.count()), list, world.fail, batch_size=2, **FEW)


def run_whose_source_fails(world: World) -> None:
    run_two_stage(world.source(map(int, ["1", "2", "three"])), world.fetch, world.fetch, **FEW)


def loop(world: World) -> None:
    with iter_two_stage(world.source(range(7)), list, world.fetch, batch_size=2, **FEW) as outcomes:
        for _ in outcomes:
            pass


def loop_without_with(world: World) -> None:
    for _ in iter_two_stage(world.source(range(7)), world.fetch, world.fetch, ordered=True, **FEW):
        pass


def loop_that_fails(world: World) -> None:
    for _ in iter_two_stage(world.source(itertools.count()), list, world.fail, batch_size=2, **FEW):
        pass


def loop_that_is_left(world: World) -> None:
    with iter_two_stage(world.source(itertools.count()), world.fetch, world.fetch, **FEW) as outcomes:
        next(outcomes)


def run_that_waits(world: World) -> None:
    run_two_stage(world.source(range(2)), world.linger, world.fetch, **FEW)


JOBS: Final = [
    run,
    run_that_fails,
    run_whose_source_fails,
    run_that_waits,
    loop,
    loop_without_with,
    loop_that_fails,
    loop_that_is_left,
]


# Where interrupts must at least be tried by the jobs together: else the tracing sees too little.
SURE: Final = {
    "Job.__init__",
    "Job.advance",
    "Job._look",
    "Job._read",
    "Job.close",
    "ThreadDriver.start",
    "ThreadDriver.receive",
    "ThreadDriver.join",
}


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has waits looked after often, and collects only when told, and then little."""
    monkeypatch.setattr("twostage.job.driver.LONGEST_GET", 0.002)
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("job", "share"),
    [(job, number % SHARES) for number, job in enumerate(JOBS)]
    + [pytest.param(job, None, marks=pytest.mark.slow) for job in JOBS],
)
def test_interrupt_at_any_line_of_the_caller_s_half_ends_the_job(job: Job, share: int | None) -> None:
    hit = interrupt_everywhere(lambda target: interrupt(job, target), share=share)
    assert hit >= SURE
    assert ("run_two_stage" in hit) != ("Outcomes.__next__" in hit)


def endless_run(world: World) -> None:
    run_two_stage(world.interrupted_source(), list, world.wait, batch_size=100, result_workers=2)


def endless_loop(world: World) -> None:
    next(iter_two_stage(world.interrupted_source(), list, world.wait, batch_size=100, result_workers=2))


def endless_loop_in_with(world: World) -> None:
    with iter_two_stage(
        world.interrupted_source(), list, world.wait, batch_size=100, result_workers=2
    ) as outcomes:
        next(outcomes)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("job", "function"),
    [(endless_run, ""), (endless_loop, ""), (endless_loop_in_with, "ThreadDriver.receive")],
)
def test_second_interrupt_gives_up_the_waiting_and_nothing_else(
    job: Job, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one comes while the source is read; the second at each line after that, or of a function."""
    end = Coordinator.end
    ending = threading.Event()

    def end_and_tell(coordinator: Coordinator, error: BaseException | None) -> None:
        end(coordinator, error)
        ending.set()

    monkeypatch.setattr(Coordinator, "end", end_and_tell)
    hit = interrupt_everywhere(lambda target: give_up(job, target, ending), function)
    assert hit >= {"Job.close", "ThreadDriver.receive"}


def give_up(job: Job, target: Place | None, ending: threading.Event) -> Interrupter:
    """Interrupts a job that has been interrupted, and asserts that control is back while calls run."""
    tracer = sys.gettrace()  # coverage's
    world = World()
    ending.clear()

    def release() -> None:
        if ending.is_set():
            world.release.set()

    interrupter = world.interrupter = Interrupter(target, release)
    try:
        job(world)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
    assert interrupter.hit or world.release.is_set(), target
    gc.collect()
    assert ending.wait(PATIENCE / 2), target
    world.release.set()
    until(lambda: not ours(), target)
    assert world.closed == 1, target
    assert len(world.begun) == 2, target
    return interrupter


# --- real signals

SCRIPT: Final = """
    import atexit, signal, threading, time
    from twostage import iter_two_stage, run_two_stage
    from twostage.core.coordinator import Coordinator

    begun = []

    def ready():
        print("ready", flush=True)

    def fetch_result(token):
        begun.append(token)
        if len(begun) == 4 and CALL_IS_READY:
            ready()
        RUN
        return token

    def source():
        yield from range(1000)
        sleep()

    def sleep():
        ready()
        for _ in range(6000):  # a signal that comes just before a sleep does not wake it
            time.sleep(0.01)

    SETTINGS = {"batch_size": 1000, "result_workers": 4}
"""


def script(*parts: str, run: str, call_is_ready: bool) -> AbstractContextManager[subprocess.Popen[str]]:
    return running(SCRIPT.replace("RUN", run).replace("CALL_IS_READY", str(call_is_ready)), *parts)


@pytest.mark.parametrize(
    ("body", "call_is_ready"),
    [
        ("run_two_stage(range(1000), list, fetch_result, **SETTINGS)", True),
        ("list(iter_two_stage(range(1000), list, fetch_result, **SETTINGS))", True),
        ("run_two_stage(source(), list, fetch_result, **SETTINGS)", False),
        (
            """
            with iter_two_stage(range(1000), list, fetch_result, **SETTINGS) as outcomes:
                for _ in outcomes:
                    sleep()
            """,
            False,
        ),
    ],
    ids=["run", "next", "in the source", "in the loop's body"],
)
def test_sigint_ends_a_script_within_the_time_of_the_running_calls(body: str, *, call_is_ready: bool) -> None:
    """All calls would take some 50 s, the source and the loop's body 60."""
    count = """
        def interrupt(number, frame):
            before = len(begun)
            atexit.register(lambda: print(len(begun) - before))
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, interrupt)
    """
    with script(count, body, run="time.sleep(0.2)", call_is_ready=call_is_ready) as process:
        interrupt_when("ready", process)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.endswith("\nKeyboardInterrupt\n")
    assert int(output) <= 4  # those that were just about to begin


@pytest.mark.parametrize(
    "job",
    [
        "run_two_stage(range(1000), list, fetch_result, **SETTINGS)",
        "list(iter_two_stage(range(1000), list, fetch_result, **SETTINGS))",
        """
        with iter_two_stage(range(1000), list, fetch_result, **SETTINGS) as outcomes:
            list(outcomes)
        """,
    ],
    ids=["run", "next", "with"],
)
def test_second_sigint_gives_the_control_back_while_calls_run(job: str) -> None:
    tell = """
        end = Coordinator.end
        over = threading.Event()

        def end_and_tell(coordinator, error):
            is_news = not coordinator.ending
            end(coordinator, error)
            if is_news:
                print("ending", flush=True)

        Coordinator.end = end_and_tell
    """
    caught = """
        except KeyboardInterrupt:
            print("given up", over.is_set(), len(begun), flush=True)
            over.set()  # the interpreter waits for calls that run, whatever is done
    """
    body = "try:\n" + indent(dedent(job), "    ") + dedent(caught)
    with script(tell, body, run=f"over.wait({PATIENCE})", call_is_ready=True) as process:
        interrupt_when("ready", process)
        interrupt_when("ending", process)  # the first interrupt has come: calls are awaited
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "given up False 4\n"
    assert errors == ""
    assert process.returncode == 0
