"""The same job in twelve ways, each as its users write it: from a job to its results, as they complete."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib import import_module
from itertools import chain
from multiprocessing.pool import ThreadPool
from queue import Queue, SimpleQueue
from threading import Semaphore, Thread
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jobs import PATIENT

from twostage import AsyncExecutor, Stage, iter_two_stage, run_two_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from jobs import Job


def on_simple_queues(job: Job) -> Iterator[int]:
    queues: list[SimpleQueue[Any]] = [SimpleQueue(), SimpleQueue(), SimpleQueue()]
    return on_queues(job, queues, lambda queue: iter(queue.get, None))


class StoppingQueue(Queue[Any]):
    """A queue to iterate over, until it gives a stop."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            item = self.get()
            try:
                if item is None:
                    return
                yield item
            finally:
                self.task_done()


def on_stopping_queues(job: Job) -> Iterator[int]:
    return on_queues(job, [StoppingQueue(size) for size in job.queues], iter)


def on_queues(job: Job, queues: list[Any], taken: Callable[[Any], Iterator[Any]]) -> Iterator[int]:
    calls, tokens, results = queues

    def fetch_tokens() -> None:
        for call in taken(calls):
            for token in job.fetch_tokens(call):
                tokens.put(token)

    def fetch_results() -> None:
        for token in taken(tokens):
            results.put(job.fetch_result(token))

    def run() -> None:
        token_threads = started(fetch_tokens, job.token_workers)
        result_threads = started(fetch_results, job.result_workers)
        for call in job.calls:
            calls.put(call)
        end(token_threads, calls)
        end(result_threads, tokens)
        results.put(None)

    if job.bound:
        started(run, 1)
    else:
        run()
    return taken(results)


