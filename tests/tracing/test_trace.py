"""What a trace has recorded, and the figures, pictures and files that are made of it."""

from __future__ import annotations

import gc
import json
import stat
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from common import needs_clients
from forms import each_way, run
from pacing import asking
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from twostage import Journal, Stage, Trace
from twostage.observing.record import ATTEMPTS
from twostage.testing import ApiError, SimulatedApi, VirtualTime, sleep
from twostage.tracing.timeline import area, calls_running, lanes, tokens_waiting

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forms import Run

UNAVAILABLE = 503


def timed(seconds: float) -> Callable[[Any], Any]:
    def fetch(argument: Any) -> Any:  # noqa: ANN401 - of both stages
        sleep(seconds)
        return argument

    return fetch


def traced(items: Any = range(40), **settings: Any) -> Trace:  # noqa: ANN401 - any job
    """Runs a job with failures, retries and a pause: 10 batches of 4 at 2 s, results at 1 s."""
    trace = Trace()
    refused = asking(5)
    raised: dict[int, Exception] = {7: ApiError(UNAVAILABLE), 21: refused, 30: LookupError("a secret")}

    def fetch_result(token: int) -> int:
        sleep(1)
        if token in raised:
            raise raised.pop(token)
        return token

    retry = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, ApiError)),
        wait=wait_fixed(3),
        stop=stop_after_attempt(3),
    )
    with VirtualTime():
        run(
            items,
            Stage(timed(2), batch_size=4, workers=2),
            Stage(fetch_result, workers=4),
            **{"retry": retry, "return_exceptions": True, "trace": trace, **settings},
        )
    return trace


# --- what is recorded


@each_way
def test_each_attempt_is_recorded(job: Run) -> None:
    trace = Trace()
    with VirtualTime():
        job("ab", timed(1), timed(2), trace=trace, result_workers=1)
    assert trace.columns() == {
        "stage": [1, 1, 2, 2],
        "item_index": [0, 1, 0, 1],
        "size": [1, 1, 1, 1],
        "number": [1, 1, 1, 1],
        "handed_over": [0, 0, 1, 1],
        "began": [0, 0, 1, 3],
        "ended": [1, 1, 3, 5],
        "answers": [1, 1, 1, 1],
        "ending": ["", "", "", ""],
    }
    assert (len(trace), trace.seconds) == (4, 5)


def test_failures_waits_and_pauses_are_recorded() -> None:
    trace = traced()
    columns = trace.columns()
    failed = [row for row in zip(*columns.values(), strict=True) if row[-1]]
    assert sorted((row[1], row[-1]) for row in failed) == [
        (7, "ApiError 503"),
        (21, "AnsweredError 429"),
        (30, "LookupError"),
    ]
    assert [until - since for since, until in trace.retries(2)] == [3, 3]
    assert trace.retries(1) == []
    ((since, until, why),) = trace.pauses(2)
    assert (until - since, why) == (5, "paused")


def test_columns_are_for_pandas() -> None:
    needs_clients("pandas")
    import pandas as pd  # noqa: PLC0415 - it may not be there

    frame = pd.DataFrame(traced().columns())
    assert (frame["ended"] >= frame["began"]).all()
    assert frame.groupby("stage")["number"].count().to_list() == [10, 42]


def test_an_attempt_takes_64_bytes_at_most() -> None:
    trace = Trace()
    run(range(20_000), str, str, trace=trace)
    held = sum(sys.getsizeof(column) for column in trace._attempts.values())
    assert held / len(trace) <= 64 * 1.13  # arrays grow by an eighth at a time
    assert sum(trace._attempts[name].itemsize for name in ATTEMPTS) <= 64


def test_later_attempts_than_wanted_are_counted() -> None:
    trace = Trace(max_attempts=1500)
    run(range(1000), str, str, trace=trace)
    assert (len(trace), trace.left_out) == (1500, 500)
    assert "500 attempts were not recorded" in str(trace)
    with pytest.raises(ValueError, match="the trace has not all attempts: 500 were left out"):
        trace.efficiency()


