"""The journal of a job that runs: what it knows of items, and what is written into it."""

from __future__ import annotations

import os
import time
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from twostage.base.records import ListedToken, TokenList
from twostage.journal.file import JournalFile
from twostage.journal.rows import Identity, Row
from twostage.journal.values import Codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from twostage.base.records import Member
    from twostage.core.handover import AnyOutcome
    from twostage.errors import RecordedFailure
    from twostage.journal.collector import Collector, Rows
    from twostage.journal.journal import Journal

__all__ = ["Found", "Recorder"]

LOOKED_UP = 500  # keys at once: older releases of SQLite take 999 at most

FORGET = "DELETE FROM answers WHERE key = ?"
TOKEN = "INSERT OR REPLACE INTO answers (key, place, size, token, token_at) VALUES (?, ?, ?, ?, ?)"  # noqa: S105 - no secret
RESULT = """
    INSERT INTO answers (key, place, size, result, at) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (key, place) DO UPDATE SET result = excluded.result, at = excluded.at,
        stage = NULL, failure = NULL, status = NULL, passing = NULL, text = NULL
"""
# Stage one was asked as the token is no good; with a lasting 401 or 403 it may be what is wrong.
FAILURE = """
    INSERT INTO answers (key, place, size, stage, failure, status, passing, text, at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (key, place) DO UPDATE SET
        stage = excluded.stage, failure = excluded.failure, status = excluded.status,
        passing = excluded.passing, text = excluded.text, at = excluded.at, result = NULL,
        token = CASE WHEN excluded.stage = 1 OR excluded.status IN (401, 403) THEN NULL ELSE token END
"""


STATEMENTS = (FORGET, TOKEN, RESULT, FAILURE)  # which take them


class Found(NamedTuple):
    """What the journal knows of items.

    Attributes:
        new: Nothing, so that they begin at stage one.
        calls: Their tokens, as calls for stage two.
        lists: Of these, if items have many.
        done: Their outcomes.
        failed: Failures among all those, each with its item's index.
    """

    new: list[AnyOutcome]
    calls: list[Member]
    lists: list[TokenList]
    done: list[AnyOutcome]
    failed: list[tuple[int, RecordedFailure]]


