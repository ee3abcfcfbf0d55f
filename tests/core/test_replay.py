"""A job on real threads is recorded and replayed: the same inputs make the coordinator decide the same.

Its inputs are events, clock readings and draws; its decisions what it starts, what it tells the caller's
thread, and when it wants to be woken.
"""

from __future__ import annotations

import random
import time
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from common import books

from twostage import iter_two_stage
from twostage.base.records import Batch
from twostage.job.driver import ThreadDriver, world
from twostage.testing import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from twostage.base.as_completed import Event, Handler
    from twostage.base.records import Call
    from twostage.base.runner import Runner, Work
    from twostage.core.coordinator import Coordinator
    from twostage.core.moments import Message

Key = tuple[str, int]
"""A call: its stage, and its first item's index."""


class WakeUp(NamedTuple):
    """One call of `handle`: what came in, and what was decided."""

    now: float
    events: list[tuple[str, Any, Any, BaseException | None, float]]
    draws: list[float]
    started: list[Key]
    told: tuple[list[int], int, bool] | None
    due: float | None


def key_of(call: Call) -> Key:
    if isinstance(call, Batch):
        return "batch", call.members[0].index  # type: ignore[union-attr] # items have one token each
    return "token", call.index  # type: ignore[attr-defined] # no third kind


def told(message: Message | None) -> tuple[list[int], int, bool] | None:
    if message is None:
        return None
    return [outcome.index for outcome in message.outcomes], message.wanted, message.ended


class NotedRunner:
    """Notes the calls that a runner is given."""

    def __init__(self, runner: Runner, started: list[Key]) -> None:
        self.runner = runner
        self.started = started

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        self.started += map(key_of, calls)
        self.runner.start(calls, first=first)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the runner's
        return getattr(self.runner, name)


class Recorder(ThreadDriver):
    """Drives a coordinator in a thread, and records each wake-up."""

    def __init__(self) -> None:
        super().__init__()
        self.wake_ups: list[WakeUp] = []
        self.draws: list[float] = []
        self.started: list[Key] = []

    def runner(self, work: Work) -> Any:  # noqa: ANN401 - a runner in all but type
        return NotedRunner(super().runner(work), self.started)

    def start(self, coordinator: Coordinator) -> None:
        handle = coordinator.handle

        def recorded(events: Iterable[Event], now: float) -> Message | None:
            events = list(events)
            came = [
                (
                    handler.__name__,
                    key_of(subject) if handler.__name__ == "_attempt_ended" else subject,
                    answer,
                    error,
                    getattr(subject, "began", 0.0),
                )
                for handler, subject, answer, error in events
            ]
            message = handle(events, now)
            self.wake_ups.append(
                WakeUp(now, came, self.draws[:], self.started[:], told(message), coordinator.due())
            )
            self.draws.clear()
            self.started.clear()
            return message

        coordinator.handle = recorded  # type: ignore[method-assign]
        super().start(coordinator)


class ReplayedRunner:
    """Runs nothing: attempts end as they were recorded to."""

    def __init__(self, ended: Handler, started: list[Key]) -> None:
        self.out = 0
        self.ended = ended
        self.started = started
        self.calls: dict[Key, Call] = {}

    def start(self, calls: Sequence[Call], *, first: bool = False) -> None:
        self.started += map(key_of, calls)
        self.calls |= {key_of(call): call for call in calls}
        self.out += len(calls)

    def attempt_ended(self, began: float, key: Key, answer: object, error: BaseException | None) -> None:
        call = self.calls.pop(key)  # a KeyError: it was not started this time
        call.began = began
        self.out -= 1
        self.ended(call, answer, error)

    def expect(self, calls: int) -> None:
        pass

    def stop(self) -> None:
        pass


class Replayer:
    """Builds a coordinator as a driver does, and holds what it needs to be fed."""

    def __init__(self) -> None:
        self.started: list[Key] = []
        self.runners: list[ReplayedRunner] = []
        self.coordinator: Coordinator | None = None

    def runner(self, work: Work) -> ReplayedRunner:
        self.runners.append(ReplayedRunner(work.ended, self.started))
        return self.runners[-1]

    def replay(self, coordinator: Coordinator, wake_up: WakeUp) -> WakeUp:
        events: list[Event] = []
        for name, subject, answer, error, began in wake_up.events:
            if name == "_attempt_ended":
                runner = self.runners[("batch", "token").index(subject[0])]
                events.append((partial(runner.attempt_ended, began), subject, answer, error))
            elif name != "_task_ended":  # a pool's own business
                events.append((getattr(coordinator, name), subject, answer, error))
        message = coordinator.handle(events, wake_up.now)
        decided = wake_up._replace(started=self.started[:], told=told(message), due=coordinator.due())
        self.started.clear()
        return decided


def flaky(share: float, seed: int) -> Callable[[Any], Any]:
    chance = random.Random(seed)

    def call(argument: Any) -> Any:  # noqa: ANN401 - items and tokens
        time.sleep(0.0005 * chance.random())
        if chance.random() < share:
            raise ApiError(503)
        return argument

    return call


@pytest.mark.parametrize("ordered", [False, True])
def test_recorded_inputs_replay_to_the_same_decisions(
    monkeypatch: pytest.MonkeyPatch, *, ordered: bool
) -> None:
    monkeypatch.setattr("twostage.failing.retry.FIRST_WAIT", 0.002)
    settings: dict[str, Any] = {"batch_size": 5, "result_workers": 6, "window": 60, "ordered": ordered}
    recorder, replayer = Recorder(), Replayer()
    uniform = random.uniform

    def drawn(low: float, high: float) -> float:
        recorder.draws.append(uniform(low, high))
        return recorder.draws[-1]

    def recorded_job() -> None:
        world.set(lambda: recorder)
        with iter_two_stage(range(400), flaky(0.2, 1), flaky(0.2, 2), **settings) as outcomes:
            assert sum(1 for _ in outcomes) == 400

    def replayed_job() -> Coordinator:
        world.set(lambda: replayer)  # type: ignore[arg-type, return-value] # what of a driver is needed here
        return books(iter_two_stage(range(400), flaky(0, 1), flaky(0, 2), **settings))

    monkeypatch.setattr(random, "uniform", drawn)
    copy_context().run(recorded_job)
    draws = iter([draw for wake_up in recorder.wake_ups for draw in wake_up.draws])
    monkeypatch.setattr(random, "uniform", lambda *_: next(draws))
    coordinator = copy_context().run(replayed_job)
    for wake_up in recorder.wake_ups:
        assert replayer.replay(coordinator, wake_up) == wake_up
    assert next(draws, None) is None
    assert sum(len(wake_up.draws) for wake_up in recorder.wake_ups) > 50
    assert sum(len(wake_up.started) for wake_up in recorder.wake_ups) > 560
