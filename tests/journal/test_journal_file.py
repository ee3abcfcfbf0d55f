"""A journal's file: whose it is, who can read it, and what happens if the disk does not play along."""

from __future__ import annotations

import errno
import itertools
import os
import re
import resource
import sqlite3
import stat
import subprocess
import sys
import traceback
from functools import partial
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from common import ours
from forms import each_way, iterate_in_order, run
from scripts import ran

from twostage import Journal, JournalError, Stage, iter_two_stage
from twostage.journal.file import JournalFile
from twostage.journal.rows import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from forms import Run


def in_a_process(script: str, *arguments: object, **settings: Any) -> subprocess.Popen[str]:  # noqa: ANN401 - Popen's
    return subprocess.Popen(  # noqa: S603 - a script of our own
        [sys.executable, "-c", dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


HOLDER = """
    import sys
    from twostage import iter_two_stage
    with iter_two_stage(range(5), str, str, journal=sys.argv[1], window=2) as outcomes:
        next(outcomes)
        print("held", flush=True)
        input()
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    with in_a_process(HOLDER, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def untouched(path: Path, act: Callable[[], object], error: str) -> None:
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())
    with pytest.raises(JournalError, match=error):
        act()
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())) == before


# --- one at a time


def test_second_process_hears_at_once_who_has_it(path: Path, holder: subprocess.Popen[str]) -> None:
    text = f"the journal {path} is in use by another process (pid {holder.pid}); expected one job at a time"
    for act in (
        lambda: run("a", str, str, journal=path),
        lambda: list(Journal(path)),
        Journal(path).failures,
        Journal(path).recorded,
    ):
        with pytest.raises(JournalError, match=re.escape(text)):
            act()
    assert not ours()


def test_killed_holder_leaves_no_lock(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert run(range(5), str, str, journal=path) == list("01234")


def test_second_job_of_a_process_is_refused_and_harms_no_lock(path: Path) -> None:
    """To open and close the file once more would drop the lock."""
    with iter_two_stage(range(5), str, str, journal=path, window=2) as outcomes:
        next(outcomes)
        for act in (lambda: run("a", str, str, journal=path), Journal(path).recorded):
            with pytest.raises(JournalError, match=rf"in use by this process \(pid {os.getpid()}\)"):
                act()
        with in_a_process(HOLDER, path) as process:
            assert process.wait() == 1
            assert process.stderr is not None
            assert f"in use by another process (pid {os.getpid()})" in process.stderr.read()
        assert len(list(outcomes)) == 4
    assert run(range(5), str, str, journal=path) == list("01234")


def test_journal_is_free_whichever_way_a_job_ends(path: Path) -> None:
    def fail(_: object) -> str:
        raise KeyboardInterrupt

    journal = Journal(path, job="ends")
    with pytest.raises(KeyboardInterrupt):
        run("a", fail, str, journal=journal)
    with pytest.raises(ZeroDivisionError):
        run((1 // 0 for _ in "a"), str, str, journal=journal)
    outcomes = iter_two_stage("ab", str, str, journal=journal)
    next(outcomes)
    outcomes.close()
    with iter_two_stage("abc", str, str, journal=journal) as left:
        next(left)
    assert run("abc", str, str, journal=journal) == list("abc")


def test_thread_that_can_not_start_leaves_the_journal_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("a", str, str, journal=path)
    assert run("a", str, str, journal=path) == ["a"]


# --- the file


@pytest.mark.parametrize("umask", [0, 0o077])
def test_owner_alone_can_read_it(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with iter_two_stage(range(5), str, str, journal=path, window=2) as outcomes:
            next(outcomes)
            files = sorted(path.parent.iterdir())
            assert [file.name for file in files] == ["jobs.sqlite", "jobs.sqlite-wal"]
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)
    assert list(path.parent.iterdir()) == [path]


def test_settings_are_those_that_survive_a_kill(path: Path) -> None:
    file = JournalFile(path, Identity("settings", "", 0, 0), create=True)
    settings = {
        name: file.connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "locking_mode")
    }
    file.close()
    assert settings == {"journal_mode": "wal", "synchronous": 1, "locking_mode": "exclusive"}


def test_relative_path_is_that_of_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)

    def fetch(item: str) -> str:
        os.chdir("/")
        return item

    run("ab", fetch, str, journal=path.name)
    assert Journal(path).recorded().results == 2


def test_relative_path_is_that_of_the_call_though_a_stream_begins_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with iter_two_stage("ab", str, str, journal=path.name) as outcomes:
        (elsewhere := path.parent / "elsewhere").mkdir()
        os.chdir(elsewhere)
        assert len(list(outcomes)) == 2
    assert Journal(path).recorded().results == 2


@pytest.mark.parametrize("there", [True, False])
def test_link_is_followed(path: Path, *, there: bool) -> None:
    (target := path.parent / "elsewhere").mkdir()
    link = path.with_name("link")
    link.symlink_to(target / "jobs.sqlite")
    if there:
        run("a", str, str, journal=target / "jobs.sqlite")
    assert run("ab", str, str.upper, journal=Journal(link, job="str, str")) == ["a" if there else "A", "B"]
    assert Journal(link).recorded().results == 2
    assert link.is_symlink()
    assert sorted(path.parent.iterdir()) == [target, link]


def foreign(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE answers (a)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.write_bytes(b""), "is an empty file, and no journal"),
        (lambda path: path.write_bytes(b"S"), "is no SQLite database, and no journal"),
        (lambda path: path.write_text("id,title\n" * 1000), "is no SQLite database, and no journal"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "is no SQLite database, and no journal"),
        (foreign, "is another program's database, and no journal"),
    ],
    ids=["empty", "one byte", "text", "head alone", "foreign"],
)
def test_file_that_is_no_journal_is_left_alone(
    path: Path, make: Callable[[Path], object], problem: str
) -> None:
    make(path)
    for act in (lambda: run("a", str, str, journal=path), Journal(path).recorded):
        untouched(path, act, f"{problem}; give the path of a journal, or of no file")


@pytest.mark.parametrize("left", ["-wal", "-journal"])
def test_what_is_left_of_a_deleted_file_does_not_come_back(path: Path, left: str) -> None:
    companion = path.with_name(path.name + left)
    companion.write_bytes(b"left")
    with pytest.raises(JournalError, match=f"{companion} is left of a file that is gone; delete it"):
        run("a", str, str, journal=path)
    assert list(path.parent.iterdir()) == [companion]


@pytest.mark.parametrize("where", ["all but the header", "cut", "pages"])
def test_damaged_journal_is_an_error_that_says_so(path: Path, where: str) -> None:
    run(range(2000), str, str, journal=path)
    data = path.read_bytes()
    path.write_bytes(
        data[:100] + b"\xff" * (len(data) - 100)
        if where == "all but the header"
        else data[:5000]
        if where == "cut"
        else data[:4096] + os.urandom(len(data) - 4096)
    )
    untouched(path, lambda: run(range(3000), str, str, journal=path), "can't be (opened|read): it is damaged")
    untouched(path, lambda: list(Journal(path)), "can't be (opened|read): it is damaged")


@pytest.mark.parametrize(
    ("column", "broken"),
    [
        *itertools.product(["token", "result", "key"], [b'"secret \xff"', b'"secret', b'"secret" secret']),
        ("text", b"secret \xff"),
    ],
)
def test_damaged_value_is_shown_by_nothing(path: Path, column: str, broken: bytes) -> None:
    run("a", str, str, journal=path, return_exceptions=True)
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE answers SET {column} = CAST(? AS TEXT)", (broken,))  # noqa: S608 - a column of ours
    if column == "text":
        connection.execute("UPDATE answers SET failure = 'x', stage = 1, passing = 0, result = NULL")
    connection.commit()
    connection.close()
    with pytest.raises(JournalError, match="damaged") as caught:
        list(Journal(path))
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in "".join(traceback.format_exception(error))
        assert "secret" not in repr(vars(error))
        error = error.__cause__ or error.__context__
    if column in ("token", "result"):
        with pytest.raises(JournalError, match="damaged"):
            run("a", str, str, journal=path)


def test_journal_of_another_job_is_refused_and_says_what_differs(path: Path) -> None:
    run("a", str, str, journal=Journal(path, job="reports", version=1))
    for job, settings, difference in (
        ("letters", {"version": 1}, "job='reports', not 'letters'"),
        ("reports", {}, "version='1', not ''"),
        ("reports", {"version": "2"}, "version='1', not '2'"),
        (None, {"version": 2}, "job='reports', not 'str, str' and version='1', not '2'"),
    ):
        journal = Journal(path, job=job, **settings)
        untouched(
            path,
            partial(run, "a", str, str, journal=journal),
            re.escape(f"was written with {difference}; give it what it was written with, or begin another"),
        )
    untouched(
        path,
        lambda: run("a", list, str, many=True, journal=Journal(path, job="reports", version=1)),
        "many=0, not 1",
    )
    assert Journal(path).recorded().job == "reports"
    with pytest.raises(JournalError, match="job='reports', not 'x'"):
        list(Journal(path, job="x"))


def test_journal_of_a_newer_release_is_refused(path: Path) -> None:
    run("a", str, str, journal=path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(JournalError, match="has schema 2, and this release knows 1; update twostage"):
        run("a", str, str, journal=path)


def test_journal_that_is_not_there_is_made_by_jobs_alone(path: Path) -> None:
    with pytest.raises(JournalError, match=r"can't be opened: No such file"):
        list(Journal(path))
    with pytest.raises(JournalError, match=r"can't be opened: No such file"):
        run("a", str, str, journal=path / "in" / "nothing")
    assert not list(path.parent.iterdir())
    with pytest.raises(JournalError, match=r"can't be opened: "):
        run("a", str, str, journal=path.parent)


def test_two_that_make_it_at_once_make_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(new: str, to: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", link)
            run("a", str, str, journal=path)
        link(new, to)

    monkeypatch.setattr(os, "link", late)
    run("b", str, str, journal=path)
    assert [record.item for record in Journal(path)] == ["a", "b"]
    assert list(path.parent.iterdir()) == [path]


def test_file_system_without_links_has_journals_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    run("a", str, str, journal=path)
    assert list(path.parent.iterdir()) == [path]


# --- the disk


class Disk:
    """Makes the connection of a journal fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handed: list[int] = []

    def run(self, job: Run, fail: Callable[[sqlite3.Connection], object]) -> str:
        """Returns what a job ends with that has `fail` in the middle; what was handed over is recorded."""
        connections: list[sqlite3.Connection] = []
        ordered = job is iterate_in_order
        connect = JournalFile._connect

        def note(file: JournalFile) -> sqlite3.Connection:
            connections.append(connect(file))
            return connections[-1]

        def fetch_result(token: str) -> str:
            if token == "100":  # noqa: S105 - none
                fail(connections[0])
            return token * 500

        journal = Journal(self.path, job="disk")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JournalFile, "_connect", note)
            try:
                if job is run:
                    run(range(2000), str, fetch_result, journal=journal)
                with iter_two_stage(
                    range(2000), str, fetch_result, ordered=ordered, journal=journal
                ) as outcomes:
                    self.handed += (outcome.item for outcome in outcomes)
            except JournalError as error:
                assert not ours()
                return str(error)
        raise AssertionError

    def check(self) -> None:
        """The rest is done by a later run, and nothing twice."""
        recorded = {record.item for record in Journal(self.path) if record.is_done}
        assert recorded >= set(self.handed)
        asked: list[str] = []

        def fetch_result(token: str) -> str:
            asked.append(token)
            return token * 500

        results = run(range(2000), str, fetch_result, journal=Journal(self.path, job="disk"))
        assert results == [str(item) * 500 for item in range(2000)]
        assert not recorded & set(map(int, asked))


@each_way
def test_full_disk_ends_the_job(path: Path, job: Run) -> None:
    disk = Disk(path)
    error = disk.run(job, lambda connection: connection.execute("PRAGMA max_page_count = 1"))
    assert error == (f"the journal {path} can't be written: the disk is full (database or disk is full)")
    disk.check()


@each_way
def test_file_system_that_becomes_read_only_ends_the_job(path: Path, job: Run) -> None:
    disk = Disk(path)
    error = disk.run(job, lambda connection: connection.execute("PRAGMA query_only = 1"))
    assert error.startswith(f"the journal {path} can't be written: it is read-only")
    disk.check()


def test_read_only_file_system_is_told_from_a_failed_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There SQLite says "disk I/O error"."""
    run("a", str, str, journal=path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(JournalFile, "_lock", fail_to_write)
    with pytest.raises(JournalError, match=r"can't be opened: it is read-only \(disk I/O error\)"):
        run("a", str, str, journal=path)


def fail_to_write(*_: object) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    raise error


@pytest.mark.parametrize("gone", ["", "-wal"])
def test_journal_that_is_deleted_under_way_ends_the_job(path: Path, gone: str) -> None:
    disk = Disk(path)
    error = disk.run(run, lambda _: os.unlink(f"{path}{gone}"))  # noqa: PTH108 - a companion
    assert error == f"the journal {path} was deleted or replaced while it was in use"


def test_journal_that_is_replaced_under_way_ends_the_job(path: Path) -> None:
    path.with_name("other").write_bytes(b"")
    error = Disk(path).run(run, lambda _: path.with_name("other").replace(path))
    assert error == f"the journal {path} was deleted or replaced while it was in use"


def test_what_is_put_in_a_journal_s_place_is_left_as_it_is(path: Path) -> None:
    """SQLite would put the log of the one that was there into it."""
    other = path.with_name("other.sqlite")
    job = {"journal": Journal(other, job="disk")}
    run(["old"], str, str, **job)
    Disk(path).run(run, lambda _: other.replace(path))
    assert [record.item for record in Journal(path)] == ["old"]
    assert run(["old", "new"], str, str.upper, journal=Journal(path, job="disk")) == ["old", "NEW"]


def test_run_after_one_whose_journal_was_deleted_begins_anew(path: Path) -> None:
    Disk(path).run(run, lambda _: path.unlink())
    assert run("ab", str, str, journal=path) == ["a", "b"]
    assert [record.item for record in Journal(path)] == ["a", "b"]


def test_real_limit_of_a_file_s_size_ends_the_job_and_a_later_run_goes_on(path: Path) -> None:
    """It stands for a full disk: the system call fails."""
    script = """
        import sys
        from twostage import JournalError, iter_two_stage
        handed = []
        try:
            with iter_two_stage(range(2000), str, lambda token: token * 500, journal=sys.argv[1]) as outcomes:
                handed += (outcome.item for outcome in outcomes)
        except JournalError as error:
            print(error)
        print(handed)
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    with in_a_process(script, path, preexec_fn=limit) as process:
        assert process.stdout is not None
        error, handed = process.stdout.read().splitlines()
    assert f"the journal {path} can't be written: the disk has failed" in error
    recorded = {record.item for record in Journal(path)}
    assert recorded >= set(map(int, re.findall(r"\d+", handed)))
    with in_a_process(script, path) as process:
        assert process.stdout is not None
        (handed,) = process.stdout.read().splitlines()
    assert sorted(map(int, re.findall(r"\d+", handed))) == list(range(2000))


def test_read_only_directory_is_an_error_before_any_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(JournalError, match=f"the journal {path} can't be opened: Read-only file system"):
        run("a", lambda _: 1 // 0, str, journal=path)


def test_stage_of_its_own_settings_has_its_function_s_name(path: Path) -> None:
    run("a", Stage(str.upper, workers=1), str.lower, journal=path)
    assert Journal(path).recorded().job == "str.upper, str.lower"


def test_python_without_sqlite_has_all_but_journals() -> None:
    script = """
        import sys
        sys.modules["sqlite3"] = None
        from twostage import Journal, run_two_stage
        print(run_two_stage("a", str, str))
        run_two_stage("a", str, str, journal="a.sqlite")
    """
    done = ran(script)
    assert done.stdout == "['a']\n"
    assert "\nModuleNotFoundError: " in done.stderr
    assert "sqlite3" in done.stderr