def test_trace_of_the_next_job_begins_anew() -> None:
    trace = Trace()
    run("abc", str, str, trace=trace)
    run("a", str, str, trace=trace)
    assert len(trace) == 2


def test_nothing_of_the_job_is_kept() -> None:
    class Error(Exception):
        pass

    trace = Trace()

    def fail(_: str) -> str:
        raise Error

    run("a", str, fail, trace=trace, return_exceptions=True)
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Error)]


@pytest.mark.parametrize("wrong", [0, -1, "3", True, 1.5])
def test_wrong_bound_is_an_error(wrong: Any) -> None:  # noqa: ANN401 - wrong on purpose
    with pytest.raises((TypeError, ValueError), match="max_attempts is"):
        Trace(wrong)


def test_trace_without_a_job_says_so(tmp_path: Path) -> None:
    calls: list[Callable[[Trace], object]] = [
        Trace.summary,
        Trace.columns,
        Trace.efficiency,
        Trace.what_if,
        Trace.plot,
        str,
        lambda trace: trace.save(tmp_path / "trace.json"),
        lambda trace: trace.foretell(10),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no job that has ended; give it to one as trace="):
            call(Trace())
    assert repr(Trace()) == "<Trace of 0 attempts>"
    empty = Trace()
    run([], str, str, trace=empty)
    for call in (Trace.summary, Trace.efficiency, Trace.plot):
        with pytest.raises(ValueError, match="the trace has no attempts"):
            call(empty)


# --- the summary


def test_summary_has_the_figures_of_both_stages() -> None:
    trace = traced()
    first, second = trace.summary().stages
    assert first[:6] == (1, 2, 10, 10, 0, {})
    assert (first.p50, first.p99, first.longest) == (2, 2, 2)
    assert second[:6] == (2, 4, 40, 42, 2, {"ApiError 503": 1, "AnsweredError 429": 1, "LookupError": 1})
    assert second.utilisation == pytest.approx(42 / 4 / trace.seconds)
    assert second.throughput == pytest.approx(39 / trace.seconds)
    assert second.held_back == 5
    assert (trace.summary().done, trace.summary().failed) == (40, 1)


def test_percentiles_are_those_of_the_answers() -> None:
    trace = Trace()
    latencies = iter(range(1, 101))

    def fetch_result(token: int) -> int:
        sleep(next(latencies))
        if token == 99:
            raise LookupError
        return token

    with VirtualTime():
        run(range(100), timed(0), fetch_result, trace=trace, retry=None, return_exceptions=True)
    second = trace.summary().stages[1]
    assert (second.p50, second.p90, second.p99, second.longest) == (50, 90, 99, 99)


def limit_of(*stages: Any, items: Any = range(400), **settings: Any) -> tuple[str, str]:  # noqa: ANN401 - any job
    trace = Trace()
    with VirtualTime():
        run(items, *stages, trace=trace, **settings)
    summary = trace.summary()
    return summary.limit, summary.advice


def test_advice_is_to_raise_what_limits_the_job() -> None:
    limit, advice = limit_of(timed(0.1), timed(1), result_workers=10)
    assert limit == "stage two"
    assert advice.startswith("stage two's workers were busy 99% of the time while ")
    assert advice.endswith(" tokens waited: raise result_workers")
    limit, advice = limit_of(timed(1), timed(0.1), token_workers=2)
    assert limit == "stage one"
    assert advice.endswith("raise token_workers, or use batches")
    limit, advice = limit_of(Stage(timed(1), batch_size=5, workers=2), timed(0.1))
    assert advice.endswith("raise token_workers or batch_size")


def test_advice_knows_of_rates() -> None:
    limit, advice = limit_of(timed(0.1), Stage(timed(0.1), rate=10))
    assert limit == "the rate of stage two"
    assert "its rate allows 10: a higher one" in advice


def test_advice_knows_of_pauses_and_outages(virtual: VirtualTime) -> None:
    raised: list[Exception] = [asking(60)]

    def fetch_result(token: int) -> int:
        sleep(1)
        if raised:
            raise raised.pop()
        return token

    trace = Trace()
    run(range(100), str, fetch_result, trace=trace)
    assert trace.summary().limit == "the API of stage two"
    assert "as the API asked" in trace.summary().advice

    def down(token: int) -> int:
        sleep(0.1)
        if start + 1 < virtual.now < start + 200:
            raise ConnectionError
        return token

    start = virtual.now
    run(range(2000), str, down, trace=trace, result_workers=16)
    assert "waited 9" in trace.summary().advice
    assert trace.summary().advice.endswith("for an API that did not answer")


def test_advice_knows_of_failures_and_of_a_slow_source(virtual: VirtualTime) -> None:
    def slow() -> Any:  # noqa: ANN401 - a generator
        for item in range(20):
            sleep(5)
            yield item

    assert limit_of_now(slow(), timed(1), timed(1))[0] == "neither stage"
    often = SimulatedApi(str, latency=1, fail=0.5)
    assert limit_of_now(range(50), str, often, retry=20, result_workers=50)[0] == "failures"


def limit_of_now(*arguments: Any, **settings: Any) -> tuple[str, str]:  # noqa: ANN401 - any job
    trace = Trace()
    run(*arguments, trace=trace, **settings)
    return trace.summary().limit, trace.summary().advice


def test_summary_is_a_table() -> None:
    lines = str(traced()).splitlines()
    assert lines[0].split() == ["stage", "one", "stage", "two"]
    table = {line[:18].strip(): line[18:].split() for line in lines[1:13]}
    assert table["calls"] == ["10", "40"]
    assert table["latency p50"] == ["2.00", "s", "1.00", "s"]
    assert "stage two failed 1 times with LookupError" in lines
    assert lines[-4].startswith("40 items in ")
    assert lines[-3:-1] == ["", "limit: the API of stage two"]


# --- the timeline


def test_lanes_are_as_few_as_workers_and_no_two_attempts_share_one_at_a_time() -> None:
    second = traced().stage(2)
    lane_of = lanes(second)
    assert set(lane_of) == set(range(4))
    for lane in range(4):
        spans = sorted(
            (began, ended)
            for began, ended, one in zip(second.began, second.ended, lane_of, strict=True)
            if one == lane
        )
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_tokens_wait_from_their_batch_s_end_to_their_beginning() -> None:
    trace = Trace()
    with VirtualTime():
        run(range(4), Stage(timed(1), batch_size=4), timed(2), result_workers=1, trace=trace)
    first, second = trace.stage(1), trace.stage(2)
    assert tokens_waiting(first, second) == [(1, 3), (3, 2), (5, 1), (7, 0)]
    assert calls_running(second) == [(1, 1), (3, 1), (5, 1), (7, 1), (9, 0)]
    assert area(calls_running(second), 9) == 8
    assert trace.summary().tokens_waiting == pytest.approx((3 + 2 + 1) * 2 / 9)


def test_tokens_from_a_journal_have_waited_from_the_beginning(path: Path) -> None:
    def leave(_: str) -> str:
        raise SystemExit

    journal = Journal(path, job="letters")
    with pytest.raises(SystemExit):
        run("abcd", str, leave, journal=journal)
    trace = Trace()
    run("abcd", str, str, journal=journal, trace=trace, result_workers=1)
    steps = tokens_waiting(trace.stage(1), trace.stage(2))
    assert [number for _, number in steps] == [3, 2, 1, 0]


def test_efficiency_is_that_of_the_best_schedule() -> None:
    trace = Trace()
    with VirtualTime():
        run(range(8), timed(1), timed(2), token_workers=8, result_workers=4, trace=trace)
    assert trace.efficiency() == 1  # 1 s, then 8 of 2 s on 4 workers
    with VirtualTime():
        run(range(8), timed(1), timed(2), token_workers=1, result_workers=4, trace=trace)
    assert trace.efficiency() == 1  # 8 s, then 2 s
    assert traced().efficiency() < 0.8  # a pause and waits


# --- files


def test_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    trace = traced()
    file = tmp_path / "trace.json"
    file.touch(0o644)
    trace.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Trace.load(file)
    assert again.columns() == trace.columns()
    assert str(again) == str(trace)
    assert (again.job, again.end, again.holds, again.endings) == (
        trace.job,
        trace.end,
        trace.holds,
        trace.endings,
    )
    assert again.what_if() == trace.what_if()
    text = file.read_text()
    assert "secret" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_outage_comes_back_too(tmp_path: Path) -> None:
    """How long it is going to be is not known as it begins."""

    def fetch_result(token: int) -> int:
        sleep(0.1)
        if 1 < virtual.now < 30:
            raise ConnectionError
        return token

    trace = Trace()
    with VirtualTime() as virtual:
        run(range(500), str, fetch_result, result_workers=8, trace=trace)
    assert [held.why for held in trace.holds] == ["down", "up"]
    trace.save(tmp_path / "trace.json")
    text = (tmp_path / "trace.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Trace.load(tmp_path / "trace.json").holds == trace.holds


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "twostage trace 0"}', "secret"])
def test_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match="is no trace that this release has saved"):
        Trace.load(file)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none")


