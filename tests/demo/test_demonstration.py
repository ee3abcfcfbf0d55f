"""`python -m twostage`: what it prints, what its options do, and that it notices what goes wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import tenacity
from common import needs_clients
from scripts import ran

from twostage import run_two_stage
from twostage.__main__ import main
from twostage.demo import command as demonstration
from twostage.demo import ways
from twostage.demo.answers import FAULTS, ApiError, Faults, result_of, token_of
from twostage.demo.api import EmbeddedApi
from twostage.demo.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LONG = 10.0
"""Seconds that nothing here takes."""

HEADER = ["seconds", "attempts", "retries", "speed-up"]
ROW = re.compile(
    r"(?P<way>\S.*?)  +(?P<seconds>[\d.]+)  +(?P<attempts>[\d,]+)  +(?P<retries>[\d,]+)"
    r"  +(?P<speed_up>[\d.]+)x"
)


class Table:
    """What the demonstration printed: what stands above its table, the rows, and what stands below."""

    def __init__(self, text: str) -> None:
        self.above, table, self.below, self.trace, self.limit = text.strip().split("\n\n")
        header, *lines = table.splitlines()
        assert header.split() == HEADER
        assert len(set(map(len, [header, *lines]))) == 1  # the columns are aligned
        rows = [ROW.fullmatch(line) for line in lines]
        self.ways = [row["way"] for row in rows if row]
        self.attempts = [int(row["attempts"].replace(",", "")) for row in rows if row]
        self.retries = [int(row["retries"].replace(",", "")) for row in rows if row]
        self.speed_ups = [row["speed_up"] for row in rows if row]
        assert len(self.ways) == 4

    @property
    def calls(self) -> list[int]:
        return [attempts - retries for attempts, retries in zip(self.attempts, self.retries, strict=True)]


def command(*options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "error", "-m", "twostage", *options]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=50)  # noqa: S603 - our own


class QuickApi(EmbeddedApi):
    """Answers at once; each that was made is remembered, and how."""

    apis: list[QuickApi]
    made: list[dict[str, Any]]

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - as the base class
        self.apis.append(self)
        self.made.append(settings)
        super().__init__(**{"token_latency": 0, "result_latency": 0} | settings)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> type[QuickApi]:
    monkeypatch.setattr(QuickApi, "apis", [], raising=False)
    monkeypatch.setattr(QuickApi, "made", [], raising=False)
    monkeypatch.setattr(demonstration, "EmbeddedApi", QuickApi)
    return QuickApi


def table_of(capsys: pytest.CaptureFixture[str], *options: str) -> Table:
    assert demonstration.main(options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return Table(printed.out)


# --- as a command


def test_command_prints_the_table_and_nothing_else() -> None:
    ended = command("--items", "60", "--batch-size", "20", "--faults", "0.05", "--result-workers", "8")
    assert (ended.returncode, ended.stderr) == (0, "")
    table = Table(ended.stdout)
    assert table.above.startswith("60 items, two calls each, to an HTTP API on 127.0.0.1")
    assert "5 % of the attempts fail" in table.above
    assert table.ways == [
        "plain loop",
        "one thread pool, 8 threads",
        "twostage, one item a call, 8 + 8 workers",
        "twostage, batches of 20, 4 + 8 workers",
    ]
    assert table.calls == [120, 120, 120, 63]
    assert sum(table.retries) > 0
    assert table.speed_ups[0] == "1.0"
    assert table.below == "All results right, in order. The last way, as its trace has it:"
    assert [*table.trace.splitlines()[1].split()[:2], table.calls[-1]] == ["calls", "3", 63]
    assert table.limit.startswith("limit: ")
    assert table.limit.endswith("of the time it took.")


def test_command_refuses_a_bad_option_with_a_message() -> None:
    ended = command("--items", "0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: python -m twostage")
    assert "argument --items: expected a whole number of at least 1, not '0'" in ended.stderr


def test_default_is_a_thousand_items_in_batches_of_a_hundred() -> None:
    assert vars(demonstration.parse([])) == {
        "items": 1000,
        "batch_size": 100,
        "token_workers": 4,
        "result_workers": 32,
        "faults": {"errors": 0.02},
        "seed": 7,
        "plot": None,
        "perfetto": None,
        "trace_file": None,
    }


# --- options


def test_each_option_is_used(
    quick: type[QuickApi], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[tuple[list[int], dict[str, Any]]] = []
    pools: list[int] = []

    def job(items: range, *stages: Callable[[Any], Any], **settings: Any) -> list[Any]:  # noqa: ANN401
        jobs.append((list(items), settings))
        return run_two_stage(items, *stages, **settings)

    def pool(workers: int) -> ThreadPoolExecutor:
        pools.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(demonstration, "run_two_stage", job)
    monkeypatch.setattr(demonstration, "ThreadPoolExecutor", pool)
    table = table_of(
        capsys,
        *("--items", "10", "--batch-size", "3", "--token-workers", "2", "--result-workers", "5"),
        *("--faults", "0", "--seed", "99"),
    )
    made: dict[str, Any] = {"faults": {"errors": 0.0}, "seed": 99}
    assert quick.made == [made | {"outage_after": calls // 2} for calls in table.calls]
    assert pools == [5]
    watching = {"trace": jobs[0][1]["trace"], "progress": True}
    assert jobs == [
        (list(range(10)), {"token_workers": 5, "result_workers": 5, **watching}),
        (list(range(10)), {"batch_size": 3, "token_workers": 2, "result_workers": 5, **watching}),
    ]
    assert table.attempts == [20, 20, 20, 14]
    assert table.retries == [0, 0, 0, 0]
    assert table.ways[1:] == [
        "one thread pool, 5 threads",
        "twostage, one item a call, 5 + 5 workers",
        "twostage, batches of 3, 2 + 5 workers",
    ]
    assert "; 0 % of the attempts fail" in table.above


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("items", [1, 100, 101])
def test_plain_loop_is_measured_on_a_sample_and_scaled(
    items: int, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(capsys, "--items", str(items), "--faults", "0")
    batches = -(-items // 100)
    assert table.attempts == [2 * items, 2 * items, 2 * items, batches + items]
    scaled = items > 100
    assert table.ways[0] == ("plain loop (measured on 100 items, scaled)" if scaled else "plain loop")
    assert table.above.startswith(f"{items:,} items, ")


def test_retries_are_counted(
    quick: type[QuickApi], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "wait_random_exponential", lambda **_: tenacity.wait_none())
    monkeypatch.setattr("twostage.failing.retry.FIRST_WAIT", 0.0)
    table = table_of(capsys, "--items", "50", "--faults", "0.1", "--batch-size", "5", "--seed", "1")
    assert table.calls == [100, 100, 100, 60]
    assert all(retries > 0 for retries in table.retries)


@pytest.mark.parametrize("option", ["--items", "--batch-size", "--token-workers", "--result-workers"])
def test_number_that_is_no_whole_one_from_1_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("0", "-1", "1.5", "x", "", "1e3", "1_000", "²", "٣"):
        refused(capsys, option, number, f"argument {option}: expected a whole number ")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch-size", "101", "expected a whole number from 1 to 100, not '101'"),
        ("--seed", "-1", "expected a whole number of at least 0, not '-1'"),
        ("--seed", "x", "expected a whole number of at least 0, not 'x'"),
        ("--faults", "1", "expected a number from 0 to below 1, not '1'"),
        ("--faults", "-0.1", "expected a number from 0 to below 1, not '-0.1'"),
        ("--faults", "nan", "expected a number from 0 to below 1, not 'nan'"),
        ("--faults", "inf", "expected a number from 0 to below 1, not 'inf'"),
        ("--faults", "few", "expected a number from 0 to below 1, not 'few'"),
        ("--faults", "", "expected a number from 0 to below 1, not ''"),
        ("--faults", "error=0.1", "no fault is called 'error'; there are errors, missing, denied, refused, "),
        ("--faults", "0.1,missing=0.1", "no fault is called '0.1'; there are "),
        ("--faults", "missing=0.1,", "no fault is called ''; there are "),
        ("--faults", "missing=1", "expected a number from 0 to below 1, not '1'"),
        ("--faults", "errors=0.1,missing=", "expected a number from 0 to below 1, not ''"),
        ("--colour", "red", "unrecognized arguments: --colour=red"),
    ],
)
def test_bad_option_is_refused_with_a_message(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, option, value, message)


def refused(capsys: pytest.CaptureFixture[str], option: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        demonstration.main([f"{option}={value}"])
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


def test_help_names_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        demonstration.main(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for option in ("--items", "--batch-size", "--token-workers", "--result-workers", "--faults", "--seed"):
        assert option in text
    assert "%(default)s" not in text
    for name in FAULTS:
        assert f"\n  {name} " in text


def test_table_shows_speed_ups_against_the_first_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        demonstration.Row("a loop", 1234.0, 2_012_345, 2_000_000),
        demonstration.Row("a pool", 100.0, 2_000_000.4, 2_000_000),
        demonstration.Row("the library", 1.0, 1_020_000, 1_010_000),
    ]
    demonstration.print_table(rows, demonstration.COLUMNS)
    assert capsys.readouterr().out == (
        "             seconds  attempts  retries  speed-up\n"
        "a loop       1234.00  2,012,345   12,345      1.0x\n"
        "a pool        100.00  2,000,000        0     12.3x\n"
        "the library     1.00  1,020,000   10,000   1234.0x\n"
    )


# --- faults by name

ALL = {
    "errors": 0.02,
    "missing": 0.03,
    "denied": 0.03,
    "refused": 0.03,
    "slots": 0.05,
    "unprocessed": 0.05,
    "expired": 0.1,
    "pending": 0.2,
    "spikes": 0.01,
    "resets": 0.02,
    "truncated": 0.02,
    "hangs": 0.005,
    "throttled": 0.02,
    "bursts": 0.02,
    "outage": 0.01,
}
EXTRA = re.compile(r"(?P<way>\S.*?)  +[\d.]+  +(?P<attempts>[\d,]+)  +(?P<extra>[\d,]+)")


def written(shares: dict[str, float]) -> str:
    return ",".join(f"{name}={share}" for name, share in shares.items())


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "PATIENT", ways.PATIENT.copy(wait=tenacity.wait_random(0, 0.02)))


def extras_of(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, dict[str, int], str]:
    """Returns what stands above the table, how many attempts each way took beyond its calls, and the rest."""
    assert demonstration.main(options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    above, table, below, trace, limit = printed.out.strip().split("\n\n")
    assert trace.startswith("                   stage one  stage two\ncalls ")
    assert limit.startswith("limit: ")
    below, _, last = below.rpartition("\n")
    assert last == "The last way, as its trace has it:"
    header, *lines = table.splitlines()
    assert header.split() == ["seconds", "attempts", "extra"]
    assert len(set(map(len, [header, *lines]))) == 1
    rows = [row for row in map(EXTRA.fullmatch, lines) if row]
    assert len(rows) == len(lines) == 4
    return above, {row["way"].split(",")[0]: int(row["extra"].replace(",", "")) for row in rows}, below


@pytest.mark.slow
@pytest.mark.usefixtures("_hasty", "quick")
def test_job_goes_through_all_faults_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    above, extras, below = extras_of(capsys, "--items", "200", "--batch-size", "20", "--faults", written(ALL))
    assert "; faults by share:\nerrors 2 %, missing 3 %, denied 3 %, refused 3 %, slots 5 %, " in above
    assert above.endswith(
        "\nA plain loop and a thread pool, as they are commonly written, do not survive these."
    )
    assert list(extras) == ["one item a call", "tokens by key", "results by key too", "orders by key"]
    assert all(extra > 0 for extra in extras.values())
    faults = Faults(ALL, seed=7)
    counts = Counter(map(faults.lasting_status, range(200)))
    assert set(counts) == {None, 400, 403, 404}
    assert f": {counts[None]} items have their results, {200 - counts[None]} failed as ordered (" in below
    assert below.endswith(f"({counts[400]} refused, {counts[404]} missing, {counts[403]} denied).")


def test_all_faults_are_tried() -> None:
    assert list(ALL) == list(FAULTS)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("spikes", 0.1),
        ("resets", 0.1),
        ("truncated", 0.1),
        ("bursts", 0.1),
        # These wait: for the client to give up, for as long as was asked, for probes.
        pytest.param("hangs", 0.02, marks=pytest.mark.slow),
        pytest.param("throttled", 0.03, marks=pytest.mark.slow),
        pytest.param("outage", 0.02, marks=pytest.mark.slow),
    ],
)
def test_job_goes_through_each_fault_of_requests(
    name: str, share: float, quick: type[QuickApi], capsys: pytest.CaptureFixture[str]
) -> None:
    _, extras, below = extras_of(capsys, "--items", "50", "--batch-size", "5", "--faults", f"{name}={share}")
    assert below.endswith(": 50 items have their results.")
    assert set().union(*(api.befallen for api in quick.apis)) == {name}
    for api, extra in zip(quick.apis, extras.values(), strict=True):
        if name == "spikes":
            assert extra == 0
        elif name == "hangs":
            assert extra >= api.befallen[name]  # on a busy machine another request may be given up, too
        else:
            assert extra == api.befallen[name]


@pytest.mark.usefixtures("quick")
def test_client_gives_up_soon_only_if_requests_hang(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timeouts: list[float] = []

    def client(url: str, timeout: float) -> Client:
        timeouts.append(timeout)
        return Client(url, timeout)

    monkeypatch.setattr(demonstration, "Client", client)
    for faults in ("0", "hangs=0,slots=0.01", "hangs=0.01"):
        assert demonstration.main(["--items", "2", "--faults", faults]) == 0
    assert timeouts == [30.0] * 8 + [demonstration.GIVE_UP] * 4
    assert demonstration.GIVE_UP < 1


@pytest.mark.usefixtures("_hasty", "quick")
@pytest.mark.parametrize(
    "name", ["missing", "denied", "refused", "slots", "unprocessed", "expired", "pending"]
)
def test_job_goes_through_each_fault(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, extras, below = extras_of(capsys, "--items", "50", "--batch-size", "5", "--faults", f"{name}=0.1")
    lasting = Counter(map(Faults({name: 0.1}, seed=7).lasting_status, range(50)))
    assert f": {lasting[None]} items have their results" in below
    assert ("failed" in below) == (lasting[None] < 50) == (name in ("missing", "denied", "refused"))
    alone = extras["one item a call"]
    if name in ("missing", "denied", "refused"):
        assert alone == 0  # a call for each item, and none for a token that is not there
    if name == "unprocessed":
        assert alone == 0  # no answer by key
    if name == "expired":
        assert alone == 2 * sum(Faults({name: 0.1}, seed=7).is_expired(token_of(item)) for item in range(50))
    if name == "pending":
        assert alone == sum(map(Faults({name: 0.1}, seed=7).times_pending, map(token_of, range(50))))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("faults", ["errors=0.0", "errors=0", "missing=0", "errors=0,missing=0"])
def test_shares_of_errors_alone_leave_the_four_ways(faults: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert table_of(capsys, "--items", "10", "--faults", faults).ways[0] == "plain loop"


@pytest.mark.usefixtures("_hasty", "quick")
@pytest.mark.parametrize(
    ("faults", "failure"),
    [("slots=0.3", "503: Service Unavailable"), ("pending=0.9", "RetryError"), ("unprocessed=0.9", "")],
)
def test_faults_that_use_up_the_attempts_are_an_error(
    faults: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = ways.PATIENT.copy(stop=tenacity.stop_after_attempt(2))
    monkeypatch.setattr(ways, "PATIENT", hasty)
    expected = rf": a call failed for good \(.*{failure}.*\); try a smaller --faults$"
    with pytest.raises(SystemExit, match=expected):
        demonstration.main(["--items", "20", "--faults", faults])


@pytest.mark.usefixtures("_hasty", "quick")
@pytest.mark.parametrize("way", ["one_item_a_call", "by_key", "both_by_key", "orders_by_key"])
def test_wrong_outcomes_of_any_way_are_an_error(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ways, way)
    for wrong in (lose_the_order, lose_one, mistake_one):
        monkeypatch.setattr(ways, way, lambda *arguments, wrong=wrong: wrong(right(*arguments)))
        with pytest.raises(SystemExit, match=r": wrong results, or not in the order of the items$"):
            demonstration.main(["--items", "10", "--faults", "expired=0.1"])


@pytest.mark.usefixtures("_hasty", "quick")
def test_failure_that_was_not_ordered_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(Client, "fetch_result", fail)
    with pytest.raises(SystemExit, match=r"^one item a call, .*: a call failed for good \('gone'\)"):
        demonstration.main(["--items", "10", "--faults", "expired=0.1"])


# --- what goes wrong


def lose_the_order(results: list[Any]) -> list[Any]:
    return results[::-1]


def lose_one(results: list[Any]) -> list[Any]:
    return results[:-1]


def invent_one(results: list[Any]) -> list[Any]:
    return [*results, result_of(token_of(10))]


def mistake_one(results: list[Any]) -> list[Any]:
    return [*results[:-1], {}]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("way", "wrong"),
    [
        ("plain_loop", lose_the_order),
        ("thread_pool", lose_the_order),
        ("one_item_a_call", lose_the_order),
        ("in_batches", lose_the_order),
        ("in_batches", lose_one),
        ("in_batches", invent_one),
        ("in_batches", mistake_one),
    ],
)
def test_wrong_results_of_any_way_are_an_error(
    way: str,
    wrong: Callable[[list[Any]], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = getattr(demonstration, way)
    monkeypatch.setattr(demonstration, way, lambda *arguments: wrong(right(*arguments)))
    with pytest.raises(SystemExit, match=r": wrong results, or not in the order of the items$"):
        demonstration.main(["--items", "10", "--faults", "0"])
    assert "All results right" not in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_wrong_results_of_the_library_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demonstration,
        "run_two_stage",
        lambda *arguments, **settings: lose_the_order(run_two_stage(*arguments, **settings)),
    )
    with pytest.raises(SystemExit, match=r"^twostage, one item a call, .*: wrong results"):
        demonstration.main(["--items", "10", "--faults", "0"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "failure", [ApiError(404, "gone"), ConnectionResetError("reset"), TimeoutError("late")]
)
def test_call_that_fails_for_good_is_an_error(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(demonstration, "stop_after_attempt", lambda _: tenacity.stop_after_attempt(1))
    monkeypatch.setattr(Client, "fetch_result", fail)
    expected = f"^plain loop: a call failed for good \\({re.escape(str(failure))}\\); try a smaller --faults$"
    with pytest.raises(SystemExit, match=expected):
        demonstration.main(["--items", "10", "--faults", "0"])


def test_threads_of_the_pool_retry_undisturbed_by_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first_is_called, second_begins, first_has_ended = (threading.Event() for _ in range(3))
    second_threads: list[threading.Thread] = []
    begin = tenacity.Retrying.begin

    def begin_slowly(retrying: tenacity.Retrying) -> None:
        if threading.current_thread() in second_threads:
            second_begins.set()
            assert first_has_ended.wait(LONG)
        begin(retrying)

    def fetch_token(item: int) -> str:
        if item == 1 and not first_is_called.is_set():
            first_is_called.set()
            assert second_begins.wait(LONG)
            raise ConnectionResetError  # and so another attempt, while the other call only begins
        return f"token {item}"

    monkeypatch.setattr(tenacity.Retrying, "begin", begin_slowly)
    monkeypatch.setattr(demonstration, "wait_random_exponential", lambda **_: tenacity.wait_none())
    client: Any = SimpleNamespace(fetch_token=fetch_token, fetch_result=str.upper)
    both: Callable[[int], object] = demonstration.both_calls(client)

    def second() -> object:
        second_threads.append(threading.current_thread())
        return both(2)

    with ThreadPoolExecutor(2) as pool:
        try:
            firsts = pool.submit(both, 1)
            assert first_is_called.wait(LONG)
            seconds = pool.submit(second)
            assert firsts.result() == "TOKEN 1"
        finally:
            first_has_ended.set()
        assert seconds.result() == "TOKEN 2"


def test_command_ends_with_an_error_if_results_are_wrong() -> None:
    script = """
