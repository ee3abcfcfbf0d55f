"""Two API calls for every item, the second needing what the first returned.

The names below are the public ones, and those of `twostage.testing`, with which scripts are tested, and of
`twostage.observing`, whose events an `Observer` hears; the other modules are the library's own business.
"""

from twostage.base.kinds import RemoteError
from twostage.base.records import Outcome
from twostage.errors import (
    AttemptTimeout,
    BatchLengthError,
    JournalError,
    MissingToken,
    RecordedFailure,
    RunTimeout,
    TooManyFailures,
)
from twostage.failing.throttling import Throttled, wait_retry_after
from twostage.failing.transient import is_transient
from twostage.job.outcomes import AsyncOutcomes, Outcomes
from twostage.journal.journal import Journal
from twostage.observing.events import Observer, Progress
from twostage.pace.rates import Rate
from twostage.run import aiter_two_stage, arun_two_stage, iter_two_stage, run_two_stage
from twostage.running.async_executor import AsyncExecutor
from twostage.shards.owner import Shards
from twostage.stage import Stage
from twostage.tracing.trace import Trace

__all__ = [
    "AsyncExecutor",
    "AsyncOutcomes",
    "AttemptTimeout",
    "BatchLengthError",
    "Journal",
    "JournalError",
    "MissingToken",
    "Observer",
    "Outcome",
    "Outcomes",
    "Progress",
    "Rate",
    "RecordedFailure",
    "RemoteError",
    "RunTimeout",
    "Shards",
    "Stage",
    "Throttled",
    "TooManyFailures",
    "Trace",
    "aiter_two_stage",
    "arun_two_stage",
    "is_transient",
    "iter_two_stage",
    "run_two_stage",
    "wait_retry_after",
]
