"""The README's Python blocks run, in their order, against an API on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from common import needs_clients, until

from twostage import Journal, run_two_stage
from twostage.demo.answers import orders_of, result_of, token_of
from twostage.demo.api import EmbeddedApi

if TYPE_CHECKING:
    from collections.abc import Iterator

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
FEWER = 200
SCRIPTS = [block for block in BLOCKS if "__main__" in block]  # which other processes import


@pytest.fixture
def api() -> Iterator[EmbeddedApi]:
    with EmbeddedApi(token_latency=0.002, result_latency=0.002) as api:
        yield api


@pytest.fixture
def exports() -> Iterator[EmbeddedApi]:
    with EmbeddedApi(token_latency=0.002, result_latency=0.002, faults={"pending": 0.5}) as api:
        yield api


def test_every_block_runs(
    api: EmbeddedApi,
    exports: EmbeddedApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    needs_clients("distributed", "filelock", "opentelemetry.sdk", "pydantic", "pyrate_limiter")
    monkeypatch.chdir(tmp_path)  # where a block makes a file
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
    names: dict[str, Any] = vars(module)  # what a block defines the next ones use
    clients = set()
    for block in BLOCKS:
        source = block.replace("https://api.example.com", api.url)
        source = source.replace("https://exports.example.com", exports.url)
        source = source.replace("range(1000)", f"range({FEWER})")  # the clients' own work is much
        if block in SCRIPTS:
            continue
        lines_before = TEXT[: TEXT.index(block)].count("\n")
        exec(compile("\n" * lines_before + source, str(README), "exec", dont_inherit=True), names)  # noqa: S102 - it is ours
        clients |= {names[name] for name in ("session", "client", "bucket") if name in names}
        said = [line.replace("1000", str(FEWER)) for line in re.findall(r"print\(.*\)  # (.*)", block)]
        printed = capsys.readouterr().out.splitlines()
        assert printed == said or not said
        if "results = run_two_stage(range(" in block and "Simulated" not in block:
            number = len(names["results"])
            assert names["results"] == [result_of(token_of(item)) for item in range(number)]
        if "for outcome in" in block:
            assert sorted(int(line.split()[0]) for line in printed) == list(range(FEWER))
    assert names["exports"] == [result_of(token_of(item)) for item in range(20)]
    assert exports.answered[202] > 0
    assert names["orders"] == [[result_of(order) for order in orders_of(item)] for item in range(100)]
    for client in clients:
        client.close()


@pytest.mark.parametrize("block", SCRIPTS, ids=["processes", "shards"])
def test_script_prints_what_it_says(block: str, api: EmbeddedApi, tmp_path: Path) -> None:
    if "dask" in block:
        needs_clients("distributed")
    script = tmp_path / "script.py"
    script.write_text(block.replace("https://api.example.com", api.url), encoding="utf-8")
    ran = subprocess.run(  # noqa: S603 - it is ours
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
        env={**os.environ, "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"},
    )
    assert (ran.stdout.splitlines(), ran.stderr) == (re.findall(r"print\(.*\)  # (.*)", block), "")


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == TEXT.count("```python") == 24


def test_telemetry_reaches_the_real_sdk(api: EmbeddedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_clients("opentelemetry.sdk")
    import opentelemetry.metrics  # noqa: PLC0415 - it may not be there, and so on
    import opentelemetry.trace  # noqa: PLC0415
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: PLC0415

    spans, counts = InMemorySpanExporter(), InMemoryMetricReader()
    tracing, metering = TracerProvider(), MeterProvider([counts])
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(opentelemetry.trace, "get_tracer", tracing.get_tracer)
    monkeypatch.setattr(opentelemetry.metrics, "get_meter", metering.get_meter)
    (block,) = (block for block in BLOCKS if "class Telemetry" in block)
    assert (
        len([line for line in block[block.index("class") : block.index("\n\n\nrun")].splitlines() if line])
        <= 20
    )
    before = time.time_ns()

    def fetch_result(token: str) -> str:
        if token == "token 3":  # noqa: S105 - none
            raise LookupError
        return token

    names: dict[str, Any] = {
        "run_two_stage": lambda items, *stages, **settings: run_two_stage(
            range(10), *stages, **{**settings, "return_exceptions": True}
        ),
        "fetch_tokens": lambda items: [f"token {item}" for item in items],
        "fetch_result": fetch_result,
    }
    exec(block, names)  # noqa: S102 - it is ours
    attempts = [span for span in spans.get_finished_spans() if span.name == "attempt"]
    (job,) = (span for span in spans.get_finished_spans() if span.name == "job")
    assert len(attempts) == 11
    assert job.context is not None
    for span in attempts:
        assert span.parent is not None
        assert span.parent.span_id == job.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert before - 10**7 <= span.start_time <= span.end_time <= time.time_ns() + 10**7
    data = counts.get_metrics_data()
    assert data is not None
    points: Any = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
    counted = {(point.attributes["stage"], point.attributes["ending"]): point.value for point in points}
    assert counted == {(1, "answer"): 1, (2, "answer"): 9, (2, "LookupError"): 1}


def test_job_that_is_killed_goes_on(tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if 'journal="reports.sqlite"' in block]
    script = tmp_path / "reports.py"
    with EmbeddedApi(token_latency=0.02, result_latency=0.02) as api:
        script.write_text(block.replace("https://api.example.com", api.url), encoding="utf-8")
        with subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=subprocess.PIPE) as process:  # noqa: S603 - as above
            until(lambda: api.attempts.total() > 400)
            process.kill()
        recorded = Journal(tmp_path / "reports.sqlite").recorded()
        assert recorded.results > 100
        killed_at = api.attempts.total()
        ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, check=True)  # noqa: S603 - as above
        assert ran.stdout == b"1000 results\n"
        batches = (1000 - recorded.results - recorded.tokens) // 100
        more = api.attempts.total() - killed_at - (batches + 1000 - recorded.results)
        assert 0 <= more <= 4 + 32  # the API may have got to calls of the first one later
