"""How long an answer asks to wait, what counts as throttling and as an outage, and the wait that heeds it."""

from __future__ import annotations

import email.message
import pickle
import random
import sys
import time
import urllib.error
from datetime import timedelta
from fractions import Fraction
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import multidict
import pytest
import requests
from tenacity import Future, RetryCallState, Retrying, TryAgain, wait_fixed

from twostage import Throttled, is_transient, run_two_stage, wait_retry_after
from twostage.base.kinds import Kind
from twostage.base.records import Outcome
from twostage.failing.retry import End, Judge, Retry, default_policy
from twostage.failing.throttling import LONGEST_PAUSE, retry_after
from twostage.failing.transient import THROTTLING_CODES, is_throttled, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twostage.testing import VirtualTime

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


class ApiError(Exception):
    """With whatever attributes a client gives its exceptions."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("an answer")
        vars(self).update(attributes)


def answered(headers: object = None, status: int | None = 429) -> ApiError:
    return ApiError(response=SimpleNamespace(status_code=status, headers=headers))


def aws(status: int, code: str = "SomeException", **headers: str) -> ApiError:
    metadata = {
        "HTTPStatusCode": status,
        "HTTPHeaders": {key.replace("_", "-"): headers[key] for key in headers},
    }
    return ApiError(response={"Error": {"Code": code, "Message": ""}, "ResponseMetadata": metadata})


def message(headers: dict[str, str]) -> email.message.Message:
    made = email.message.Message()
    for name, value in headers.items():
        made[name] = value
    return made


# --- Throttled


@pytest.mark.parametrize("seconds", [0, 2, 2.5, Fraction(5, 2), sys.float_info.max])
def test_throttled_asks_for_its_seconds(seconds: float) -> None:
    error = Throttled(seconds)
    assert type(error.seconds) is float
    assert error.seconds == retry_after(error) == seconds


def test_throttled_says_so_and_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(Throttled(2.5)))  # noqa: S301 - our own
    assert (type(error), error.seconds, str(error)) == (Throttled, 2.5, "to be tried again in 2.5 s")


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), 10**400], ids=type)
def test_throttled_for_a_time_that_there_is_not(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"seconds is .*; expected a number, finite and of at least 0 s"):
        Throttled(seconds)


@pytest.mark.parametrize("seconds", [None, True, "2", [2], timedelta(seconds=2)], ids=type)
def test_throttled_for_what_is_no_number(seconds: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"seconds is .*; expected a number, of at least 0 s"):
        Throttled(seconds)


# --- retry_after


@pytest.fixture
def _in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": 7}, 7),
        ({"retry-after": "9" * 5000}, sys.float_info.max),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500.5", "retry-after": "7"}, 1.5005),
        ({"retry-after-ms": "9" * 5000}, sys.float_info.max / 1000),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after-ms": "-1", "retry-after": "7"}, 7),
        ({"retry-after-ms": "15 s"}, None),
        ({"retry-after-ms": "inf"}, None),
        ({"retry-after-ms": "٣"}, None),
    ],
)
def test_seconds_and_milliseconds(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(answered(headers)) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "soon", "-1", "+1", "1.5", "1_000", "1e3", "inf", "nan", "٣", "²", "1, 2", "7 s", "2024-01-01"],
)
def test_malformed_value_is_not_there(value: str) -> None:
    assert retry_after(answered({"Retry-After": value})) is None


@pytest.mark.parametrize(
    "date",
    [
        "Sun, 06 Nov 1994 08:50:37 GMT",
        "Sunday, 06-Nov-94 08:50:37 GMT",
        "Sun Nov  6 08:50:37 1994",
        "Sun, 06 Nov 1994 08:50:37 -0000",
        "Sun, 06 Nov 1994 08:50:37",
        "Sun, 06 Nov 1994 09:50:37 +0100",
    ],
)
@pytest.mark.usefixtures("_in_tokyo")
def test_date_is_measured_against_the_answer_s(date: str) -> None:
    assert retry_after(answered({"Retry-After": date, "Date": DATE})) == 60
    assert retry_after(answered({"Retry-After": DATE, "Date": date})) == 0


@pytest.mark.parametrize("headers", [{}, {"Date": "today"}, {"Date": "Sun, 06 Nov 1994 08:50:37 +9999"}])
def test_date_is_measured_against_the_clock_if_the_answer_has_none(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 784111777.0 - 90)
    assert retry_after(answered({"Retry-After": DATE} | headers)) == 90
    monkeypatch.setattr(time, "time", lambda: 784111777.0 + 90)
    assert retry_after(answered({"Retry-After": DATE} | headers)) == 0


@pytest.mark.parametrize(
    "date", ["Sun, 99 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 99999 08:49:37 GMT", "Sun, 06 Nov"]
)
def test_date_that_there_is_not(date: str) -> None:
    assert retry_after(answered({"Retry-After": date, "Date": DATE})) is None


@pytest.mark.parametrize(
    "kind",
    [
        dict,
        MappingProxyType,
        message,
        httpx.Headers,
        multidict.CIMultiDict,
        requests.structures.CaseInsensitiveDict,
    ],
)
@pytest.mark.parametrize("name", ["Retry-After", "retry-after", "RETRY-AFTER"])
def test_headers_are_found_in_any_mapping_by_names_in_any_case(kind: Callable[[Any], Any], name: str) -> None:
    headers = kind({"Content-Type": "text/plain", name: "7"})
    assert retry_after(answered(headers)) == 7
    assert retry_after(ApiError(headers=headers)) == 7
    assert retry_after(ApiError(headers=headers, response=None)) == 7


def test_headers_of_botocore() -> None:
    assert retry_after(aws(400, retry_after="7")) == 7
    assert retry_after(aws(400, retry_after_ms="70")) == 0.07
    assert retry_after(aws(400)) is None


@pytest.mark.parametrize(
    "headers", [None, "Retry-After: 7", 7, [("Retry-After", "7")], {None: 7}, {"retry-after": None}]
)
def test_what_are_no_headers_are_passed_over(headers: object) -> None:
    assert retry_after(answered(headers)) is None
    assert retry_after(ApiError(headers=headers)) is None
    assert retry_after(ApiError(response={"ResponseMetadata": {"HTTPHeaders": headers}})) is None
    assert retry_after(ApiError(response={"ResponseMetadata": headers})) is None


def test_property_that_raises_is_passed_over() -> None:
    class Closed(Exception):  # noqa: N818
        @property
        def response(self) -> object:
            raise RuntimeError("closed")

        headers = status_code = response

        def items(self) -> object:
            raise RuntimeError("closed")

    assert retry_after(Closed()) is None
    assert retry_after(answered(Closed())) is None


def test_exception_behind_is_asked_if_the_first_has_no_answer() -> None:
    def caused(outer: Exception, inner: BaseException) -> Exception:
        outer.__cause__ = inner
        return outer

    asking = answered({"Retry-After": "7"})
    assert retry_after(caused(RuntimeError("the user's"), asking)) == 7
    assert retry_after(caused(RuntimeError("the user's"), caused(TryAgain(), Throttled(7)))) == 7
    assert retry_after(urllib.error.URLError(asking)) == 7
    assert retry_after(caused(answered({}), asking)) is None
    assert retry_after(caused(ApiError(status_code=503), asking)) is None
    assert retry_after(caused(RuntimeError(), KeyboardInterrupt())) is None
    assert retry_after(RuntimeError()) is None
    circle = RuntimeError()
    assert retry_after(caused(circle, circle)) is None


# --- throttling and outage

RETRY_AFTER = {"Retry-After": "7"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Throttled(1), "throttled"),
        (answered(status=429), "throttled"),
        (answered(status=529), "throttled"),
        (answered(RETRY_AFTER, 429), "throttled"),
        (answered(RETRY_AFTER, 503), "throttled"),
        (answered({"Retry-After": "0"}, 503), "throttled"),
        (answered({"retry-after-ms": "7"}, 503), "throttled"),
        *((aws(400, code), "throttled") for code in sorted(THROTTLING_CODES)),
        (aws(503, "SlowDown"), "throttled"),
        (aws(429), "throttled"),
        (aws(503, retry_after="7"), "throttled"),
        (answered(status=502), "outage"),
        (answered(RETRY_AFTER, 502), "outage"),
        (answered(status=503), "outage"),
        (answered({"Retry-After": "soon"}, 503), "outage"),
        (answered(status=504), "outage"),
        (aws(503), "outage"),
        (ConnectionRefusedError(), "outage"),
        (TimeoutError(), "outage"),
        (httpx.ConnectError("refused"), "outage"),
        (urllib.error.URLError(ConnectionResetError()), "outage"),
        (answered(status=408), "passing"),
        (answered(status=425), "passing"),
        (answered(status=500), "passing"),
        (answered(RETRY_AFTER, 500), "passing"),
        (aws(500), "passing"),
        (answered(status=400), "lasting"),
        (answered(RETRY_AFTER, 404), "lasting"),
        (aws(400), "lasting"),
        (ApiError(response={}), "lasting"),
        (httpx.UnsupportedProtocol("ftp"), "lasting"),
        (ValueError(), "lasting"),
        (KeyboardInterrupt(), "lasting"),
    ],
)
def test_kind_of_a_failure(error: BaseException, kind: str) -> None:
    assert is_transient(error) is (kind != "lasting")
    assert is_throttled(error) is (kind == "throttled")
    assert (kind_of(error) is Kind.OUTAGE) is (kind == "outage")


# --- the wait


def state(error: Exception | None = None, attempt: int = 1) -> RetryCallState:
    made = RetryCallState(Retrying(), None, (), {})
    made.attempt_number = attempt
    made.outcome = Future.construct(attempt, error, has_exception=error is not None)
    return made


def test_wait_is_what_the_answer_asks_for_up_to_its_limit() -> None:
    wait = wait_retry_after(wait_fixed(3), max_wait=60)
    assert wait(state(Throttled(7))) == 7
    assert wait(state(answered({"retry-after-ms": "700"}))) == 0.7
    assert wait(state(answered({"Retry-After": "61"}))) == 60
    assert wait(state(Throttled(1e300))) == 60
    assert wait_retry_after()(state(Throttled(1e300))) == LONGEST_PAUSE == 300
    assert wait_retry_after(max_wait=timedelta(minutes=1))(state(Throttled(99))) == 60
    assert wait_retry_after(max_wait=0)(state(Throttled(99))) == 0


@pytest.mark.parametrize(
    "error", [None, ConnectionResetError(), answered({}), answered({"Retry-After": "0"}), Throttled(0)]
)
def test_wait_is_the_fallback_s_where_nothing_is_asked_for(error: Exception | None) -> None:
    assert wait_retry_after(wait_fixed(3))(state(error)) == 3
    assert (
        wait_retry_after(lambda state: state.attempt_number * 400)(state(error, 2)) == 800
    )  # `max_wait` is not its


def test_default_fallback_is_the_default_policy_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    for attempt in range(1, 10):
        asked = state(ConnectionResetError(), attempt)
        assert wait_retry_after()(asked) == default_policy().wait(asked)


def test_wait_can_be_added_to_another_and_survives_pickle() -> None:
    wait = pickle.loads(pickle.dumps(wait_retry_after(wait_fixed(3), max_wait=60) + wait_fixed(1)))  # noqa: S301 - our own
    assert (wait(state(Throttled(7))), wait(state(Throttled(70))), wait(state())) == (8, 61, 4)


@pytest.mark.parametrize("fallback", [3, "soon", timedelta(seconds=3)], ids=type)
def test_fallback_that_is_no_wait(fallback: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"fallback is .*; expected a tenacity wait, e.g. wait_fixed\(1\)"):
        wait_retry_after(fallback)


@pytest.mark.parametrize("max_wait", [None, True, "60"], ids=type)
def test_limit_that_is_no_time(max_wait: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"max_wait is .*; expected a number or a timedelta, of at least 0 s"):
        wait_retry_after(max_wait=max_wait)


@pytest.mark.parametrize("max_wait", [-1, timedelta(seconds=-1), float("nan"), float("inf")])
def test_limit_that_can_not_be(max_wait: float | timedelta) -> None:
    with pytest.raises(
        ValueError, match=r"max_wait is .*; expected a number or a timedelta, finite and of at least"
    ):
        wait_retry_after(max_wait=max_wait)


def test_default_policy_heeds_the_answer() -> None:
    judge, call = Judge(default_policy()), Outcome[str, str, str](0, "item")
    for call.attempts in (1, 2):
        verdict = judge.judge(call, End(None, answered({"Retry-After": "150"}), 100.0))
        assert verdict == Retry(250.0)
    call.attempts = 3
    assert judge.judge(call, End(None, answered({"Retry-After": "301"}), 100.0)) == Retry(400.0)


def test_job_waits_as_long_as_it_is_told(virtual: VirtualTime) -> None:
    calls = []

    def fetch(token: str) -> str:
        calls.append(virtual.now)
        if len(calls) < 3:
            raise Throttled(50 * len(calls))
        return token

    assert run_two_stage(["item"], str, fetch) == ["item"]
    assert [round(later - calls[0], 6) for later in calls] == [0, 50, 150]


def test_being_held_back_is_no_failed_attempt_in_the_log(
    virtual: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[float] = []

    def fetch(token: str) -> str:
        asked.append(virtual.now)
        if len(asked) == 1:
            raise Throttled(2)
        if len(asked) == 2:
            raise ConnectionResetError
        return token

    caplog.set_level("INFO", "twostage")
    run_two_stage(["item"], str, fetch)
    records = caplog.records[1:-1]  # not the job's begin and end
    assert [(record.levelname, record.getMessage().partition(";")[0]) for record in records] == [
        ("INFO", "stage two: paused for 2.0 s, as your limit asks"),
        ("INFO", "stage two, 'item': held back for 2.00 s by a limit"),
        ("INFO", "stage two, 'item': attempt 1 failed with ConnectionResetError"),
    ]