def started(work: Callable[[], None], workers: int) -> list[Thread]:
    threads = [Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    return threads


def end(threads: list[Thread], queue: Queue[Any]) -> None:
    for _ in threads:
        queue.put(None)
    for thread in threads:
        thread.join()


def on_two_executors(job: Job) -> Iterator[int]:
    with (
        ThreadPoolExecutor(job.token_workers) as token_pool,
        ThreadPoolExecutor(job.result_workers) as result_pool,
    ):
        batches = [token_pool.submit(job.fetch_tokens, call) for call in job.calls]
        results = [
            result_pool.submit(job.fetch_result, token)
            for batch in as_completed(batches)
            for token in batch.result()
        ]
        for result in results:
            yield result.result()


def with_imap_unordered(job: Job) -> Iterator[int]:
    with ThreadPool(job.token_workers) as token_pool, ThreadPool(job.result_workers) as result_pool:
        batches = token_pool.imap_unordered(job.fetch_tokens, job.calls)
        yield from result_pool.imap_unordered(job.fetch_result, chain.from_iterable(batches))


def with_streamable(job: Job) -> Iterator[int]:
    results = (
        import_module("streamable")
        .stream(job.calls)
        .map(job.fetch_tokens, concurrency=job.token_workers, as_completed=True)
        .flatten()
        .buffer(job.queues[1] or 1000)
        .map(job.fetch_result, concurrency=job.result_workers, as_completed=True)
    )
    return iter(results.buffer(job.queues[2]) if job.bound else results)


def with_pypeln(job: Job) -> Iterator[int]:
    pypeln = import_module("pypeln.thread")
    calls, tokens, results = job.queues
    first = pypeln.flat_map(job.fetch_tokens, job.calls, workers=job.token_workers, maxsize=calls)
    second = pypeln.map(job.fetch_result, first, workers=job.result_workers, maxsize=tokens)
    return iter(pypeln.to_iterable(second, maxsize=results))


def with_joblib(job: Job) -> Iterator[int]:
    joblib = import_module("joblib")

    def mapped(function: Callable[[Any], Any], arguments: Iterable[Any], workers: int) -> Iterator[Any]:
        parallel = joblib.Parallel(workers, backend="threading", return_as="generator_unordered")
        return iter(parallel(joblib.delayed(function)(argument) for argument in arguments))

    batches = mapped(job.fetch_tokens, job.calls, job.token_workers)
    return mapped(job.fetch_result, chain.from_iterable(batches), job.result_workers)


async def with_asyncio(job: Job) -> AsyncIterator[int]:
    calls = iter(job.calls)
    tokens: asyncio.Queue[Any] = asyncio.Queue(job.queues[1] or max(256, 2 * job.running))
    results: asyncio.Queue[Any] = asyncio.Queue(job.queues[2] or max(256, 2 * job.running))

    async def fetch_tokens() -> None:
        for call in calls:
            for token in await job.fetch_tokens(call):
                await tokens.put(token)

    async def fetch_results() -> None:
        while (token := await tokens.get()) is not None:
            await results.put(await job.fetch_result(token))

    async def run() -> None:
        result_workers = asyncio.gather(*(fetch_results() for _ in range(job.result_workers)))
        await asyncio.gather(*(fetch_tokens() for _ in range(job.token_workers)))
        for _ in range(job.result_workers):
            await tokens.put(None)
        await result_workers
        await results.put(None)

    running = asyncio.create_task(run())
    while (result := await results.get()) is not None:
        yield result
    await running


def with_twostage(job: Job) -> Iterator[int]:
    return on_stages(job, job.fetch_tokens, job.fetch_result)


def with_coroutines(loop_factory: Callable[[], asyncio.AbstractEventLoop], job: Job) -> Iterator[int]:
    with AsyncExecutor(loop_factory=loop_factory) as executor:
        yield from on_stages(
            job, Stage(job.fetch_tokens, executor=executor), Stage(job.fetch_result, executor=executor)
        )


def on_uvloop(job: Job) -> Iterator[int]:
    return with_coroutines(import_module("uvloop").new_event_loop, job)


def on_stages(job: Job, fetch_tokens: Any, fetch_result: Any) -> Iterator[int]:  # noqa: ANN401 - functions or stages
    items = range(job.size)
    settings: dict[str, Any] = {
        "batch_size": job.batch_size,
        "token_workers": job.token_workers,
        "result_workers": job.result_workers,
    }
    if job.fail:
        settings["retry"] = PATIENT
    if job.bound:
        with iter_two_stage(items, fetch_tokens, fetch_result, **settings) as outcomes:
            for outcome in outcomes:
                yield outcome.result
    else:
        yield from run_two_stage(items, fetch_tokens, fetch_result, **settings)


def within_bound(job: Job, way: Callable[[Job], Iterator[int]]) -> Iterator[int]:
    """Holds calls back by a semaphore, as one does around what has no bound of its own: in whole batches."""
    size = job.batch_size or 1
    slots = Semaphore(-(-job.bound // size))

    def admitted() -> Iterator[Any]:
        for call in job.calls:
            slots.acquire()
            yield call

    for number, result in enumerate(way(job._replace(calls=admitted())), 1):
        if number % size == 0:
            slots.release()
        yield result


class Peer(NamedTuple):
    """A way, the module that it needs, and what holds it back when its results are not taken.

    Ways that do not run `on_threads` await coroutines; `beside` names the one that such a way is set against.
    """

    what: str
    way: Callable[[Job], Any]
    needs: str = "twostage"
    bound: Literal["its own", "a semaphore", "none"] = "its own"
    on_threads: bool = True
    beside: str = ""


PEERS = {
    "twostage": Peer("**twostage**", with_twostage),
    "threads": Peer("hand-written threads on `SimpleQueue`", on_simple_queues, bound="a semaphore"),
    "stopping": Peer("stopping queues (the origin)", on_stopping_queues),
    "executors": Peer("plain two-executor code (no bound)", on_two_executors, bound="none"),
    "imap": Peer("`ThreadPool.imap_unordered` chained", with_imap_unordered, bound="a semaphore"),
    "streamable": Peer("streamable, threads", with_streamable, "streamable"),
    "pypeln": Peer("pypeln, threads", with_pypeln, "pypeln.thread"),
    "joblib": Peer("joblib, threads (no bound)", with_joblib, "joblib", "none"),
    "coroutines": Peer(
        "**twostage**, coroutines",
        partial(with_coroutines, asyncio.new_event_loop),
        on_threads=False,
        beside="asyncio",
    ),
    "asyncio": Peer("asyncio, queues (no threads)", with_asyncio, "asyncio", on_threads=False),
    "coroutines-uvloop": Peer(
        "**twostage**, coroutines on uvloop", on_uvloop, "uvloop", on_threads=False, beside="asyncio-uvloop"
    ),
    "asyncio-uvloop": Peer("asyncio, queues, uvloop (no threads)", with_asyncio, "uvloop", on_threads=False),
}
