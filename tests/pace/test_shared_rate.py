"""A limit that jobs in many processes share is asked in the user's function, which raises `Throttled`."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from bisect import bisect_left
from collections import Counter, deque
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from common import needs_clients, until
from fakes import Fake, outcomes_of, stage

from twostage import Stage, Throttled, iter_two_stage, run_two_stage
from twostage.testing import sleep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twostage.testing import VirtualTime

PAGE = Path(__file__).parents[2] / "twostage" / "pace" / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = next(
    block
    for block in re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    if "pyrate_limiter" in block
)
LIMIT, PER = 50, 500  # calls, milliseconds: as many a second as the page has, in half of its window
ITEMS = 100


def quicker(code: str) -> str:
    assert "Rate(100, 1000)" in code
    assert "range(200)" in code
    return code.replace("Rate(100, 1000)", f"Rate({LIMIT}, {PER})").replace("range(200)", f"range({ITEMS})")


def most_in_a_window(moments: Sequence[float], per: float) -> int:
    ordered = sorted(moments)
    return max(bisect_left(ordered, first + per) - place for place, first in enumerate(ordered))


# --- two processes

CHILD = """
import json, sys, time

def fetch_tokens(ids):
    return [f"token {id}" for id in ids]

def fetch_result(token):
    begun.append(time.time_ns() // 1_000_000)
    return token.removeprefix("token ")

def put(turn):
    admitted = original_put(turn)
    if admitted:
        turns.append(turn.timestamp)
    return admitted

begun, turns = [], []
prepare, run = json.loads(sys.stdin.readline())
exec(prepare)
original_put, bucket.put = bucket.put, put
print("ready", flush=True)
sys.stdin.readline()
exec(run)
bucket.close()
print(json.dumps([begun, turns, results]))
"""


def run_in_two_processes(code: str, directory: Path) -> tuple[list[int], list[int]]:
    """Runs `code` in two processes at once; returns when their calls began, and the turns that they took."""
    needs_clients("pyrate_limiter", "filelock")
    prepare, job = quicker(code).split("results = ")
    with ExitStack() as stack:
        children = [stack.enter_context(child(directory)) for _ in range(2)]
        for each in children:
            tell(each, json.dumps([prepare, "results = " + job]))
        for each in children:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for each in children:
            tell(each, "go")
        said = [json.loads(each.communicate()[0]) for each in children]
    for _, _, results in said:
        assert results == [str(item) for item in range(ITEMS)]
    return [moment for begun, _, _ in said for moment in begun], [
        turn for _, turns, _ in said for turn in turns
    ]


@contextmanager
def child(directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=directory, stdin=pipe, stdout=pipe, text=True) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def each_call_had_its_turn(begun: list[int], turns: list[int]) -> bool:
    return len(turns) == 2 * ITEMS and all(
        turn <= moment for turn, moment in zip(sorted(turns), sorted(begun), strict=True)
    )


def test_two_processes_share_a_limit_on_sqlite(tmp_path: Path) -> None:
    begun, turns = run_in_two_processes(BLOCK, tmp_path)
    assert each_call_had_its_turn(begun, turns)
    assert most_in_a_window(turns, PER) == LIMIT
    with closing(sqlite3.connect(tmp_path / "rate.sqlite")) as database:
        (rows,) = database.execute("SELECT COUNT(*) FROM rate_bucket").fetchone()
    assert LIMIT <= rows < 2 * ITEMS  # what has left the window is cleared away


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    """The port of a server of our own, on this machine only, which keeps nothing."""
    needs_clients("redis")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # noqa: S603 - found on the path
        try:
            until(lambda: answers(port), "redis-server")
            yield port
        finally:
            process.terminate()


def answers(port: int) -> bool:
    import redis  # noqa: PLC0415 - it may not be there

    with redis.Redis(port=port) as client, suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


def on_redis(port: int) -> str:
    """Returns the page's block with a bucket on Redis."""
    line, guard = re.findall(r"`(bucket = RedisBucket.*)`,\s+and\s+`(with .*:)`", TEXT)[0]
    code = BLOCK.replace("SQLiteBucket\n", "RedisBucket\nfrom redis import Redis\n", 1)
    code = re.sub("^bucket = .*", line, code, flags=re.MULTILINE).replace("with lock, bucket.lock:", guard)
    return code.replace('Redis("redis.example.com")', f"Redis(port={port})")


def test_two_processes_share_a_limit_on_redis(tmp_path: Path, redis_port: int) -> None:
    import redis  # noqa: PLC0415 - it may not be there

    begun, turns = run_in_two_processes(on_redis(redis_port), tmp_path)
    assert each_call_had_its_turn(begun, turns)
    # One process may see the time, and another take a later turn before it: then neither counts the other.
    assert LIMIT <= most_in_a_window(turns, PER) < 1.1 * LIMIT
    with redis.Redis(port=redis_port) as client:
        assert LIMIT <= client.zcard("rate") < 2 * ITEMS


# --- shards

SHARDS = """
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from twostage import Shards, run_two_stage

taken = threading.local()
original_put = bucket.put

def put(turn):
    admitted = original_put(turn)
    if admitted:
        taken.turn = turn.timestamp
    return admitted

bucket.put = put

def fetch_tokens(ids):
    return [f"token {id}" for id in ids]

def fetch_result(token):
    return token, taken.turn

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        settings = {"batch_size": 50, "shards": Shards(pool, at_once=2, size=25)}
        print(json.dumps(run_two_stage(range(100), fetch_tokens, fetch_result_in_turn, **settings)))
"""


def turns_of_shards(code: str, directory: Path) -> list[int]:
    """Runs a job whose shards ask for turns as `code` has it; returns those that its calls took."""
    needs_clients("pyrate_limiter", "filelock")
    script = directory / "script.py"
    script.write_text(quicker(code).split("results = ", maxsplit=1)[0] + SHARDS, encoding="utf-8")
    command = [sys.executable, str(script)]
    ran = subprocess.run(command, cwd=directory, capture_output=True, check=True, timeout=50)  # noqa: S603 - ours
    results = json.loads(ran.stdout)
    assert [token for token, _ in results] == [f"token {item}" for item in range(ITEMS)]
    return [turn for _, turn in results]


def test_shards_share_a_limit_on_sqlite(tmp_path: Path) -> None:
    assert most_in_a_window(turns_of_shards(BLOCK, tmp_path), PER) == LIMIT


def test_shards_share_a_limit_on_redis(tmp_path: Path, redis_port: int) -> None:
    turns = turns_of_shards(on_redis(redis_port), tmp_path)
    assert LIMIT <= most_in_a_window(turns, PER) < 1.1 * LIMIT  # as above


# --- in virtual time


class SharedLimit:
    """As a database that everybody asks: so many turns in any so many seconds."""

    def __init__(self, limit: int, per: float, virtual: VirtualTime) -> None:
        self.limit = limit
        self.per = per
        self.virtual = virtual
        self.turns: deque[float] = deque()
        self.begun: list[float] = []
        self.refused = 0

    def try_acquire(self) -> float:
        """Takes a turn and returns 0, or takes none and returns the seconds to wait for one."""
        now = self.virtual.now
        while self.turns and self.turns[0] + self.per <= now:
            self.turns.popleft()
        if len(self.turns) == self.limit:
            self.refused += 1
            return self.turns[0] + self.per - now
        self.turns.append(now)
        self.begun.append(now)
        return 0


@pytest.mark.parametrize("limit", [(10, 1.0), (100, 1.0), (1000, 60.0)], ids=str)
@pytest.mark.parametrize("latency", [0.05, 1.0])
@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_shared_limit_is_kept_and_used(
    virtual: VirtualTime, limit: tuple[int, float], latency: float, jobs: int
) -> None:
    def fetch_result(item: int) -> int:
        if wait := limiter.try_acquire():
            raise Throttled(wait)
        sleep(latency)
        return item

    limiter = SharedLimit(*limit, virtual)
    number = (12 if limit[0] <= 100 else 5) * limit[0] // jobs
    workers = math.ceil(4 * max(4, limit[0] / limit[1] * latency) / jobs)  # four times what is needed
    streams = [iter_two_stage(range(number), str, stage(fetch_result, workers=workers)) for _ in range(jobs)]
    for _ in zip(*streams, strict=True):  # each as far as the others
        pass
    assert most_in_a_window(limiter.begun, limit[1]) == limit[0]
    assert len(limiter.begun) == number * jobs  # one turn a call
    at_best = (number * jobs - 1) // limit[0] * limit[1]
    assert limiter.begun[-1] < 1.1 * at_best
    assert limiter.refused < 8 * number * jobs  # without the pauses up to 50


def test_being_held_back_uses_no_attempt_and_no_worker(virtual: VirtualTime) -> None:
    def answer(item: int) -> int:
        if item == 0 and fetch.asked.count(0) <= 20:
            raise Throttled(5)
        return item

    fetch = Fake(answer, latency=1, virtual=virtual)
    outcomes = outcomes_of(range(50), int, Stage(fetch, workers=1, pause=False, retry=1))
    assert [outcome.result for outcome in outcomes] == list(range(50))
    assert {outcome.result_attempts for outcome in outcomes} == {1}
    asked = Counter(fetch.asked)
    assert asked.pop(0) == 21
    assert set(asked.values()) == {1}
    assert max(made.ended for made in fetch.calls if made.argument) < 70  # though it goes on for 125 s


def test_whole_batch_may_be_held_back(virtual: VirtualTime) -> None:
    def answer(batch: list[int]) -> list[int]:
        if len(fetch.calls) <= 3:
            raise Throttled(7)
        return batch

    fetch = Fake(answer, virtual=virtual)
    outcomes = outcomes_of(range(4), stage(fetch, batch_size=4, retry=1), int)
    assert [(outcome.result, outcome.token_attempts) for outcome in outcomes] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert [made.began for made in fetch.calls] == [0, 7, 14, 21]


def test_one_that_is_held_back_past_the_timeout_fails(virtual: VirtualTime) -> None:
    def fetch(item: int) -> int:
        raise Throttled(60)

    results: Any = run_two_stage([1], int, fetch, timeout=150, return_exceptions=True)
    assert [type(result) for result in results] == [Throttled]
    assert virtual.now == 120
