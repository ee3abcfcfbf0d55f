"""`Journal`: where a job records what its calls gave, so that another run does not ask for it again."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from twostage.base.checks import check_function, checked_bool, positive_seconds
from twostage.base.words import brief
from twostage.errors import JournalError, RecordedFailure
from twostage.journal.rows import Identity, Row, moment
from twostage.journal.values import Codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from twostage.journal.file import JournalFile

__all__ = ["Journal", "JournalLike", "Record", "Recorded"]


@dataclass(frozen=True, repr=False)
class Record:
    """What is recorded of one item, or of one of its tokens if items have many.

    Attributes:
        item: The item's key: itself, if `key` did not say otherwise.
        place: Of the token among those of its item, if items have many; else `None`. (An item without
            any has one record, with empty lists for token and result.)
        token: What stage one gave; `None` if that is not recorded.
        is_done: Whether there is a result.
        result: What stage two gave.
        failure: Why there is none, if that is known.
        time: When the last of this was recorded, in UTC.
    """

    item: Any
    place: int | None
    token: Any
    is_done: bool
    result: Any
    failure: RecordedFailure | None
    time: datetime

    def __repr__(self) -> str:
        # Neither token nor result.
        state = "done" if self.is_done else "has a token" if self.failure is None else str(self.failure)
        place = "" if self.place is None else f", token {self.place}"
        return f"<Record of item {brief(self.item)}{place}: {state}>"


class Recorded(NamedTuple):
    """How much is recorded; of items that have many tokens, each of those counts.

    Attributes:
        job: The job's name; `None` if none was begun.
        version: Of its answers, or `None`.
        tokens: Those whose stage two is missing.
        results: Items that are done.
        failures: By stage, type and status.
        first: When the first of this was recorded, in UTC; `None` if nothing is.
        last: When the last was.
    """

    job: str | None
    version: str | None
    tokens: int
    results: int
    failures: Counter[tuple[int, str, int | None]]
    first: datetime | None
    last: datetime | None


@dataclass(frozen=True)
class Journal:
    """Where a job records what its calls gave: what is recorded is never asked for again.

    It is an SQLite file, made by the first job that is given it, readable by its owner alone. One job at a
    time can have it open. Tokens and results are in it: keep it as you keep them.

    Args:
        path: The file's.
        job: The job's name: a journal is refused to a job of another one. Default: the two functions'
            names, so give one where they may be renamed.
        version: Of the answers: a journal of another version is refused. Default: none.
        token_ttl: Seconds after which a recorded token is no good any more. Default: never.
        tokens: Whether tokens are recorded too. Off, none gets into the file, and an item that had one,
            but no result, begins again.
        retry_failed: Whether items that failed for good are asked for again by the next run, as those are
            that may succeed the next time. Off, they have a `RecordedFailure`.
        texts: Whether a failure's text is recorded with its type and status. URLs in it often hold tokens.
        encode: Makes `bytes` of a token or a result. Default: JSON, of what JSON gives back unchanged.
        decode: The way back.

    Raises:
        TypeError: An argument is of the wrong kind, or one of `encode` and `decode` is missing.
        ValueError: `token_ttl` is not above 0.

    >>> import tempfile
    >>> from twostage import run_two_stage
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     journal = Journal(f"{directory}/words.sqlite", job="words")
    ...     results = run_two_stage(["a", "b"], str.upper, ord, journal=journal)
    ...     again = run_two_stage(["a", "b", "c"], str.upper, ord, journal=journal)  # calls for "c" alone
    ...     print(again, journal.recorded().results, [record.item for record in journal])
    [65, 66, 67] 3 ['a', 'b', 'c']
    """

    path: str | os.PathLike[str]
    job: str | None = field(default=None, kw_only=True)
    version: str | int | None = field(default=None, kw_only=True)
    token_ttl: float | None = field(default=None, kw_only=True)
    tokens: bool = field(default=True, kw_only=True)
    retry_failed: bool = field(default=True, kw_only=True)
    texts: bool = field(default=False, kw_only=True)
    encode: Callable[[Any], bytes] | None = field(default=None, kw_only=True)
    decode: Callable[[bytes], Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        path: object = self.path
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not path:
            raise TypeError(f"path is {path!r}; expected the path of a file")
        job: object = self.job
        if not isinstance(job, str | None):
            raise TypeError(f"job is {job!r}; expected a name")
        version: object = self.version
        if not isinstance(version, str | int | None) or isinstance(version, bool):
            raise TypeError(f"version is {version!r}; expected a str or an int")
        if self.token_ttl is not None:
            positive_seconds(self.token_ttl, "token_ttl")
        checked_bool(self.tokens, "tokens")
        checked_bool(self.retry_failed, "retry_failed")
        checked_bool(self.texts, "texts")
        if (self.encode is None) != (self.decode is None):
            raise TypeError("one of encode and decode is given; expected both, or none")
        if self.encode is not None:
            check_function(self.encode, "encode")
            check_function(self.decode, "decode")

    def __iter__(self) -> Iterator[Record]:
        """Gives what is recorded, in the order in which it came. No job can have the file meanwhile.

        Raises:
            JournalError: It can't be opened, or is another job's; or its values were written by an `encode`
                whose `decode` is not given.
        """
        with closing(self._open()) as file, file.explained("read"):
            if file.identity.encode and self.decode is None:
                raise JournalError(
                    f"the journal {file.path} was written with encode=; give Journal(..., encode=, decode=)"
                )
            read = Codec(self.encode, self.decode).read
            for row in map(Row._make, file.connection.execute("SELECT * FROM answers ORDER BY rowid")):
                nothing: list[Any] | None = [] if row.size == 0 else None
                yield Record(
                    row.item,
                    row.token_place,
                    nothing if row.token is None else read(row.token),
                    row.result is not None or row.size == 0,
                    nothing if row.result is None else read(row.result),
                    None if row.failure is None else row.recorded_failure,
                    moment(row.at or row.token_at or 0),
                )

    def failures(self) -> list[RecordedFailure]:
        """Returns the failures that are recorded, and no result has come in place of.

        Raises:
            JournalError: As from iterating.
        """
        with closing(self._open()) as file, file.explained("read"):
            rows = file.connection.execute("SELECT * FROM answers WHERE failure IS NOT NULL ORDER BY at")
            return [row.recorded_failure for row in map(Row._make, rows)]

    def recorded(self) -> Recorded:
        """Returns how much is recorded.

        Raises:
            JournalError: As from iterating.
        """
        with closing(self._open()) as file, file.explained("read"):
            one = file.connection.execute
            tokens, results, first, last = one(
                """
                SELECT count(*) FILTER (WHERE result IS NULL AND failure IS NULL AND size IS NOT 0),
                    count(*) FILTER (WHERE result IS NOT NULL OR size = 0),
                    min(coalesce(token_at, at)), max(coalesce(at, token_at))
                FROM answers
                """
            ).fetchone()
            failures = one(
                """
                SELECT stage, failure, status, count(*) FROM answers WHERE failure IS NOT NULL
                GROUP BY stage, failure, status
                """
            )
            return Recorded(
                file.identity.job,
                file.identity.version or None,
                tokens,
                results,
                Counter({(stage, name, status): number for stage, name, status, number in failures}),
                None if first is None else moment(first),
                None if last is None else moment(last),
            )

    @property
    def version_text(self) -> str:
        """The version as it is recorded; empty for none."""
        return "" if self.version is None else str(self.version)

    def _open(self) -> JournalFile:
        """Opens the file to look in: it is this journal's as far as was said whose."""
        from twostage.journal.file import JournalFile  # noqa: PLC0415 - for some Pythons, SQLite is an extra

        mine = Identity(self.job, self.version_text or None, None, None)
        return JournalFile(self.path, mine, create=False)


JournalLike: TypeAlias = "str | os.PathLike[str] | Journal"
"""A journal, or the path of one of which nothing more is to be said."""
