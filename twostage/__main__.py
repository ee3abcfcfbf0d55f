"""The commands: `python -m twostage` demonstrates, with `journal FILE` or `plan TRACE` it reads one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from twostage.demo import command
from twostage.journal import report
from twostage.tracing import plan

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns 0, or raises `SystemExit` with what went wrong.

    Args:
        argv: The arguments of the command line; those of this process if not given.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = {"journal": report.main, "plan": plan.main}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
