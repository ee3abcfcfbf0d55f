"""Two API calls for every item, the second needing what the first returned.

The names below are the public ones, and those of `twostage.testing`, with which scripts are tested, and of
`twostage.observing`, whose events an `Observer` hears; the other modules are the library's own business.
"""

from twostage.async_executor import AsyncExecutor
from twostage.async_run import aiter_two_stage, arun_two_stage
from twostage.calls import Outcome
from twostage.errors import (
    AttemptTimeout,
    BatchLengthError,
    JournalError,
    MissingToken,
    RecordedFailure,
    RemoteError,
    RunTimeout,
    TooManyFailures,
)
from twostage.gates import Rate
from twostage.journal import Journal
from twostage.observing import Observer, Progress
from twostage.outcomes import AsyncOutcomes, Outcomes
from twostage.run import iter_two_stage, run_two_stage
from twostage.sharded import iter_sharded, run_sharded
from twostage.stage import Stage
from twostage.throttling import Throttled, wait_retry_after
from twostage.trace import Trace
from twostage.transient import is_transient

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
    "Stage",
    "Throttled",
    "TooManyFailures",
    "Trace",
    "aiter_two_stage",
    "arun_two_stage",
    "is_transient",
    "iter_sharded",
    "iter_two_stage",
    "run_sharded",
    "run_two_stage",
    "wait_retry_after",
]
