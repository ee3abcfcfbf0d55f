"""Stages in pools of processes, and of interpreters: what travels, and what can't."""

from __future__ import annotations

import logging
import pickle
import ssl
import sys
import threading
from collections import UserDict, UserList
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass
from email.message import Message
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn
from urllib.error import HTTPError, URLError

import httpx
import pytest
import requests
from away import double, doubles, place, several, where
from common import ALWAYS, PATIENCE, LeaveError, needs_clients
from forms import each_way
from pools_of_processes import PROCESSES, new_pool
from tenacity import TryAgain

from twostage import Outcome, Rate, RemoteError, Stage, Throttled, is_transient, iter_two_stage, run_two_stage
from twostage.base.kinds import BaseRemoteError, Kind
from twostage.failing.clients import status_of
from twostage.failing.throttling import retry_after
from twostage.failing.transient import is_throttled, is_timeout, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from forms import Run

KINDS: Final = (*PROCESSES, "interpreters") if sys.version_info >= (3, 14) else PROCESSES
URL: Final = "https://api/?key=s3cret"


class Pools(dict[str, Executor]):
    """A pool of each kind, but of that which is not installed."""

    def __missing__(self, kind: str) -> NoReturn:
        needs_clients(kind)
        raise KeyError(kind)


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    pools = Pools((kind, new_pool(kind)) for kind in KINDS if kind != "loky" or find_spec(kind))
    for pool in pools.values():
        for begun in [pool.submit(int), pool.submit(int)]:
            begun.result(PATIENCE)  # so that its threads are there before a test is
    yield pools
    for pool in pools.values():
        pool.shutdown()


@pytest.fixture(params=KINDS)
def pool(request: pytest.FixtureRequest, pools: Pools) -> Executor:
    return pools[request.param]


@pytest.fixture
def spawned(pools: Pools) -> Executor:
    return pools["spawn"]


# --- all of a job works


@pytest.mark.parametrize("stages", ["one", "two", "both"])
def test_either_stage_or_both_may_run_in_processes(pool: Executor, stages: str) -> None:
    first: Any = Stage(where, executor=pool if stages != "two" else None)
    second: Any = Stage(where, executor=pool if stages != "one" else None)
    results = run_two_stage(range(30), first, second)
    assert [token[0] for token, _ in results] == list(range(30))
    here = place()
    assert {one == here for (_, one), _ in results} == {stages == "two"}
    assert {two == here for _, two in results} == {stages == "one"}


@each_way
def test_batches_rates_and_many_tokens_work_in_processes(job: Run, pool: Executor) -> None:
    assert job(
        range(30),
        Stage(doubles, batch_size=7, executor=pool, rate=Rate(1000, per=0.001)),
        Stage(doubles, batch_size=4, executor=pool),
    ) == [4 * number for number in range(30)]
    assert job(range(9), Stage(several, executor=pool), Stage(double, executor=pool), many=True) == [
        [2 * one for one in several(number)] for number in range(9)
    ]


class Attempts:
    """Counts, in a folder, the attempts of each number over all processes: the nth raises what it is told."""

    def __init__(self, folder: Path, error: str) -> None:
        self._folder = folder
        self._error = error

    def __call__(self, number: int) -> int:
        before = len(list(self._folder.glob(f"{number}-*")))
        (self._folder / f"{number}-{before}").touch()
        if before == 0:
            fail_as(self._error)
        return number

    def of(self, number: int) -> int:
        return len(list(self._folder.glob(f"{number}-*")))


@pytest.mark.parametrize("error", ["httpx 503", "connection, keyword arguments", "from a lost connection"])
def test_transient_failures_are_tried_again_whatever_travels_of_them(
    pool: Executor, error: str, tmp_path: Path
) -> None:
    attempts = Attempts(tmp_path, error)
    first = Stage(double, executor=pool)
    assert run_two_stage([0, 1, 2], first, Stage(attempts, executor=pool)) == [0, 2, 4]
    assert [attempts.of(number) for number in (0, 2, 4)] == [2, 2, 2]


# --- exceptions that travel, and those that can't


class KeywordError(Exception):
    """Wants what pickle does not keep."""

    def __init__(self, *, url: str) -> None:
        super().__init__(f"failed at {url}")
        self.lock = threading.Lock()


class KeywordConnectionError(ConnectionError):
    """The same, and transient by its base."""

    def __init__(self, *, url: str) -> None:
        super().__init__(f"no connection to {url}")


