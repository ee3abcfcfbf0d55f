"""The READMEs' Python blocks run, page by page, in their order, against APIs on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from common import needs_clients, until
from servers import ManyAtOnce, Quiet, serving, url_of

from twostage import Journal, run_two_stage
from twostage.demo.answers import orders_of, result_of, token_of
from twostage.demo.api import EmbeddedApi

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("twostage/*/README.md")), ROOT / "tests/benchmarks/README.md"]
FEWER = 120  # of which a batch takes 100
NEEDED = {  # what a page's blocks import beside the extra `test`
    "journal": ["pydantic"],
    "observing": ["opentelemetry.sdk"],
    "pace": ["pyrate_limiter", "filelock"],
}


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SCRIPTS = [block for block in BLOCKS if "__main__" in block]  # which other processes import


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EmbeddedApi]]:
    """Has the API that a page starts end with the test, and be quick."""
    apis: list[EmbeddedApi] = []
    with ExitStack() as stack:

        def start(**faults: float) -> str:
            api = EmbeddedApi(token_latency=0.002, result_latency=0.002, faults=faults)
            apis.append(stack.enter_context(api))
            return api.url

        monkeypatch.setattr("twostage.demo.serve", start)
        yield apis


class Stories(Quiet):
    """Answers as Hacker News does, for what the first example asks."""

    def do_GET(self) -> None:
        kind, _, name = self.path.removeprefix("/v0/").removesuffix(".json").partition("/")
        answers = {
            "topstories": list(range(300)),
            "item": {"by": f"author{name}", "type": "story"},
            "user": {"id": name, "karma": len(name)},
        }
        self.answer(200, json.dumps(answers[kind]).encode())


@pytest.fixture
def hacker_news() -> Iterator[str]:
    server = ManyAtOnce(("127.0.0.1", 0), Stories)
    server.daemon_threads = False
    with serving(server):
        yield f"{url_of(server)}/v0"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.parent.name
)
def test_every_block_of_a_page_runs(
    page: Path,
    serve: list[EmbeddedApi],
    hacker_news: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    needs_clients(*NEEDED.get(page.parent.name, ["pytest"]))
    monkeypatch.chdir(tmp_path)  # where a block makes a file
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
    names: dict[str, Any] = vars(module)  # what a block defines the next ones use
    text = page.read_text(encoding="utf-8")
    clients = set()
    with EmbeddedApi(token_latency=0.002, result_latency=0.002) as placeholder:
        for block in blocks_of(page):
            if block in SCRIPTS:
                continue
            source = block.replace("https://api.example.com", placeholder.url)
            source = source.replace("https://hacker-news.firebaseio.com/v0", hacker_news)
            source = source.replace("range(1000)", f"range({FEWER})")  # the clients' own work is much
            if page.parent.name == "pace":
                # As many as may begin at once. That the next ones wait is what test_rate.py and
                # test_shared_rate.py look at, the latter with the block of this page.
                source = source.replace("range(100)", "range(50)").replace("range(200)", "range(100)")
            lines_before = text[: text.index(block)].count("\n")
            exec(compile("\n" * lines_before + source, str(page), "exec", dont_inherit=True), names)  # noqa: S102 - it is ours
            clients |= {names[name] for name in ("client", "exporter", "session", "bucket") if name in names}
            said = [line.replace("1000", str(FEWER)) for line in re.findall(r"print\(.*\)  # (.*)", block)]
            printed = capsys.readouterr().out.splitlines()
            assert printed == said or not said
            if "results = run_two_stage(range(" in block and "Simulated" not in block:
                number = len(names["results"])
                assert names["results"] == [result_of(token_of(item)) for item in range(number)]
            if "for outcome in" in block:
                assert sorted(int(line.split()[0]) for line in printed) == list(range(FEWER))
        if page == PAGES[0]:
            assert names["karma"] == [len(f"author{story}") for story in range(200)]
        if page.parent.name == "answers":
            assert names["exports"] == [result_of(token_of(item)) for item in range(20)]
            assert serve[1].answered[202] > 0
            found = [[result_of(order) for order in orders_of(item)] for item in range(100)]
            assert names["orders"] == found
        for client in clients:
            client.close()


@pytest.mark.parametrize("block", SCRIPTS, ids=["processes", "shards"])
def test_script_prints_what_it_says(block: str, tmp_path: Path) -> None:
    if "dask" in block:
        needs_clients("distributed")
    script = tmp_path / "script.py"
    with EmbeddedApi(token_latency=0.002, result_latency=0.002) as api:
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
    assert len(BLOCKS) == sum(page.read_text(encoding="utf-8").count("```python") for page in PAGES)


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / ".github/CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_telemetry_reaches_the_real_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
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
    block, again = (block for block in BLOCKS if 'journal="reports.sqlite"' in block)
    assert block == again  # on the first page, and on the journal's
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
