"""`python -m twostage journal FILE`: what a journal holds, without what is secret in it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from twostage.base.words import STAGES
from twostage.errors import JournalError
from twostage.journal.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twostage.journal.journal import Recorded

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Prints the report, or raises `SystemExit` with what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m twostage journal", description="Tells how much a journal holds, and which failures."
    )
    parser.add_argument("file", metavar="FILE", help="the path that the job was given as journal=")
    path = parser.parse_args(argv).file
    try:
        recorded = Journal(path).recorded()
    except JournalError as error:
        raise SystemExit(str(error)) from error
    print("\n".join(report(recorded)))
    return 0


def report(recorded: Recorded) -> list[str]:
    """Returns the report's lines."""
    failed = recorded.failures.total()
    version = "" if recorded.version is None else f", version {recorded.version}"
    lines = [
        f"job: {recorded.job or 'none yet'}{version}",
        f"{recorded.results:>12,}  with their result",
        f"{recorded.tokens:>12,}  with their token, stage two is missing",
        f"{failed:>12,}  failed{', of which' if failed else ''}",
    ]
    for (stage, name, status), number in recorded.failures.most_common():
        what = name if status is None else f"{name}, status {status}"
        lines.append(f"{number:>12,}    at {STAGES[stage]}: {what}")
    if recorded.first is not None and recorded.last is not None:
        lines.append(f"from {recorded.first:%Y-%m-%d %H:%M:%S} to {recorded.last:%Y-%m-%d %H:%M:%S} UTC")
    return lines
