"""The parts of a job hear of what happens in the order that `parts_of` has them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fakes import Fake, stage

from twostage import Observer
from twostage.base.options import JobOptions
from twostage.job.building import build
from twostage.job.stages import settled

if TYPE_CHECKING:
    from fakes import AnyOutcome

    from twostage.core.coordinator import Coordinator

Heard = list[tuple[str, int]]


class Keeping:
    """Stands in for the journal: a part that hears of what is read, and of what is done."""

    def __init__(self, heard: Heard) -> None:
        self.heard = heard

    def attach(self, job: Coordinator) -> None:
        def read(outcomes: list[AnyOutcome], _: object) -> list[AnyOutcome]:
            self.heard.extend(("asked for", outcome.index) for outcome in outcomes)
            return outcomes

        job.hears.read.append(read)
        job.hears.done.append(lambda outcome: self.heard.append(("kept", outcome.index)))


class Hearing(Observer):
    def __init__(self, heard: Heard) -> None:
        self.heard = heard

    def outcome_done(self, outcome: AnyOutcome) -> None:
        self.heard.append(("told", outcome.index))


def heard_of(items: list[Any], answer: Any, **said: Any) -> Heard:  # noqa: ANN401 - any function, any options
    """Returns what the journal and an observer hear of a job, in their order."""
    heard: Heard = []
    options = JobOptions.of({"observer": Hearing(heard), "return_exceptions": True, **said})
    stages = settled(str, stage(Fake(answer, 1.0), workers=1, retry=None), options)
    job = build(items, stages, options, recording=Keeping(heard))
    while job.advance() is not None:
        pass
    return heard


@pytest.mark.usefixtures("virtual")
def test_the_journal_is_asked_for_equal_items_once_and_keeps_before_others_are_told() -> None:
    assert heard_of([0, 0, 1], str, key=str) == [
        ("asked for", 0),
        ("asked for", 2),
        ("kept", 0),
        ("told", 0),
        ("kept", 1),
        ("told", 1),
        ("kept", 2),
        ("told", 2),
    ]
