"""Jobs on coroutine functions that end before their time, or whose script does; and attempts given up."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
from contextlib import nullcontext
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Any, Final

import pytest
from common import PATIENCE, as_it_is, ours, source_of, until
from fakes import each, stage
from forms import Run, each_way
from interrupting import Interrupter, World, interrupt, interrupt_everywhere
from scripts import interrupt_when, running

from twostage import iter_two_stage

if TYPE_CHECKING:
    import subprocess
    import threading
    from contextlib import AbstractContextManager

WORKERS: Final = 3


class Middle:
    """A function whose first call returns, or raises when all places are taken; the others run to the end."""

    def __init__(self, ending: threading.Event, error: BaseException | None = None) -> None:
        self.begun: list[int] = []
        self.done: list[int] = []
        self._ending = ending
        self._error = error

    async def __call__(self, number: int) -> int:
        self.begun.append(number)
        if number > 0:
            assert await asyncio.to_thread(self._ending.wait, PATIENCE)
        elif self._error is not None:
            await asyncio.to_thread(until, lambda: len(self.begun) == WORKERS)
            raise self._error
        self.done.append(number)
        return number

    def wait_until_busy(self) -> None:
        until(lambda: len(self.begun) == 1 + WORKERS)

    def assert_nothing_began(self) -> None:
        assert sorted(self.begun) == sorted(self.done) == list(range(1 + WORKERS))


@pytest.mark.parametrize("way", ["close", "raise", "break", "drop"])
def test_left_stream_starts_nothing_more_and_waits_for_what_runs(
    way: str, ending: threading.Event, on: dict[str, Any]
) -> None:
    closed: list[str] = []
    calls = Middle(ending)

    def consume() -> None:
        outcomes = iter_two_stage(
            source_of(itertools.count(), closed), each(int), stage(calls, workers=WORKERS, **on), batch_size=9
        )
        with outcomes if way in ("raise", "break") else nullcontext():
            for _ in outcomes:
                calls.wait_until_busy()
                if way == "raise":
                    raise LookupError
                break
        if way == "close":
            outcomes.close()

    with pytest.raises(LookupError) if way == "raise" else nullcontext():
        consume()
    until(lambda: len(ours()) == len(on))
    calls.assert_nothing_began()
    assert len(closed) == 1


def test_close_waits_for_calls_of_stage_one_and_sends_nothing_on(
    ending: threading.Event, on: dict[str, Any]
) -> None:
    calls = Middle(ending)
    results: list[int] = []

    async def fetch_result(token: int) -> None:
        results.append(token)

    with iter_two_stage(itertools.count(), stage(calls, workers=WORKERS, **on), fetch_result) as outcomes:
        next(outcomes)
        calls.wait_until_busy()
    calls.assert_nothing_began()
    assert results == [0]


@each_way
def test_failure_starts_nothing_more_and_waits_for_what_runs(
    job: Run, ending: threading.Event, on: dict[str, Any]
) -> None:
    error = ValueError()
    calls = Middle(ending, error)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - it is compared
        job(itertools.count(), each(int), stage(calls, workers=WORKERS, **on), batch_size=9)
    assert raised.value is error
    assert sorted(calls.begun) == list(range(WORKERS))
    assert sorted(calls.done) == list(range(1, WORKERS))


@each_way
def test_executor_that_has_been_shut_down_ends_the_job(job: Run, on: dict[str, Any]) -> None:
    if on:
        on["executor"].shutdown()
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            job([1], stage(as_it_is, **on), as_it_is)


# --- Ctrl-C


def run_of_coroutines(world: World) -> None:
    async def fetch(token: int) -> int:
        return world.fetch(token)

    for _ in iter_two_stage(world.source(range(4)), fetch, stage(fetch), window=4):
        pass


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostage.job.driver.LONGEST_GET", 0.002)


@pytest.mark.usefixtures("_quick")
def test_interrupt_at_any_line_of_the_callers_half_ends_the_job() -> None:
    def one(target: Any) -> Interrupter:  # noqa: ANN401 - a place, or none
        return interrupt(run_of_coroutines, target)

    assert interrupt_everywhere(one, "ThreadDriver") >= {"ThreadDriver.start", "ThreadDriver.join"}


SCRIPT: Final = """
    import asyncio, atexit, logging, signal, threading, time
    from twostage import AsyncExecutor, Stage, iter_two_stage, run_two_stage
    from twostage.core.coordinator import Coordinator
    from twostage.job.outcomes import Job
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_none

    ALWAYS = Retrying(retry=retry_if_exception(lambda _: True), stop=stop_after_attempt(9), wait=wait_none())
    begun = []
    finished = []

    async def fetch_result(token):
        begun.append(token)
        if len(begun) == 4:
            print("ready", flush=True)
        try:
            RUN
        finally:
            finished.append(token)
        return token

    def batches(batch):
        return batch

    async def awaited_batches(batch):
        return batch