import sys; from twostage.demo import command as demonstration
demonstration.in_batches = lambda client, items, options: []
sys.exit(demonstration.main(["--items", "5", "--faults", "0"]))
"""
    ended = ran(script, patience=50)
    assert ended.returncode == 1
    assert (
        ended.stderr
        == "twostage, batches of 100, 4 + 32 workers: wrong results, or not in the order of the items\n"
    )


# --- what it writes


def test_picture_events_and_trace_are_written_and_the_trace_makes_a_plan(
    quick: type[QuickApi], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_clients("matplotlib")
    plot, perfetto, trace = (tmp_path / name for name in ("plot.svg", "events.json", "trace.json"))
    options = ("--items", "60", "--batch-size", "20", "--faults", "0", "--result-workers", "8")
    files = ("--plot", str(plot), "--perfetto", str(perfetto), "--trace", str(trace))
    assert demonstration.main((*options, *files)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [f"{plot} is written.", f"{perfetto} is written.", f"{trace} is written."]
    assert plot.read_text().startswith("<?xml")
    assert len([one for one in json.loads(perfetto.read_text())["traceEvents"] if one["ph"] == "X"]) == 63
    assert main(("plan", str(trace))) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("from 63 attempts for 60 items in ")
    assert [line.split(" items: ")[0].strip() for line in lines] == ["60", "600", "6,000"]
    assert lines[1].endswith("in 8 of 10 cases), 630 calls (630 to 630)")
    assert main(("plan", str(trace), "--items", "120", "--result-workers", "1", "--rate", "10")) == 0
    (_, line) = capsys.readouterr().out.splitlines()
    assert line.startswith("120 items: 11.")


def test_what_can_not_be_planned_or_written_is_a_message(
    quick: type[QuickApi], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = str(tmp_path / "trace.json")
    options = ("--items", "60", "--batch-size", "20", "--faults", "0")
    with pytest.raises(SystemExit, match="--plot: "):
        demonstration.main((*options, "--plot", str(tmp_path / "none" / "plot.png")))
    demonstration.main((*options, "--trace", trace))
    with pytest.raises(SystemExit, match="batch_size is 7, the trace has 20"):
        main(("plan", trace, "--batch-size", "7"))
    with pytest.raises(SystemExit, match="items is 0; expected an integer of at least 1"):
        main(("plan", trace, "--items", "0"))
    for wrong in (__file__, str(tmp_path / "none")):
        with pytest.raises(SystemExit, match=r"is no trace that this release has saved|No such file"):
            main(("plan", wrong))
    assert capsys.readouterr().err == ""