class KeywordTimeout(TimeoutError):  # noqa: N818 - as its base
    """The same, and an answer that is late."""

    def __init__(self, *, url: str) -> None:
        super().__init__(f"no answer from {url}")


class KeywordThrottled(Throttled):
    """The same, with a wait."""

    def __init__(self, *, url: str) -> None:
        super().__init__(2.5)


class KeywordLeaveError(LeaveError):
    """The same, and no `Exception`."""

    def __init__(self, *, url: str) -> None:
        super().__init__(f"leaves {url}")


@dataclass(frozen=True)
class FrozenError(Exception):
    """Nothing can be set on it, a traceback neither."""

    url: str


class ApiError(Exception):
    """Travels, but not its cause."""


def httpx_error(status: int, **headers: str) -> httpx.HTTPStatusError:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx.Request("GET", URL)
    response = httpx.Response(status, headers=fields, request=request)
    return httpx.HTTPStatusError(f"no to {URL}", request=request, response=response)


def openai_429() -> Exception:
    import httpx2  # noqa: PLC0415 - as above
    import openai  # noqa: PLC0415 - as above

    request = httpx2.Request("GET", URL)
    response = httpx2.Response(429, headers={"retry-after-ms": "1500"}, request=request)
    return openai.RateLimitError("no", response=response, body=None)


def openai_unreachable() -> Exception:
    import httpx2  # noqa: PLC0415 - as above
    import openai  # noqa: PLC0415 - as above

    return openai.APIConnectionError(request=httpx2.Request("GET", URL))


def botocore_throttled() -> Exception:
    import botocore.exceptions  # noqa: PLC0415 - as above

    answer = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    return botocore.exceptions.ClientError(answer, "GetObject")  # type: ignore[no-any-return] # it has no types


def http_error(status: int, headers: Mapping[str, str]) -> HTTPError:
    message = Message()
    for name, value in headers.items():
        message[name] = value
    error = HTTPError(URL, status, "no", message, None)
    error.close()  # from 3.14 on one that is left open is warned of
    return error


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def in_context(error: Exception, context: BaseException) -> Exception:
    error.__context__ = context
    return error


def noted(error: Exception) -> Exception:
    error.add_note("the user's")
    return error


ERRORS: Final[dict[str, Callable[[], BaseException]]] = {
    "key": lambda: KeyError("x"),
    "keyword arguments": lambda: noted(KeywordError(url=URL)),
    "connection, keyword arguments": lambda: KeywordConnectionError(url=URL),
    "late, keyword arguments": lambda: KeywordTimeout(url=URL),
    "throttled": lambda: Throttled(1.5),
    "throttled, keyword arguments": lambda: KeywordThrottled(url=URL),
    "frozen": lambda: FrozenError(URL),
    "httpx 404": lambda: httpx_error(404),
    "httpx 500": lambda: httpx_error(500),
    "httpx 503": lambda: httpx_error(503),
    "httpx 503 with a wait": lambda: httpx_error(503, retry_after="7"),
    "openai 429": openai_429,
    "openai, no connection": openai_unreachable,
    "urllib 504": lambda: http_error(504, {}),
    "urllib 429": lambda: http_error(429, {"Retry-After": "3"}),
    "urllib, refused": lambda: URLError(ConnectionRefusedError("no")),
    "requests": lambda: requests.ConnectionError("no"),
    "botocore, throttled": botocore_throttled,
    "from a lost connection": lambda: caused(ApiError("no"), ConnectionResetError()),
    "from a wait": lambda: caused(ApiError("no"), Throttled(4)),
    "from a bad certificate": lambda: caused(httpx.ConnectError("no"), ssl.SSLCertVerificationError("bad")),
    "beside a bad certificate": lambda: in_context(
        requests.ConnectionError("no"), ssl.SSLCertVerificationError("bad")
    ),
    "beside a late answer": lambda: in_context(httpx.ConnectError("no"), TimeoutError("late")),
    "exit": lambda: SystemExit(3),
    "interrupt": KeyboardInterrupt,
    "leave": lambda: LeaveError("leaves"),
    "leave, keyword arguments": lambda: KeywordLeaveError(url=URL),
}
LOST: Final = {
    "keyword arguments": "KeywordError",
    "connection, keyword arguments": "KeywordConnectionError",
    "late, keyword arguments": "KeywordTimeout",
    "throttled, keyword arguments": "KeywordThrottled",
    "frozen": "FrozenError",
    "httpx 404": "HTTPStatusError",
    "httpx 500": "HTTPStatusError",
    "httpx 503": "HTTPStatusError",
    "httpx 503 with a wait": "HTTPStatusError",
    "openai 429": "RateLimitError",
    "openai, no connection": "APIConnectionError",
    "urllib 504": "HTTPError",
    "urllib 429": "HTTPError",
}
CLIENTS: Final = {
    "openai 429": "openai",
    "openai, no connection": "openai",
    "botocore, throttled": "botocore",
}
MISSING: Final = {name for name, module in CLIENTS.items() if find_spec(module) is None}
ENDS: Final = ["exit", "interrupt", "leave", "leave, keyword arguments"]
FAILURES: Final = [name for name in ERRORS if name not in ENDS and name not in MISSING]


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """Has a test run with each of these, and skip those whose client is not installed."""
    why = "is not installed: pip install '.[test-clients]'"
    skips = {name: [pytest.mark.skip(f"{CLIENTS[name]} {why}")] for name in MISSING}
    return pytest.mark.parametrize("name", [pytest.param(one, marks=skips.get(one, [])) for one in names])


