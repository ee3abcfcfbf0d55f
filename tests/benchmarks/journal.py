"""What a journal costs: the same job with and without, and bare SQLite with JSON and its type check.

Calls do nothing, and both stages take batches of 100, so that the coordinator hears of 100 or more answers
at once, as with calls of some latency on many workers.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from measuring import medians

from twostage import Stage, run_two_stage
from twostage.journal.recorder import Recorder
from twostage.journal.values import Codec, journal_key

if TYPE_CHECKING:
    from collections.abc import Sequence

ITEMS = 50_000
SIZE = 100
ROUNDS = 5
NUMBERS = range(ITEMS)
UUIDS = [str(UUID(int=(number * 0x9E3779B97F4A7C15F39CC0605CEDC834) % 2**128)) for number in NUMBERS]

Answer = dict[str, Any]


def token_of(item: object) -> str:
    return f"token {item}"


def result_of(token: str) -> Answer:
    return {"token": token, "text": 120 * "x", "score": 0.1, "is_right": True, "next": None}


def tokens_of(items: list[Any]) -> list[str]:
    return list(map(token_of, items))


def results_of(tokens: list[str]) -> list[Answer]:
    return list(map(result_of, tokens))


def job(items: Sequence[Any], journal: str | None) -> int:
    return len(
        run_two_stage(items, tokens_of, Stage(results_of, batch_size=SIZE), batch_size=SIZE, journal=journal)
    )


def new_journal(items: Sequence[Any]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        return job(items, f"{directory}/journal")


def bare(items: Sequence[Any]) -> int:
    """The same rows in one thread, written by hand."""
    codec, key = Codec(None, None), journal_key(None)
    with tempfile.TemporaryDirectory() as directory:
        connection = sqlite3.connect(f"{directory}/bare", isolation_level=None)
        for setting in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("CREATE TABLE answers (key PRIMARY KEY, token, token_at, result, at)")
        rest = iter(items)
        while batch := list(islice(rest, SIZE)):
            keys, tokens, now = list(map(key, batch)), tokens_of(batch), time.time()
            results = results_of(tokens)
            written = [codec.write(token, "token", None) for token in tokens]
            rows = [(one, token, now) for one, token in zip(keys, written, strict=True)]
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO answers (key, token, token_at) VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
            written = [codec.write(result, "result", None) for result in results]
            answers = [(result, now, one) for result, one in zip(written, keys, strict=True)]
            connection.execute("BEGIN")
            connection.executemany("UPDATE answers SET result = ?, at = ? WHERE key = ?", answers)
            connection.execute("COMMIT")
        connection.close()
    return len(items)


def commits(items: Sequence[Any]) -> int:
    """How often a job commits."""
    number, commit = 0, Recorder.commit

    def count(self: Recorder) -> None:
        nonlocal number
        number += bool(self.collected._rows.tokens or self.collected._rows.results)
        commit(self)

    Recorder.commit = count  # type: ignore[method-assign] # for this one run
    try:
        new_journal(items)
    finally:
        Recorder.commit = commit  # type: ignore[method-assign] # as above
    return number


def main() -> None:
    print(f"a result has {len(Codec(None, None).write(result_of('token 10000'), '', ''))} bytes")
    for name, items in (("numbers", NUMBERS), ("UUIDs", UUIDS)):
        with tempfile.TemporaryDirectory() as directory:
            done = f"{directory}/journal"
            job(items, done)
            megabytes = Path(done).stat().st_size / 1e6
            without, recording, again, by_hand = medians(
                ROUNDS,
                partial(job, items, None),
                partial(new_journal, items),
                partial(job, items, done),
                partial(bare, items),
            )
        each = 1e6 / len(items)
        print(
            f"{name}: {each * without:.1f} us an item without a journal, {each * recording:.1f} with one "
            f"({recording / without:.1f} times): {each * (recording - without):.1f} us for it, "
            f"bare SQLite {each * by_hand:.1f}; {each * again:.1f} if all is recorded; "
            f"{len(items) / commits(items):.0f} items a commit and stage; {megabytes:.0f} MB"
        )


if __name__ == "__main__":
    main()