class Recorder:
    """The journal of a job that runs.

    Args:
        journal: What was said of it.
        identity: Whose answers they are.
        keys: The items', by their index.
        collected: What is to be written of what the job's calls give.
        goes_on: Whether an item of which the token is recorded goes on from there.
    """

    def __init__(
        self,
        journal: Journal,
        identity: Identity,
        keys: Mapping[int, Any],
        collected: Collector,
        *,
        goes_on: bool = True,
    ) -> None:
        self.collected = collected
        self._goes_on = goes_on
        self._journal = journal
        self._path = os.path.realpath(journal.path)  # of now, wherever the script is when it begins
        self._identity = identity
        self._many = bool(identity.many)
        self._keys = keys
        self._codec = Codec(journal.encode, journal.decode)
        self._file: JournalFile | None = None  # while it is open
        self._broken: Exception | None = None
        self._lots: list[Rows] = []  # what others have heard of

    def open(self) -> None:
        """Opens the file, which is made if there is none.

        Raises:
            JournalError: It can't be had.
        """
        self._file = JournalFile(self._path, self._identity, create=True)

    def close(self) -> None:
        """Lets others have the file. Harmless if that was done."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- what is found

    def find(self, outcomes: Iterable[AnyOutcome]) -> Found:
        """Looks items up, and fills in what is known of them."""
        by_key = {self._keys[outcome.index]: outcome for outcome in outcomes}
        found = Found([], [], [], [], [])
        fill = self._fill_list if self._many else self._fill
        keys = list(by_key)
        for start in range(0, len(keys), LOOKED_UP):
            for key, rows in groupby(self._look_up(keys[start : start + LOOKED_UP]), itemgetter(0)):
                if fill(by_key[key], list(rows), found):
                    del by_key[key]
        found.new.extend(by_key.values())
        return found

    def _look_up(self, keys: Sequence[str]) -> list[Row]:
        assert self._file is not None  # noqa: S101 - for the type checker
        query = f"SELECT * FROM answers WHERE key IN ({','.join('?' * len(keys))}) ORDER BY key, place"  # noqa: S608 - of constants
        with self._file.explained("read"):
            return list(map(Row._make, self._file.connection.execute(query, keys)))

    def _fill(self, outcome: AnyOutcome, rows: Sequence[Row], found: Found) -> bool:
        """Fills in what is recorded of an item; returns whether it need not begin at stage one."""
        (row,) = rows
        if row.result is not None:
            outcome.token = None if row.token is None else self._codec.read(row.token)
            outcome.result = self._codec.read(row.result)
            found.done.append(outcome)
        elif self._is_kept(row):
            self._fail(outcome, row, found)
        elif self._has_token(row):
            outcome.token = self._codec.read(row.token)
            found.calls.append(outcome)
        else:
            return False
        return True

    def _fail(self, outcome: AnyOutcome, row: Row, found: Found) -> None:
        outcome.exception = row.recorded_failure
        found.done.append(outcome)
        found.failed.append((outcome.index, outcome.exception))

    def _fill_list(self, outcome: AnyOutcome, rows: Sequence[Row], found: Found) -> bool:
        """The same for an item of many tokens."""
        size = rows[0].size
        if size is None:  # stage one has failed
            if self._is_kept(rows[0]):
                self._fail(outcome, rows[0], found)
                return True
            return False
        done = {row.place: row for row in rows if row.result is not None or self._is_kept(row)}
        has_tokens = not size or (len(rows) == size and all(row.token is not None for row in rows))
        if len(done) < size and not (has_tokens and all(map(self._has_token, rows))):
            return False  # stage one may give another list now
        outcome.token = [self._codec.read(row.token) for row in rows[:size]] if has_tokens else None
        tokens = TokenList(outcome, size)
        for row in done.values():
            if row.result is None:
                tokens.results[row.place] = row.recorded_failure
                found.failed.append((outcome.index, row.recorded_failure))
            else:
                tokens.results[row.place] = self._codec.read(row.result)
        tokens.missing -= len(done)
        if tokens.missing:
            found.lists.append(tokens)
            found.calls.extend(
                ListedToken(tokens, place, token)
                for place, token in enumerate(outcome.token or ())
                if place not in done
            )
        else:
            outcome.result = tokens.results
            found.done.append(outcome)
        return True

    def _has_token(self, row: Row) -> bool:
        ttl = self._journal.token_ttl
        return (
            self._goes_on
            and row.token is not None
            and (ttl is None or time.time() < (row.token_at or 0) + ttl)
        )

    def _is_kept(self, row: Row) -> bool:
        """Whether a failure is an answer."""
        return row.failure is not None and not row.passing and not self._journal.retry_failed

    # --- what is recorded

    def add(self, lots: Iterable[Rows], partial: Iterable[int]) -> None:
        """Hears of what others have heard of, one lot after the other.

        Args:
            lots: It.
            partial: The indices of items of which a part is not recorded as an answer.
        """
        self._lots.extend(lots)
        self.collected.partial.update(partial)

    def commit(self) -> None:
        """Writes what was heard of since the last time.

        Raises:
            JournalError: It can't be written. From then on nothing is.
        """
        lots, self._lots = self._lots, []
        if (rows := self.collected.take_rows()) is not None:
            lots.append(rows)
        if not lots:
            return
        if self._broken is not None:
            raise self._broken
        assert self._file is not None  # noqa: S101 - for the type checker
        connection = self._file.connection
        try:
            with self._file.explained("written"):
                connection.execute("BEGIN")
                for lot in lots:
                    for statement, values in zip(STATEMENTS, lot, strict=True):
                        if values:
                            connection.executemany(statement, values)
                connection.execute("COMMIT")
            self._file.check_in_place()
        except Exception as error:
            self._broken = error
            raise