"""


def script(body: str, run: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return running(SCRIPT.replace("RUN", run), body)


JOBS: Final = [
    "run_two_stage(range(1000), awaited_batches, Stage(fetch_result, workers=4), batch_size=1000)",
    "list(iter_two_stage(range(1000), batches, Stage(fetch_result, workers=4), batch_size=1000))",
    """
    with AsyncExecutor() as executor:
        settings = {"workers": 4, "executor": executor}
        run_two_stage(range(1000), awaited_batches, Stage(fetch_result, **settings), batch_size=1000)
    """,
]


@pytest.mark.parametrize("job", JOBS, ids=["run", "stream", "executor"])
def test_sigint_ends_a_script_within_the_time_of_the_running_calls(job: str) -> None:
    """All calls would take some 50 s."""
    count = """
        def interrupt(number, frame):
            before = len(begun)
            atexit.register(lambda: print(len(begun) - before, len(finished) - len(begun)))
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, interrupt)
    """
    with script(dedent(count) + dedent(job), run="await asyncio.sleep(0.2)") as process:
        interrupt_when("ready", process)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.endswith("\nKeyboardInterrupt\n")
    after, cut_off = map(int, output.split())
    assert after <= 4  # those that were just about to begin
    assert cut_off == 0


@pytest.mark.parametrize("job", JOBS[:2], ids=["run", "stream"])
def test_second_sigint_gives_the_control_back_while_calls_run(job: str) -> None:
    """The calls, which take a minute, are cut off as the script ends."""
    tell = """
        end = Coordinator.end

        def end_and_tell(coordinator, error):
            is_news = not coordinator.ending
            end(coordinator, error)
            if is_news:
                print("ending", flush=True)

        Coordinator.end = end_and_tell
    """
    caught = """
        except KeyboardInterrupt:
            print("given up", len(finished), len(begun), flush=True)
    """
    body = dedent(tell) + "try:\n" + indent(dedent(job), "    ") + dedent(caught)
    with script(body, run="await asyncio.sleep(60)") as process:
        interrupt_when("ready", process)
        interrupt_when("ending", process)  # the first interrupt has come: calls are awaited
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "given up 0 4\n"
    assert errors == ""
    assert process.returncode == 0


def test_second_sigint_gives_up_a_context_that_is_not_left() -> None:
    body = """
        class Client:
            async def __aenter__(self):
                return self

            async def __aexit__(self, *_):
                print("leaving", flush=True)
                try:
                    await asyncio.sleep(60)
                finally:
                    print("cut off", flush=True)

        async def fetch(token, client):
            return token

        def close_and_tell(job):
            print("closing", flush=True)
            close(job)

        close, Job.close = Job.close, close_and_tell
        try:
            run_two_stage(range(4), batches, Stage(fetch, context=Client), batch_size=4)
        except KeyboardInterrupt:
            print("given up", flush=True)
    """
    with script(body, run="pass") as process:
        interrupt_when("leaving", process)
        interrupt_when("closing", process)  # the first interrupt has come
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "given up\ncut off\n"
    assert errors == ""
    assert process.returncode == 0


# --- scripts that end with something unfinished


# Any two settings meet in the default run; the other combinations of the three are slow tests.
CLEANUPS: Final = ["pass", "await asyncio.sleep(0.01)", "raise LookupError", "return token"]
FIRSTS: Final = ["batches", "awaited_batches"]


@pytest.mark.parametrize(
    ("executor", "first", "cleanup"),
    [
        pytest.param(
            bool(executor), first, cleanup, marks=[pytest.mark.slow] * ((executor + number + place) % 2)
        )
        for executor in range(2)
        for number, first in enumerate(FIRSTS)
        for place, cleanup in enumerate(CLEANUPS)
    ],
)
def test_script_that_leaves_a_stream_unfinished_ends_and_makes_no_more_calls(
    first: str, cleanup: str, *, executor: bool
) -> None:
    """What runs is cancelled, and only then its context is left; what that fails by is not tried again."""
    body = f"""
        logging.disable()  # what is cut off may be said to be tried again

        class Client:
            async def __aenter__(self):
                return self

            async def __aexit__(self, *_):
                print("leaves", len(finished) == len(begun), len(begun) - before, flush=True)
                for _ in range(20):  # time enough for others
                    await asyncio.sleep(0.001)
                print("left", len(begun) - before, flush=True)

        async def fetch(token, client):
            try:
                return await fetch_result(token)
            except asyncio.CancelledError:
                {cleanup}
                raise

        settings = {{"workers": 4, "context": Client, "retry": ALWAYS}}
        executor = AsyncExecutor() if {executor} else None
        outcomes = iter_two_stage(
            range(1000), {first}, Stage(fetch, executor=executor, **settings), batch_size=1000
        )
        assert next(outcomes).result == 0
        while len(begun) < 5:
            time.sleep(0.001)
        before = len(begun)
    """
    with script(body, run="await asyncio.sleep(0 if token == 0 else 60)") as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "ready\nleaves True 0\nleft 0\n"
    assert errors == ""
    assert process.returncode == 0


def test_script_that_leaves_an_executor_open_ends_when_its_calls_have() -> None:
    body = """
        executor = AsyncExecutor()
        run_two_stage(range(4), batches, Stage(fetch_result, executor=executor), batch_size=4)
        executor.submit(fetch_result, 5)
    """
    with script(body, run="await asyncio.sleep(0.01); print(token, flush=True)") as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert output == "ready\n0\n1\n2\n3\n5\n"
    assert errors == ""
    assert process.returncode == 0


@pytest.mark.parametrize("left", ["next(outcomes)", "executor.submit(fetch_result, 5)"])
def test_script_ends_quietly_though_its_calls_have_used_threads(left: str) -> None:
    """As asyncio's own look-up of a host's name does."""
    body = f"""
        executor = AsyncExecutor()
        settings = {{"workers": 4, "executor": executor}}
        outcomes = iter_two_stage(range(100), batches, Stage(fetch_result, **settings), batch_size=100)
        {left}
    """
    with script(body, run="await asyncio.to_thread(time.sleep, 0.001)") as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert errors == ""
    assert process.returncode == 0
