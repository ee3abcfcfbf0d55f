"""A journal's file: made, locked, and told from all other files; a failure says which it is."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import sys
import tempfile
import threading
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from twostage.errors import JournalError
from twostage.journal.rows import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["JournalFile"]

APPLICATION_ID = 0x32537447  # "2StG"
SCHEMA_VERSION = 1
SCHEMA = f"""
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {SCHEMA_VERSION};
    CREATE TABLE job (
        job TEXT NOT NULL, version TEXT NOT NULL, many INTEGER NOT NULL, encode INTEGER NOT NULL
    );
    CREATE TABLE answers (
        key TEXT NOT NULL,      -- the item's, as JSON
        place INTEGER NOT NULL, -- of the token, if items have many; else 0
        size INTEGER,           -- how many tokens the item has, if it may have many
        token,                  -- JSON, or the user's bytes
        token_at REAL,          -- when it was recorded; seconds since 1970
        result,                 -- likewise
        at REAL,                -- when the result, or the failure, was recorded
        stage INTEGER,          -- that failed
        failure TEXT,           -- its type
        status INTEGER,
        passing INTEGER,        -- whether it is to be asked again in any case
        text TEXT,
        PRIMARY KEY (key, place)
    )
"""
CACHE = 32_000  # KiB; of keys in no order, each is then found in memory up to some 500,000

# What stands where in the header of an SQLite file, and where it is locked: https://sqlite.org/fileformat.html
MAGIC = b"SQLite format 3\0"
HEADER = struct.Struct(">16s52xI28x")
LOCKED_BYTES = (0x40000000, 512)
# C's `struct flock`: where in it are type, whence, start, length, pid.
FLOCK = {
    "linux": (struct.Struct("hhqqi4x"), (0, 1, 2, 3, 4)),
    "darwin": (struct.Struct("qqihh"), (3, 4, 0, 1, 2)),
}

# Closing a file, even one opened only to look at its header, drops all locks of this process on it.
_held: WeakValueDictionary[tuple[int, int], JournalFile] = WeakValueDictionary()  # by device and inode
_holding = threading.Lock()

REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_BUSY: "it is locked by another program",
    sqlite3.SQLITE_LOCKED: "it is locked by another program",
    sqlite3.SQLITE_NOTADB: "it is damaged",
    sqlite3.SQLITE_CORRUPT: "it is damaged",
    sqlite3.SQLITE_IOERR: "the disk has failed",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened",
}


class JournalFile:
    """The open file of a journal: nobody else can open it meanwhile.

    Args:
        path: The file's.
        mine: Whose it has to be.
        create: Whether it is made if there is none, and becomes `mine` if it is nobody's yet.

    Attributes:
        connection: To it; of one thread at a time.
        identity: Whose it is.

    Raises:
        JournalError: It can't be opened, or is no journal, or another job's.
    """

    def __init__(self, path: str | os.PathLike[str], mine: Identity, *, create: bool) -> None:
        self.path = os.path.realpath(path)  # beside which SQLite has the companions
        with self.explained("opened"):
            if create and not os.path.lexists(self.path):
                _check_nothing_left(self.path)
                _create(self.path)
            self._inode = self._hold()
            try:
                _check_header(self.path)
                self.connection = self._connect()
            except BaseException:
                self._release()
                raise
            try:
                self.identity = self._check(mine, begin=create)
            except BaseException:
                self.close()
                raise

    @contextlib.contextmanager
    def explained(self, done: str) -> Iterator[None]:
        """Has failures say what they are of, and why."""
        try:
            yield
        except sqlite3.Error as error:
            reason = REASONS.get(_code(error))
            if isinstance(error, sqlite3.OperationalError) and not hasattr(error, "sqlite_errorcode"):
                # Python's own: a text is no UTF-8. It shows the text, which may be a token.
                reason, error.args = "it is damaged", ("a text is not UTF-8",)
            if os.path.exists(self.path) and not os.access(self.path, os.W_OK):  # noqa: PTH110 - as below
                reason = "it is read-only"  # of which SQLite may hear as of a failed disk
            detail = f"{reason} ({error})" if reason else str(error)
            raise JournalError(f"the journal {self.path} can't be {done}: {detail}") from error
        except OSError as error:
            raise JournalError(f"the journal {self.path} can't be {done}: {error.strerror}") from error

    def _hold(self) -> tuple[int, int]:
        found = os.stat(self.path)  # noqa: PTH116 - the path is a plain text here
        inode = found.st_dev, found.st_ino
        with _holding:
            if inode in _held:
                raise self._in_use_by(f"this process (pid {os.getpid()})")
            _held[inode] = self
        return inode

    def _release(self) -> None:
        with _holding:
            _held.pop(self._inode, None)

    def _in_use_by(self, who: str) -> JournalError:
        return JournalError(f"the journal {self.path} is in use by {who}; expected one job at a time")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._lock(connection)
        except sqlite3.Error as error:
            connection.close()
            if _code(error) != sqlite3.SQLITE_BUSY:
                raise
            pid = _holder(self.path)
            raise self._in_use_by("another process" + ("" if pid is None else f" (pid {pid})")) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _lock(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the first look at the file
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise JournalError(f"the journal {self.path} can't be opened: no write-ahead log is possible")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{CACHE}")
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        if schema != SCHEMA_VERSION:
            raise JournalError(
                f"the journal {self.path} has schema {schema}, and this release knows {SCHEMA_VERSION}; "
                "update twostage, or begin another file"
            )
        connection.execute("BEGIN IMMEDIATE")  # takes the lock, and tells if nothing can be written
        connection.execute("COMMIT")

    def _check(self, mine: Identity, *, begin: bool) -> Identity:
        row = self.connection.execute("SELECT * FROM job").fetchone()
        if row is None and begin:
            self.connection.execute("INSERT INTO job VALUES (?, ?, ?, ?)", mine)
        theirs = mine if row is None else Identity._make(row)
        different = [
            f"{name}={his!r}, not {my!r}"
            for name, his, my in zip(Identity._fields, theirs, mine, strict=True)
            if my is not None and his != my
        ]
        if different:
            raise JournalError(
                f"the journal {self.path} was written with {' and '.join(different)}; "
                "give it what it was written with, or begin another file"
            )
        return theirs

    def check_in_place(self) -> None:
        """Checks that what is written can be found again.

        Raises:
            JournalError: The file, or its write-ahead log, is gone, or another one.
        """
        if not self._is_in_place():
            raise JournalError(f"the journal {self.path} was deleted or replaced while it was in use")

    def _is_in_place(self) -> bool:
        try:
            found = os.stat(self.path)  # noqa: PTH116 - as above
            os.stat(f"{self.path}-wal")  # noqa: PTH116 - as above
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    def close(self) -> None:
        """Lets others have the file."""
        with contextlib.suppress(sqlite3.Error):  # what is committed is safe
            if not self._is_in_place():  # where SQLite leaves its log, for whatever is in place then
                self.connection.rollback()
                self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with contextlib.suppress(sqlite3.Error):
            self.connection.close()
        self._release()


def _code(error: sqlite3.Error) -> int:
    """Returns SQLite's primary code of an error; 0 if it is Python's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _create(path: str) -> None:
    """Makes the file, whole or not at all: a process may be killed in the middle."""
    directory, name = os.path.split(path)
    descriptor, new = tempfile.mkstemp(prefix=f".{name}.", suffix=".new", dir=directory)  # of mode 0600
    os.close(descriptor)
    try:
        connection = sqlite3.connect(new, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = MEMORY")
            connection.executescript(f"BEGIN; {SCHEMA}; COMMIT")
        finally:
            connection.close()
        try:
            os.link(new, path)
        except FileExistsError:
            return  # somebody else was quicker
        except OSError:  # no links here
            os.rename(new, path)  # noqa: PTH104 - as above
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # noqa: PTH108 - as above


def _check_nothing_left(path: str) -> None:
    """Checks that SQLite would not put what is left of a deleted file into the new one."""
    for left in (f"{path}-wal", f"{path}-journal"):
        if os.path.lexists(left) and os.path.getsize(left):  # noqa: PTH202 - as above
            raise JournalError(f"{left} is left of a file that is gone; delete it, or give another path")


def _check_header(path: str) -> None:
    """Checks that a file is a journal, before SQLite sees it and takes it over."""
    with open(path, "rb") as file:  # noqa: PTH123 - as above
        header = file.read(HEADER.size)
    problem = None
    if not header:
        problem = "is an empty file"
    elif len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
        problem = "is no SQLite database"
    elif HEADER.unpack(header)[1] != APPLICATION_ID:
        problem = "is another program's database"
    if problem is not None:
        raise JournalError(f"{path} {problem}, and no journal; give the path of a journal, or of no file")


def _holder(path: str) -> int | None:
    """Returns the process that has locked a file, if the operating system tells."""
    layout = FLOCK.get(sys.platform)
    if layout is None:
        return None
    import fcntl  # noqa: PLC0415 - Windows has none

    form, places = layout
    fields = [0] * len(places)
    for place, value in zip(places, (fcntl.F_WRLCK, os.SEEK_SET, *LOCKED_BYTES, 0), strict=True):
        fields[place] = value
    with open(path, "rb") as file:  # noqa: PTH123 - as above
        answer = form.unpack(fcntl.fcntl(file, fcntl.F_GETLK, form.pack(*fields)))
    pid: int = answer[places[4]]
    return pid if answer[places[0]] != fcntl.F_UNLCK and pid > 0 else None
