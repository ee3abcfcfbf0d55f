"""A job that is killed again and again loses nothing that was committed, and asks for none of it again."""

from __future__ import annotations

import json
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from common import until
from forms import each_way, iterate, run
from servers import ManyAtOnce, Quiet, serving

from twostage import Journal, JournalError, iter_two_stage
from twostage.journal.file import JournalFile
from twostage.testing import SimulatedApi, VirtualTime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from forms import Run

ITEMS = 1000
BATCH_SIZE = 20

SCRIPT = f"""
import json, sys
from http.client import HTTPConnection
from threading import local
from twostage import run_two_stage

port, path, many = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "many"
connections = local()

def ask(what):
    if not hasattr(connections, "one"):
        connections.one = HTTPConnection("127.0.0.1", port, timeout=30)
    connections.one.request("POST", "/", json.dumps(what))
    return json.loads(connections.one.getresponse().read())

def fetch_tokens(items):
    return ask({{"items": items}})

def fetch_result(token):
    return ask({{"token": token}})

options = {{"batch_size": {BATCH_SIZE}, "many": many, "journal": path}}
results = run_two_stage(range({ITEMS}), fetch_tokens, fetch_result, **options)
print(json.dumps(results))
"""


def token_of(item: int, *, many: bool) -> Any:  # noqa: ANN401 - one or a list
    return [f"{item}/{place}" for place in range(item % 4)] if many else f"token {item}"


class Api(ManyAtOnce):
    """Counts what it is asked for. Each answer takes a while, by chance."""

    daemon_threads = True

    def __init__(self, *, many: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.many = many
        self.items: Counter[int] = Counter()
        self.tokens: Counter[str] = Counter()
        self.calls = 0
        self.running = 0
        self.lock = threading.Lock()
        self.random = random.Random(5)

    def answer(self, asked: dict[str, Any]) -> object:
        with self.lock:
            self.calls += 1
            self.running += 1
            self.items.update(asked.get("items", ()))
            self.tokens.update([asked["token"]] if "token" in asked else ())
            latency = self.random.uniform(0.01, 0.05)  # or more are answered between two commits
        time.sleep(latency)
        with self.lock:
            self.running -= 1
        if "token" in asked:
            return {"of": asked["token"]}
        return [token_of(item, many=self.many) for item in asked["items"]]

    def handle_error(self, *_: object) -> None:
        """The clients are killed: that is no news."""


class Handler(Quiet):
    server: Api
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, json.dumps(self.server.answer(asked)).encode())


@pytest.fixture
def api(many: bool) -> Iterator[Api]:  # noqa: FBT001 - the test's parameter
    with serving(Api(many=many)) as server:
        yield server


