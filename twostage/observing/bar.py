"""What shows how far a job is: a tqdm bar, or a function of the user's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from twostage.base.checks import check_function
from twostage.observing.events import Observer

if TYPE_CHECKING:
    from collections.abc import Callable

    from twostage.observing.events import JobBegan, JobEnded, Progress

__all__ = ["ProgressLike", "shower"]

ProgressLike: TypeAlias = "bool | Literal['always'] | Callable[[Progress], object]"
"""Whether a bar is shown, on a terminal or always; or a function that takes a `Progress`."""


def shower(progress: object) -> Observer | None:
    """Returns what shows the progress, or `None` if nothing is to.

    Raises:
        TypeError: It is nothing that could.
        ImportError: tqdm is not there.
    """
    if progress is False:
        return None
    if progress is True or progress == "always":
        return Bar(_bar_class(), always=progress == "always")
    if isinstance(progress, str) or not callable(progress):
        raise TypeError(
            f'progress is {progress!r}; expected True, False, "always", or a function that takes a Progress'
        )
    check_function(progress, "progress")
    return Report(progress)


class Report(Observer):
    """Tells a function of the user's."""

    def __init__(self, report: Callable[[Progress], object]) -> None:
        self._report = report

    def progressed(self, progress: Progress) -> None:
        self._report(progress)


def _bar_class() -> Any:  # noqa: ANN401 - tqdm has no types
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            "progress=True shows a bar of tqdm, which is not installed: pip install 'twostage[progress]'; "
            "or give progress= a function"
        ) from error
    # What looks after slow bars is a thread, which would outlive the job.
    return type("Bar", (tqdm,), {"monitor_interval": 0})


class Bar(Observer):
    """A bar of tqdm.

    Args:
        bar_class: tqdm's.
        always: Whether it is shown if standard error is no terminal, too.
    """

    def __init__(self, bar_class: Any, *, always: bool) -> None:  # noqa: ANN401 - tqdm has no types
        self._class = bar_class
        self._always = always
        self._bar: Any = None

    def job_began(self, job: JobBegan) -> None:
        # A notebook's is no terminal, and shows its bar by other means.
        notebook = any(base.__module__ == "tqdm.notebook" for base in self._class.__mro__)
        shown = self._always or notebook or sys.stderr.isatty()
        if shown:
            # It has no say in when to draw: the job asks ten times a second at most.
            self._bar = self._class(
                total=job.total, unit="item", mininterval=0, miniters=1, dynamic_ncols=True
            )

    def progressed(self, progress: Progress) -> None:
        if self._bar is None:
            return
        self._bar.set_postfix_str(postfix(progress), refresh=False)
        if progress.done > self._bar.n:
            self._bar.update(progress.done - self._bar.n)
        else:
            self._bar.refresh()

    def job_ended(self, end: JobEnded) -> None:
        del end
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def postfix(progress: Progress) -> str:
    """Returns what stands beside a bar."""
    parts = [f"{progress.token_calls}+{progress.result_calls} calls"]
    if progress.tokens_waiting:
        parts.append(f"{progress.tokens_waiting:,} tokens wait")
    if progress.delayed:
        parts.append(f"{progress.delayed:,} to retry")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if progress.why:
        parts.append(progress.why)
    return ", ".join(parts)