def fail_as(name: str) -> NoReturn:
    error = ERRORS[name]()
    raise error


def failed_here(name: str) -> BaseException:
    try:
        fail_as(name)
    except BaseException as error:  # noqa: BLE001 - some are none
        return error


def says(error: BaseException) -> tuple[object, ...]:
    return (
        kind_of(error),
        is_transient(error),
        is_throttled(error),
        is_timeout(error),
        retry_after(error),
        status_of(error),
    )


@pytest.fixture(scope="module")
def failures(pools: Pools) -> Callable[[str, str], Exception]:
    """Gives a failure as it comes back from a kind of pool."""

    @cache
    def come_back(kind: str) -> dict[str, Exception]:
        stage: Stage[Any, Any] = Stage(fail_as, executor=pools[kind], retry=None, pause=False)
        failed: list[Any] = run_two_stage(FAILURES, str, stage, return_exceptions=True)
        return dict(zip(FAILURES, failed, strict=True))

    return lambda kind, name: come_back(kind)[name]


def test_there_is_each_kind_of_failure_and_each_answer_to_it() -> None:
    said = [says(ERRORS[name]()) for name in FAILURES]
    assert {one[0] for one in said} == set(Kind)
    assert {one[3] for one in said} == {False, True}
    assert {1.5, 7, 3, 4, None} <= {one[4] for one in said}


@pytest.mark.parametrize("kind", KINDS)
@each(name for name in ERRORS if name not in ENDS)
def test_failure_counts_as_it_does_in_a_thread(
    name: str, kind: str, failures: Callable[[str, str], Exception]
) -> None:
    if kind == "interpreters" and CLIENTS.get(name) == "openai":
        pytest.skip("pydantic's compiled part can't be loaded in another interpreter")
    there, here = failures(kind, name), failed_here(name)
    assert says(there) == says(here)
    assert isinstance(there, RemoteError) == (name in LOST)
    if name not in LOST:
        assert type(there) is type(here)
        assert str(there) == str(here)
    assert there.__notes__[-1].startswith("twostage: stage two, ")
    assert "in fail_as" in str(there.__cause__)
    assert "twostage/running/processes" not in str(there.__cause__)


@each(LOST)
def test_stand_in_tells_type_text_status_and_wait_and_can_be_pickled(
    name: str, failures: Callable[[str, str], Exception]
) -> None:
    here, there = failed_here(name), failures("spawn", name)
    for stand_in in (there, pickle.loads(pickle.dumps(there))):  # noqa: S301 - its own
        assert isinstance(stand_in, RemoteError)
        assert stand_in.type_name.endswith(f".{LOST[name]}")
        assert (stand_in.text, stand_in.status) == (str(here), status_of(here))
        assert stand_in.retry_after == retry_after(here)
        assert str(stand_in) == f"{stand_in.type_name}: {here}"
        assert says(stand_in) == says(here)
        assert stand_in.__notes__[:-1] == getattr(here, "__notes__", [])
    causing = ApiError("the user's own")
    causing.__cause__ = there
    assert is_transient(causing) == is_transient(here)