def recorded(path: Path, *, many: bool) -> tuple[set[int], set[str]]:
    """Returns the items whose tokens, and the tokens whose results are committed."""
    if not path.exists():
        return set(), set()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    items: set[int] = set()
    tokens: set[str] = set()
    for record in Journal(path):
        items.add(record.item)
        if record.is_done and record.token != []:
            tokens.add(record.token)
            of = token_of(record.item, many=many)
            assert record.result == {"of": of if record.place is None else of[record.place]}
    return items, tokens


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kills", "many"),
    [
        (5, False),
        pytest.param(30, False, marks=pytest.mark.slow),
        pytest.param(10, True, marks=pytest.mark.slow),
        pytest.param(200, False, marks=pytest.mark.slow),
    ],
    ids=["5 kills", "30 kills", "many tokens", "200 kills"],
)
def test_killed_job_goes_on_and_repeats_nothing(tmp_path: Path, api: Api, kills: int, *, many: bool) -> None:
    path = tmp_path / "journal"
    moments = random.Random(kills)
    command = [sys.executable, "-c", SCRIPT, str(api.server_port), str(path), "many" if many else ""]
    items: set[int] = set()
    tokens: set[str] = set()
    for kill in range(kills):
        before = api.items.copy(), api.tokens.copy()
        calls = api.calls
        # Some fall into the start, most into the work, of which each run has its share.
        wait = moments.randrange(1, 2 * ITEMS // kills)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # noqa: S603 - a script of our own
            if kill % 5 == 0:
                time.sleep(moments.uniform(0, 0.3))
            else:
                until(lambda: api.calls >= calls + wait or process.poll() is not None)  # noqa: B023 - it ends here
            process.kill()
        until(lambda: not api.running)  # what was on its way has arrived
        now = recorded(path, many=many)
        assert now[0] >= items
        assert now[1] >= tokens
        # What was committed before this run was not asked for in it.
        assert not [item for item in items if api.items[item] != before[0][item]]
        assert not [token for token in tokens if api.tokens[token] != before[1][token]]
        items, tokens = now
    ran = subprocess.run(command, capture_output=True, check=True)  # noqa: S603 - as above
    right = [token_of(item, many=many) for item in range(ITEMS)]
    assert json.loads(ran.stdout) == [
        [{"of": one} for one in token] if many else {"of": token} for token in right
    ]
    twice = api.items.total() - ITEMS, api.tokens.total() - len(api.tokens)
    print(f"{kills} kills: {twice[0]} items and {twice[1]} tokens were asked for once more")
    # Each kill hits as many calls as there are workers, and some that are answered and not committed.
    assert twice[0] <= kills * 2 * 4 * BATCH_SIZE
    assert twice[1] <= kills * 2 * 32


# --- in virtual time: writes fail


@each_way
@pytest.mark.parametrize("many", [False, True])
def test_journal_whose_writes_fail_by_chance_loses_nothing(  # noqa: C901 - the lives of many jobs
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Run, *, many: bool
) -> None:
    chance = random.Random(f"{job.__name__} {many}")
    connect = JournalFile._connect

    class Failing:
        """A connection that may fail at any statement of a commit, or be gone by then."""

        def __init__(self, file: JournalFile) -> None:
            self._connection = connect(file)
            self.close = self._connection.close

        def execute(self, statement: str, *values: Any) -> Any:  # noqa: ANN401 - the connection's
            self._fail(may=statement in {"BEGIN", "COMMIT"})
            return self._connection.execute(statement, *values)

        def executemany(self, statement: str, rows: Any) -> Any:  # noqa: ANN401 - the connection's
            self._fail(may=True)
            return self._connection.executemany(statement, rows)

        def _fail(self, *, may: bool) -> None:
            if may and chance.random() < 0.01:
                raise sqlite3.OperationalError("by chance")

    monkeypatch.setattr(JournalFile, "_connect", lambda file: Failing(file))  # noqa: PLW0108 - a class is no method
    failed = 0
    for seed in range(8):
        path = tmp_path / f"journal {seed}"
        items: Counter[int] = Counter()
        tokens: Counter[str] = Counter()

        def fetch_tokens(asked: list[int], items: Counter[int] = items) -> list[Any]:
            items.update(asked)
            return [token_of(item, many=many) for item in asked]

        def fetch_result(token: str, tokens: Counter[str] = tokens) -> str:
            tokens[token] += 1
            return token.upper()

        committed: tuple[set[int], set[str]] = set(), set()
        while True:
            first = SimulatedApi(fetch_tokens, latency=(0, 2), fail=0.1, seed=seed)
            second = SimulatedApi(fetch_result, latency=(0, 2), fail=0.1, seed=seed)
            handed: list[int] = []
            before = items.copy(), tokens.copy()
            settings: dict[str, Any] = {"batch_size": 7, "many": many, "journal": path, "result_workers": 5}
            results = None
            with VirtualTime(seed=seed):
                try:
                    if job is run:
                        results = run(range(100), first, second, **settings)
                    else:
                        with iter_two_stage(
                            range(100), first, second, ordered=job is not iterate, **settings
                        ) as outcomes:
                            handed += (outcome.item for outcome in outcomes)
                except JournalError:
                    failed += 1
            with monkeypatch.context() as patch:
                patch.setattr(JournalFile, "_connect", connect)
                records = list(Journal(path))
            done = {record.item for record in records}
            done -= {record.item for record in records if not record.is_done}
            assert done >= set(handed)
            assert not [item for item in committed[0] if items[item] != before[0][item]]
            assert not [token for token in committed[1] if tokens[token] != before[1][token]]
            committed = (
                {one.item for one in records},
                {one.token for one in records if one.is_done and one.token},
            )
            if results is not None or len(handed) == 100:
                break
        right: dict[tuple[int, int | None], Any] = {}
        for item in range(100):
            token = token_of(item, many=many)
            right |= {(item, place): one.upper() for place, one in enumerate(token)} if many else {}
            if not many or not token:
                right[item, 0 if many else None] = [] if many else token.upper()
        assert {(record.item, record.place): record.result for record in records} == right
    assert failed > 8