def test_perfetto_gets_an_event_for_each_attempt_and_others_for_waits_and_pauses(tmp_path: Path) -> None:
    trace = traced()
    file = tmp_path / "trace.json"
    trace.to_perfetto(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    events = json.loads(file.read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(trace)
    assert {(event["pid"], event["dur"]) for event in complete} == {(1, 2e6), (2, 1e6)}
    assert max(event["tid"] for event in complete if event["pid"] == 2) == 4
    assert [event["args"]["ending"] for event in complete if "ending" in event["args"]] == [
        "ApiError 503",
        "AnsweredError 429",
        "LookupError",
    ]
    begun = {(event["id"], event["name"]): event["ts"] for event in events if event["ph"] == "b"}
    ended = {(event["id"], event["name"]): event["ts"] for event in events if event["ph"] == "e"}
    lengths: dict[str, list[float]] = {}
    assert begun.keys() == ended.keys()
    for (number, name), since in begun.items():
        lengths.setdefault(name, []).append(ended[number, name] - since)
    assert lengths["wait for a retry"] == [3e6, 3e6]
    assert lengths["paused by the API"] == [5e6]
    assert min(lengths["wait for a worker"]) > 0
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "stage one: timed.<locals>.fetch",
        "stage two: traced.<locals>.fetch_result",
    }


@pytest.mark.parametrize("many", [False, True])
def test_plot_has_two_panels_of_the_same_time(tmp_path: Path, *, many: bool) -> None:
    needs_clients("matplotlib")
    trace = traced(range(4000)) if many else traced()
    file = tmp_path / "trace.png"
    figure = trace.plot(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    above, below, right = figure.axes
    assert above.get_xlim() == below.get_xlim() == (0, trace.seconds)
    assert below.get_xlabel() == "seconds since the job began"
    assert (below.get_ylabel(), right.get_ylabel()) == ("calls", "tokens")
    legend = above.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == ["stage one: answered", "stage two: answered"]
    assert {"failed", "held back by the API"} <= set(labels)
    assert ("answered after a retry" in labels) == (not many)
    assert len(above.images) == (2 if many else 0)
    ticks = [label.get_text() for label in above.get_yticklabels()]
    assert ticks == ["stage one\n2 at once", "stage two\n4 at once"]


def test_plot_needs_no_display_and_opens_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_clients("matplotlib")
    import matplotlib as mpl  # noqa: PLC0415 - it may not be there

    monkeypatch.setattr(mpl, "use", lambda _: pytest.fail("a backend was chosen"))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    traced().plot()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_missing_matplotlib_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'twostage\[plot\]'"):
        traced().plot()
