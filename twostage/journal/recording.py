"""A job's journal, as a part of it: what is recorded goes on from there, what is new is recorded first."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from twostage.base.words import without_our_frames
from twostage.journal.collector import Collector
from twostage.journal.journal import Journal
from twostage.journal.rows import Identity
from twostage.running.processes import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from twostage.base.options import JobOptions
    from twostage.core.coordinator import Coordinator
    from twostage.core.handover import AnyOutcome
    from twostage.core.moments import Message
    from twostage.journal.recorder import Recorder

__all__ = ["Recording", "identity_of", "journal_of", "recorder_for"]

log = logging.getLogger("twostage")


class Recording:
    """Has a recorder hear of a job, and finds there what is known already."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def attach(self, job: Coordinator) -> None:
        """Is of that job."""
        self._job = job
        job.hears.begins.append(lambda _: self._recorder.open())
        job.hears.closes.append(self._recorder.close)
        job.hears.read.append(self._find)
        self._recorder.collected.attach(job)
        job.hears.before_message.append(self._commit)
        job.hears.handled.append(self._close)

    def _find(self, outcomes: list[AnyOutcome], _keys: object) -> list[AnyOutcome]:
        """Has items go on from what is recorded; returns those of which nothing is."""
        job, found = self._job, self._recorder.find(outcomes)
        job.enter(len(found.calls) + len(found.done))
        for tokens in found.lists:
            job.handing.add_surplus(tokens.outcome.index, len(tokens.results) - 1)
        if found.calls:
            job.lines[1].waiting.extend(found.calls)
        failed = {} if job.return_exceptions else dict(found.failed)
        for outcome in found.done:
            if outcome.index not in failed:
                job.settle(outcome)
        if failed:
            job.failed_index = min(failed)
            job.end(failed[min(failed)])
        return found.new

    def _commit(self) -> None:
        """Has recorded what is handed over next."""
        job, collected = self._job, self._recorder.collected
        try:
            self._recorder.commit()
        except Exception as broken:  # noqa: BLE001 - whatever it is, it can't be handed over
            if job.ending and job.error is not broken:
                log.warning("what the job's last calls gave is not recorded: %s", broken)
            job.end(without_our_frames(broken))
            job.handing.discard(collected.take_finished())
        else:
            job.handing.recorded(filter(collected.is_whole, collected.take_finished()))

    def _close(self, message: Message | None) -> None:
        if message is not None and message.ended:
            self._recorder.close()


def journal_of(options: JobOptions) -> Journal:
    """Returns the journal that was given, if only as its path."""
    journal = options.journal
    return journal if isinstance(journal, Journal) else Journal(journal)


def identity_of(journal: Journal, fetch_token: object, fetch_result: object, *, many: bool) -> Identity:
    """Returns whose answers a job's journal holds."""
    job = journal.job or f"{name_of(fetch_token)}, {name_of(fetch_result)}"
    return Identity(job, journal.version_text, int(many), int(journal.encode is not None))


def recorder_for(
    journal: Journal, identity: Identity, keys: Mapping[int, Any], *, many: bool, goes_on: bool = True
) -> Recorder:
    """Returns what keeps a job's answers in its journal."""
    from twostage.journal.recorder import Recorder  # noqa: PLC0415 - for some Pythons, SQLite is an extra

    return Recorder(journal, identity, keys, Collector(journal, keys, many=many), goes_on=goes_on)
