"""Functions for other processes, which begin the sooner the less this module imports."""

from __future__ import annotations

import os
import signal
import sys


def double(number: int) -> int:
    return 2 * number


async def double_later(number: int) -> int:
    return 2 * number


def doubles(numbers: list[int]) -> list[int]:
    return [2 * number for number in numbers]


def several(number: int) -> list[int]:
    return list(range(number % 4))


def place() -> tuple[int, int]:
    """Returns the process and, in it, the interpreter that this is."""
    if "concurrent.interpreters" not in sys.modules:
        return os.getpid(), 0
    return os.getpid(), sys.modules["concurrent.interpreters"].get_current().id


def where(number: int) -> tuple[int, tuple[int, int]]:
    return number, place()


def die_at(last: int, number: int) -> int:
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_until_the_end(number: int) -> int:
    if number < 3:
        raise ConnectionError  # and waits to be tried again
    return die_at(6, number)
