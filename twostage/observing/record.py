"""What is recorded of a job's attempts: when each was handed over, began and ended, and how."""

from __future__ import annotations

from array import array
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from twostage.observing.events import Observer

if TYPE_CHECKING:
    from twostage.observing.events import HeldBack, JobBegan, JobEnded

__all__ = ["ATTEMPTS", "Attempts", "Ending", "Record"]

# Typecodes of `array`: 55 bytes an attempt.
ATTEMPTS = {
    "stage": "B",
    "item_index": "Q",
    "size": "I",
    "number": "I",
    "handed_over": "d",
    "began": "d",
    "ended": "d",
    "answers": "I",
    "ending": "H",
    "asked": "f",
    "wait": "f",
}


class Ending(NamedTuple):
    """How attempts end.

    Attributes:
        name: The exception's type; empty for an answer.
        status: The HTTP status that it carried, or `None`.
        kind: What that says of the API: "LASTING", "PASSING", "THROTTLED" or "OUTAGE"; else empty.
    """

    name: str = ""
    status: int | None = None
    kind: str = ""

    def __str__(self) -> str:
        return self.name if self.status is None else f"{self.name} {self.status}"


class Attempts(NamedTuple):
    """Columns of a stage's attempts; times are seconds of the job."""

    item_index: list[int]
    size: list[int]
    number: list[int]
    handed_over: list[float]
    began: list[float]
    ended: list[float]
    answers: list[int]
    ending: list[int]
    asked: list[float]
    wait: list[float]


class Record(Observer):
    """The attempts of one job, in columns, and its pauses.

    Attributes:
        job: How the job began; `None` if none has.
        end: How it ended; `None` as long as it has not.
        holds: When stages were held back, and when they went on.
        endings: How attempts ended; the column "ending" of `columns` has their places here.
        left_out: How many attempts were not recorded, as there were `max_attempts`.
    """

    def __init__(self, job: JobBegan | None = None) -> None:
        self.job = job
        self.end: JobEnded | None = None
        self.holds: list[HeldBack] = []
        self.endings: list[Ending] = [Ending()]
        self.left_out = 0
        self._lot: list[tuple[Any, ...]] = []
        self._attempts: dict[str, array[Any]] = {name: array(code) for name, code in ATTEMPTS.items()}

    def __len__(self) -> int:
        """How many attempts are recorded."""
        return len(self._attempts["stage"]) + len(self._lot)

    def __bool__(self) -> bool:
        """Whether it is a trace, which it always is."""
        return True

    def columns(self) -> dict[str, list[Any]]:
        """Returns what was recorded of each attempt, for `pandas.DataFrame` or `polars.DataFrame`.

        Returns:
            By name: "stage", "item_index" of the first item, "size", "number" of the attempt, "handed_over",
            "began" and "ended" in seconds from the job's begin on, "answers", and "ending": empty for an
            answer, else the failure's type and status. In the order in which attempts ended.

        Raises:
            ValueError: No job was traced to its end.
        """
        begin = self.begun.clock
        columns: dict[str, list[Any]] = {
            name: [time - begin for time in column] if column.typecode == "d" else list(column)
            for name, column in self._attempts.items()
        }
        del columns["asked"], columns["wait"]
        names = list(map(str, self.endings))
        columns["ending"] = [names[place] for place in columns["ending"]]
        return columns

    def stage(self, stage: int) -> Attempts:
        """Returns the columns of a stage's attempts, in seconds from the job's begin on.

        Raises:
            ValueError: As from `columns`.
        """
        begin = self.begun.clock
        of_stage = [one == stage for one in self._attempts["stage"]]
        columns: list[list[Any]] = [list(compress(column, of_stage)) for column in self._attempts.values()]
        attempts = Attempts(*columns[1:])
        for times in (attempts.handed_over, attempts.began, attempts.ended):
            times[:] = [time - begin for time in times]
        return attempts

    def retries(self, stage: int) -> list[tuple[float, float]]:
        """Returns from when till when calls of a stage waited for a retry, in seconds of the job."""
        attempts = self.stage(stage)
        return [
            (ended, ended + wait) for ended, wait in zip(attempts.ended, attempts.wait, strict=True) if wait
        ]

    def pauses(self, stage: int) -> list[tuple[float, float, str]]:
        """Returns from when till when a stage was held back, and why: "paused", "limited" or "down"."""
        begin = self.begun.clock
        pauses: list[tuple[float, float, str]] = []
        for held in self.holds:
            if held.stage == stage and held.why in ("paused", "limited"):
                pauses.append((held.at - begin, min(held.until - begin, self.seconds), held.why))
            elif held.stage == stage and held.why in ("up", "given up"):
                pauses.append((held.at - held.seconds - begin, held.at - begin, "down"))
        return pauses

    @property
    def begun(self) -> JobBegan:
        """How the job began.

        Raises:
            ValueError: No job was traced to its end.
        """
        if self.job is None or self.end is None:
            raise ValueError("the trace has no job that has ended; give it to one as trace=")
        return self.job

    @property
    def seconds(self) -> float:
        """How long the job took."""
        return 0.0 if self.end is None else self.end.seconds
