"""Shards on a real cluster of Dask: processes on this machine, of which some are killed."""

from __future__ import annotations

import copyreg
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from away_on_dask import DEADLY, die, fail_at_0, fetch_result, fetch_results, fetch_tokens, same
from common import needs_clients, ours, until
from in_shards import iterate_in_shards, run_in_shards

from twostage import Stage
from twostage.demo.answers import result_of, token_of
from twostage.demo.api import EmbeddedApi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor
    from pathlib import Path

    from distributed import Client

CONFIG = {
    "distributed.worker.profile.enabled": False,  # with it Python 3.11.7 can stand still (gh-106883)
    "distributed.deploy.lost-worker-timeout": "1h",  # or who dies just then is given up by a LocalCluster
    "distributed.scheduler.allowed-failures": 1,
    "logging.distributed": "critical",
}
WORKERS = 4


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Looks at our threads alone: the cluster has some of its own, when it likes."""
    yield
    until(lambda: not ours())


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    needs_clients("distributed")
    # It has all exceptions known by now pickled by tblib, which is not left to later tests.
    pickled_by = dict(copyreg.dispatch_table)
    import dask  # noqa: PLC0415
    from distributed import Client, LocalCluster, utils  # noqa: PLC0415

    with (
        dask.config.set(CONFIG),
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
        client.wait_for_workers(WORKERS, timeout=60)  # one that begins as its cluster closes can hang there
    utils._offload_executor.shutdown()  # other tests count threads
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(pickled_by)


@pytest.fixture
def executor(client: Client) -> Executor:
    client.wait_for_workers(WORKERS, timeout=60)
    executor: Executor = client.get_executor(pure=False)
    return executor


@pytest.mark.parametrize("number", [6_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_killed_worker_loses_nothing(executor: Executor, tmp_path: Path, number: int) -> None:
    size = 500
    killed = tmp_path / "killed"
    with EmbeddedApi(token_latency=0.002, result_latency=0.002) as api:
        fetch_and_die = partial(fetch_results, api.url, token_of(number // 2 + 7), str(killed))
        stages = (
            Stage(partial(fetch_tokens, api.url), batch_size=100),
            Stage(fetch_and_die, batch_size=50, workers=8),
        )
        found: dict[int, Any] = {}
        with iterate_in_shards(range(number), *stages, executor=executor, at_once=6, size=size) as outcomes:
            for outcome in outcomes:
                assert outcome.index not in found
                assert outcome.token == token_of(outcome.item)
                found[outcome.index] = outcome.result
        assert killed.exists()
        assert found == {item: result_of(token_of(item)) for item in range(number)}
        # Its own batch at least, and at most what all shards that were out had done.
        assert 100 <= api.answers.ids.total() - number <= 6 * size


def test_item_that_kills_its_worker_fails_alone(executor: Executor) -> None:
    settings: dict[str, Any] = {"executor": executor, "at_once": 4, "size": 4, "return_exceptions": True}
    found = run_in_shards(range(48), die, same, **settings)
    assert type(found[DEADLY]).__name__ == "KilledWorker"
    assert [one for item, one in enumerate(found) if item != DEADLY] == [
        item for item in range(48) if item != DEADLY
    ]


def test_shards_that_nobody_waits_for_end(client: Client, executor: Executor) -> None:
    size = 500
    with EmbeddedApi(token_latency=0.01, result_latency=0.01) as api:
        settings: dict[str, Any] = {"token_workers": 2, "result_workers": 2}
        with pytest.raises(LookupError):
            run_in_shards(
                range(WORKERS * size),
                partial(fail_at_0, api.url),
                partial(fetch_result, api.url),
                executor=executor,
                at_once=WORKERS,
                size=size,
                **settings,
            )
        until(lambda: not any(client.run(running).values()))
        assert api.attempts["results"] < 0.9 * (WORKERS - 1) * size


def running(dask_worker: Any) -> int:  # noqa: ANN401 - Dask has no types
    return len(dask_worker.state.executing)


def test_executor_that_thinks_calls_pure_makes_them_all_the_same(client: Client) -> None:
    with EmbeddedApi(token_latency=0, result_latency=0) as api:
        for times in (1, 2):
            run_in_shards(
                range(50), partial(fetch_tokens, api.url), same, batch_size=10, executor=client.get_executor()
            )
            assert api.answers.ids.total() == times * 50


def test_profiler_that_can_stop_this_python_is_warned_of(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dask  # noqa: PLC0415 - as above

    settings: dict[str, Any] = {"executor": executor, "size": 2}
    with dask.config.set({"distributed.worker.profile.enabled": True}):
        monkeypatch.setattr("twostage.shards.owner.sys.version_info", (3, 11, 8))
        with pytest.warns(RuntimeWarning, match=r"distributed\.worker\.profile\.enabled off"):
            run_in_shards(range(4), same, same, **settings)
        monkeypatch.setattr("twostage.shards.owner.sys.version_info", (3, 11, 9))
        run_in_shards(range(4), same, same, **settings)