def test_text_of_an_exception_is_in_no_repr_and_no_log(
    spawned: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    stage: Stage[Any, Any] = Stage(fail_as, executor=spawned, retry=ALWAYS, pause=False)
    lost = [name for name in LOST if name not in MISSING]
    with iter_two_stage(lost, str, stage, return_exceptions=True) as outcomes:
        ended: list[Outcome[Any, Any, Any]] = list(outcomes)
    assert len(ended) == len(lost)
    assert "RemoteError" in caplog.text
    for outcome in ended:
        assert outcome.exception is not None
        shown = repr((outcome, outcome.exception, outcome.exception.__cause__, caplog.text))
        assert "s3cret" not in shown
    assert any("s3cret" in str(outcome.exception) for outcome in ended)


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("kind", ["spawn", "loky"])
@pytest.mark.parametrize("name", ENDS)
def test_what_is_no_exception_ends_the_job(
    name: str, kind: str, pools: Pools, *, return_exceptions: bool
) -> None:
    stage: Stage[Any, Any] = Stage(fail_as, executor=pools[kind], retry=ALWAYS)
    lost = "keyword" in name
    with pytest.raises(BaseRemoteError if lost else type(ERRORS[name]())) as raised:
        run_two_stage([name], str, stage, return_exceptions=return_exceptions)
    assert not isinstance(raised.value, Exception)
    assert raised.value.args == (ERRORS[name]().args if not lost else raised.value.args)
    assert "leaves" in str(raised.value) or not lost


def ask_again(_: object) -> NoReturn:
    raise TryAgain


def test_bare_request_for_another_attempt_is_its_own_failure(spawned: Executor) -> None:
    """tenacity looks for the failure behind it, and the traceback from there is none."""
    with pytest.raises(TryAgain):
        run_two_stage([1], double, Stage(ask_again, executor=spawned, retry=2))


class Pair(NamedTuple):
    """A result with an exception in it that is no failure."""

    first: object
    second: object


def in_slots(names: list[str]) -> list[Any]:
    return [ERRORS[name]() if name in ERRORS else name for name in names]


def in_tuple(names: list[str]) -> tuple[Any, ...]:
    return tuple(in_slots(names))


def in_user_list(names: list[str]) -> Sequence[Any]:
    return UserList(in_slots(names))


def in_mapping(names: list[str]) -> dict[str, Any]:
    return dict(zip(names, in_slots(names), strict=True))


def in_user_mapping(names: list[str]) -> Mapping[str, Any]:
    return UserDict(in_mapping(names))


@pytest.mark.parametrize("fetch", [in_slots, in_tuple, in_user_list, in_mapping, in_user_mapping])
def test_exception_in_an_answer_is_its_items_failure_whatever_travels_of_it(
    fetch: Any,  # noqa: ANN401 - all that a batch may return
    spawned: Executor,
) -> None:
    names = ["a", "httpx 404", "from a wait", "key", "keyword arguments", "b"]
    results = run_two_stage(
        names,
        Stage(fetch, batch_size=len(names), executor=spawned, retry=None, pause=False),
        str.upper,
        return_exceptions=True,
    )
    assert results[::5] == ["A", "B"]
    assert [type(one) for one in results[1:5]] == [RemoteError, ApiError, KeyError, RemoteError]
    assert [says(one) for one in results[1:5]] == [says(ERRORS[name]()) for name in names[1:5]]


def pair(name: str) -> Pair:
    return Pair({"at length": [ERRORS[name]()]}, 2)


def test_exception_deep_in_a_result_is_part_of_it_and_does_no_harm(pool: Executor) -> None:
    for name, kind in (("key", KeyError), ("httpx 404", RemoteError)):
        [result] = run_two_stage([name], str, Stage(pair, executor=pool))
        assert type(result) is Pair
        first: Any = result.first
        assert type(first["at length"][0]) is kind


# --- what can't travel


class Unpicklable:
    """Holds a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def fetch(self, number: int) -> int:
        return number


def never(why: str, *_: object) -> NoReturn:
    raise RuntimeError(why)


class OneWay:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return never, ("it goes one way",)


class ToOtherProcess:
    """Can be pickled, and unpickled here, but in no other process or interpreter."""

    def __init__(self, home: tuple[int, int]) -> None:
        if home != place():
            raise RuntimeError("it is at home elsewhere")
        self.home = home

    def __reduce__(self) -> tuple[Any, ...]:
        return ToOtherProcess, (self.home,)

    def __call__(self, number: int) -> int:
        return number


def works(pool: Executor) -> bool:
    return pool.submit(double, 2).result(PATIENCE) == 4


def a_nameless_function() -> Callable[[Any], Any]:
    return lambda number: number + 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "loky"])
def test_function_that_can_t_be_pickled_is_refused_by_name(kind: str, pools: Pools) -> None:
    with pytest.raises(
        TypeError, match=r"fetch is a_nameless_function.<locals>.<lambda>, which can't be pickled for the"
    ):
        Stage(a_nameless_function(), executor=pools[kind])
    with pytest.raises(TypeError, match=r"fetch is Unpicklable.fetch, .*cannot pickle '_thread.lock' object"):
        Stage(Unpicklable().fetch, executor=pools[kind])
    with pytest.raises(
        TypeError, match=r"fetch is double, .*; expected one of a module's top level"
    ) as raised:
        Stage(partial(double, threading.Lock(), URL), executor=pools[kind])  # type: ignore[arg-type, call-arg]
    assert "s3cret" not in str(raised.value)


def test_loky_takes_functions_of_no_module_and_refuses_what_it_can_t_pickle(
    pools: Pools,
) -> None:
    pool = pools["loky"]

    class LocalError(Exception):
        """Of no module either."""

    def fail(number: int) -> int:
        if number == 2:
            raise LocalError(number)
        return number

    results = run_two_stage(
        range(4),
        Stage(a_nameless_function(), executor=pool),
        Stage(fail, executor=pool),
        return_exceptions=True,
    )
    assert results[::2] == [1, 3]
    assert [type(one) for one in results] == [int, LocalError, int, int]
    with pytest.raises(TypeError, match=r"fetch is Unpicklable.fetch, .*; expected one that can be"):
        Stage(Unpicklable().fetch, executor=pool)


def test_function_that_can_t_be_unpickled_ends_the_job(pool: Executor) -> None:
    with pytest.raises(
        BrokenExecutor, match=r"stage two's ToOtherProcess can't be unpickled where it is to run.*home"
    ):
        run_two_stage(range(9), double, Stage(ToOtherProcess(place()), executor=pool), return_exceptions=True)
    assert works(pool)


def names(items: list[object]) -> list[str]:
    return [type(item).__name__ for item in items]


def test_item_that_can_t_travel_fails_alone_and_once(pool: Executor) -> None:
    items: list[Any] = [1, "two", Unpicklable(), OneWay(), 5.0, None]
    results: list[Any] = run_two_stage(
        items,
        Stage(names, batch_size=6, executor=pool),
        Stage(str.upper, executor=pool),
        return_exceptions=True,
    )
    assert results[:2] + results[4:] == ["INT", "STR", "FLOAT", "NONETYPE"]
    assert "stage one's names was to be given a Unpicklable that can't be pickled: cannot" in str(results[2])
    assert "was to be given what can't be unpickled where it runs: it goes one way" in str(results[3])
    assert [one.__notes__[0][-9:] for one in results[2:4]] == ["1 attempt"] * 2
    assert works(pool)


@each_way
def test_token_that_can_t_travel_is_its_items_failure(job: Run, pool: Executor) -> None:
    def fetch_token(item: int) -> object:
        return Unpicklable() if item == 1 else item

    results = job([0, 1, 2], fetch_token, Stage(double, executor=pool), return_exceptions=True)
    assert results[::2] == [0, 4]
    assert type(results[1]) is ValueError
    assert str(results[1]).startswith(
        "stage two's double was to be given a Unpicklable that can't be pickled"
    )
    assert results[1].__notes__ == ["twostage: stage two, 1, 1 attempt"]


def one_that_stays(kind: str) -> object:
    kinds: dict[str, Callable[[], object]] = {"lock": threading.Lock, "one way": OneWay, "fine": str}
    return kinds[kind]()


def test_answer_that_can_t_travel_is_its_items_failure_by_name(pool: Executor) -> None:
    def here(token: object) -> object:
        return token if isinstance(token, str) else "something"

    results: list[Any] = run_two_stage(
        ["lock", "one way", "fine"], Stage(one_that_stays, executor=pool), here, return_exceptions=True
    )
    assert [type(one) for one in results] == [TypeError, TypeError, str]
    assert str(results[0]).startswith(
        "stage one's one_that_stays returned a lock that can't be pickled: cannot"
    )
    assert str(results[1]) == "stage one's one_that_stays returned what can't be unpickled: it goes one way"
    assert [one.__notes__[0][-9:] for one in results[:2]] == ["1 attempt"] * 2
    assert works(pool)


def test_stages_of_two_pools_pass_on_what_both_can_pickle(pools: Pools) -> None:
    first: Any = Stage(double, executor=pools["loky"])
    assert run_two_stage(range(9), first, Stage(double, executor=pools["spawn"])) == [
        4 * number for number in range(9)
    ]
