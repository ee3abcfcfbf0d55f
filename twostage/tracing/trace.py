"""`Trace`: what a job's attempts did and when, in little room; and what can be made of that."""

from __future__ import annotations

import json
import math
import os
from array import array
from struct import pack
from typing import TYPE_CHECKING, Any

from twostage.base.checks import positive_int
from twostage.base.kinds import RemoteError
from twostage.failing.clients import status_of
from twostage.failing.throttling import retry_after
from twostage.failing.transient import kind_of
from twostage.observing.events import HeldBack, JobBegan, JobEnded, settings_of
from twostage.observing.record import ATTEMPTS, Ending, Record

if TYPE_CHECKING:
    from typing import Self, Unpack

    from matplotlib.figure import Figure

    from twostage.observing.events import Attempt, RetryDue
    from twostage.tracing.foresee import Changes, Foresight
    from twostage.tracing.summary import Summary

__all__ = ["Trace"]

FORMAT = "twostage trace 1"

LEAST_WAIT = 1e-9  # a wait of 0 is none
LOT = 64  # attempts that are kept as they came, before they are put into the columns: that costs less so


class Trace(Record):
    """Records each attempt of a job: when it was handed over, began and ended, and how. And its pauses.

    It is of one job at a time; the next one it is given to begins it anew. It takes 55 bytes an attempt, and
    holds no item, token, result or text of an error. What its methods say is for when the job has ended.

    Args:
        max_attempts: How many attempts are recorded, at most; later ones are counted. Default: all.

    Raises:
        TypeError: `max_attempts` is no integer.
        ValueError: It is below 1.

    Attributes:
        job: How the job began; `None` if none has.
        end: How it ended; `None` as long as it has not.
        holds: When stages were held back, and when they went on.
        endings: How attempts ended; the column "ending" of `columns` has their places here.
        left_out: How many attempts were not recorded, as there were `max_attempts`.

    >>> from twostage import run_two_stage
    >>> trace = Trace()
    >>> results = run_two_stage(range(3), str, len, trace=trace)
    >>> len(trace), trace.summary().stages[1].calls
    (6, 3)
    """

    def __init__(self, max_attempts: int | None = None) -> None:
        self.max_attempts = None if max_attempts is None else positive_int(max_attempts, "max_attempts")
        self._begin(None)

    def _begin(self, job: JobBegan | None) -> None:
        Record.__init__(self, job)
        self._places: dict[Ending, int] = {self.endings[0]: 0}
        self._wait = 0.0  # till a retry, of the attempt that will be told of next

    # --- what it hears

    def job_began(self, job: JobBegan) -> None:
        self._begin(job)

    def retry_due(self, retry: RetryDue) -> None:
        self._wait = max(retry.due - retry.at, LEAST_WAIT)

    def attempt_ended(self, attempt: Attempt) -> None:
        record: tuple[Any, ...] = attempt
        if attempt[8] is not None or self._wait:
            record = (*attempt[:8], (*self._ending(attempt[8]), self._wait))
            self._wait = 0.0
        lot = self._lot
        lot.append(record)
        if len(lot) >= LOT:
            self._store()

    def _ending(self, error: BaseException | None) -> tuple[int, float]:
        """Returns the place of an error among the endings, and the wait that it asks for."""
        if error is None:
            return 0, 0.0
        name = error.type_name if isinstance(error, RemoteError) else type(error).__name__
        ending = Ending(name, status_of(error) if isinstance(error, Exception) else None, kind_of(error).name)
        place = self._places.setdefault(ending, len(self.endings))
        if place == len(self.endings):
            self.endings.append(ending)
        return place, retry_after(error) or 0.0 if isinstance(error, Exception) else 0.0

    def _store(self) -> None:
        lot, self._lot = self._lot, []
        room = len(lot) if self.max_attempts is None else self.max_attempts - len(self._attempts["stage"])
        self.left_out += max(0, len(lot) - room)
        if not lot or room <= 0:
            return
        *columns, ends = zip(*lot[:room], strict=True)
        columns += zip(*((0, 0.0, 0.0) if end is None else end for end in ends), strict=True)
        for column, values in zip(self._attempts.values(), columns, strict=True):
            column.frombytes(pack(f"{len(values)}{column.typecode}", *values))  # faster than `extend`

    def held_back(self, held: HeldBack) -> None:
        if len(self.holds) != self.max_attempts:
            self.holds.append(held)

    def job_ended(self, end: JobEnded) -> None:
        self._store()
        self.end = end._replace(error=None)  # it would be kept alive, and all that it leads to

    # --- what it tells

    def __repr__(self) -> str:
        return f"<Trace of {len(self):,} attempts>"

    def __str__(self) -> str:
        return str(self.summary())

    def summary(self) -> Summary:
        """Returns figures of both stages, what limits the job, and what to change; `print` shows a table.

        Raises:
            ValueError: No job was traced to its end, or it made no attempt.
        """
        from twostage.tracing.summary import summary  # noqa: PLC0415 - jobs need none of it

        return summary(self)

    def efficiency(self) -> float:
        """Returns how near the job came to the least time that any schedule takes for what the API did.

        That is a bound from below: each stage's attempts, as long as they were, on its workers without a gap,
        and before or behind them the shortest one of the other stage.

        Returns:
            The least time by the time that the job took; 1 at most.

        Raises:
            ValueError: No job was traced to its end, it made no attempt, or not all of them were recorded.
        """
        from twostage.tracing.summary import efficiency  # noqa: PLC0415 - as above

        return efficiency(self)

    def what_if(self, **changes: Unpack[Changes]) -> Foresight:
        """Returns how long the job would take with other settings.

        The job is run again in virtual time, several times, on draws from the latencies and failures that
        were recorded. What its source or its consumer took is not in it.

        Args:
            **changes: `token_workers`, `result_workers`, `batch_size`, `rate` of stage two and `token_rate`
                of stage one: calls a second that may begin.

        Raises:
            ValueError: No job was traced to its end, or the trace can't speak for such a job: no call had
                that batch size, and there are not two others to tell how the latency depends on it; or the
                API has asked to slow down, and more calls at once are asked about.
            TypeError: A setting is of the wrong kind.
        """
        from twostage.tracing.foresee import what_if  # noqa: PLC0415 - as above

        return what_if(self, **changes)

    def foretell(self, items: int, **changes: Unpack[Changes]) -> Foresight:
        """Returns how long a job for so many items will take: the trace is one of a trial for fewer.

        Args:
            items: How many.
            **changes: As for `what_if`.

        Raises:
            ValueError: As from `what_if`.
            TypeError: As from `what_if`.
        """
        from twostage.tracing.foresee import what_if  # noqa: PLC0415 - as above

        return what_if(self, items=items, **changes)

    # --- what it draws and writes

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws who ran what and when, and below it how many calls ran and tokens waited.

        Args:
            path: A file to write it to: PNG, SVG or PDF, by its name. Default: none.

        Returns:
            matplotlib's figure.

        Raises:
            ValueError: No job was traced to its end, or it made no attempt.
            ImportError: matplotlib is not there: `pip install 'twostage[plot]'`.
        """
        from twostage.tracing.plot import plot  # noqa: PLC0415 - as above

        return plot(self, path)

    def to_perfetto(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that https://ui.perfetto.dev opens, and chrome://tracing.

        Raises:
            ValueError: No job was traced to its end.
        """
        from twostage.tracing.perfetto import events_of  # noqa: PLC0415 - as above

        _write(path, events_of(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace to a file as JSON, that its owner alone can read.

        Raises:
            ValueError: No job was traced to its end.
        """
        job, end = self.begun, self.end
        assert end is not None  # noqa: S101 - for the type checker
        _write(
            path,
            {
                "format": FORMAT,
                "job": {**job._asdict(), "stages": [stage._asdict() for stage in job.stages]},
                "end": end._asdict(),
                "max_attempts": self.max_attempts,
                "left_out": self.left_out,
                "holds": [
                    {**held._asdict(), "until": None if held.until == math.inf else held.until}
                    for held in self.holds
                ],
                "endings": self.endings,
                "attempts": {name: list(column) for name, column in self._attempts.items()},
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns the trace that `save` has written.

        Raises:
            ValueError: It is none.
            OSError: The file can't be read.
        """
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - a path may be a plain text
            try:
                saved = json.load(file)
            except ValueError:
                saved = None
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"{path} is no trace that this release has saved")
        job = saved["job"]
        trace = cls(saved["max_attempts"])
        trace.job = JobBegan(**{**job, "stages": tuple(map(settings_of, job["stages"]))})
        trace.end = JobEnded(**saved["end"])
        trace.left_out = saved["left_out"]
        for held in saved["holds"]:
            trace.holds.append(
                HeldBack(**{**held, "until": math.inf if held["until"] is None else held["until"]})
            )
        trace.endings = [Ending(*ending) for ending in saved["endings"]]
        trace._attempts = {name: array(ATTEMPTS[name], saved["attempts"][name]) for name in ATTEMPTS}
        return trace


def _write(path: str | os.PathLike[str], what: object) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - of a descriptor
        os.chmod(path, 0o600)  # noqa: PTH101 - it may have been there
        json.dump(what, file, allow_nan=False)
