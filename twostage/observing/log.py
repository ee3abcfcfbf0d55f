"""What a job says in the log: the logger is "twostage", and nothing is configured here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from twostage.base.words import STAGES, brief
from twostage.failing.clients import status_of
from twostage.failing.throttling import Throttled
from twostage.observing.events import Observer

if TYPE_CHECKING:
    from twostage.observing.events import HeldBack, JobBegan, JobEnded, RetryDue

__all__ = ["Log"]

log = logging.getLogger("twostage")


class Log(Observer):
    """Writes pauses and outages as warnings, and retries and the job's ends at level INFO."""

    def job_began(self, job: JobBegan) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        first, second = job.stages
        log.info(
            "a job begins: %s on %d workers, then %s on %d%s",
            *(first.function, first.workers, second.function, second.workers),
            "" if job.total is None else f", for {job.total:,} items",
        )

    def retry_due(self, retry: RetryDue) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        stage, wait = STAGES[retry.stage], max(retry.due - retry.at, 0)
        more = "" if retry.size == 1 else f" and {retry.size - 1} more"
        if isinstance(retry.error, Throttled):  # it has not failed, and used no attempt
            log.info("%s, %s%s: held back for %.2f s by a limit", stage, brief(retry.item), more, wait)
            return
        status = None if retry.error is None else status_of(retry.error)
        log.info(
            "%s, %s%s: attempt %d %s%s; the next one in %.2f s",
            *(stage, brief(retry.item), more, retry.number),
            "was refused by the retry policy"
            if retry.error is None
            else f"failed with {type(retry.error).__name__}",
            "" if status is None else f", status {status}",
            wait,
        )

    def held_back(self, held: HeldBack) -> None:
        stage = STAGES[held.stage]
        if held.why == "paused":
            log.warning("%s: paused for %.1f s, as the API asks", stage, held.seconds)
        elif held.why == "limited":  # as it is meant to be
            log.info("%s: paused for %.1f s, as your limit asks", stage, held.seconds)
        elif held.why == "down":
            log.warning(
                "%s: the API seems to be down: %d calls were not answered since the last success",
                *(stage, held.lost),
            )
        elif held.why == "up":
            log.warning("%s: the API answers again, after %.1f s", stage, held.seconds)
        else:
            log.warning("%s: the API is not waited for any more, after %.0f s", stage, held.seconds)

    def job_ended(self, end: JobEnded) -> None:
        log.info(
            "the job has ended%s after %.1f s: %d items done, %d of them failed",
            "" if end.error is None else f" with {type(end.error).__name__}",
            *(end.seconds, end.done, end.failed),
        )
