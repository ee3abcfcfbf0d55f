"""Functions for other processes, which begin the sooner the less this module imports."""

from __future__ import annotations

import os
import signal


def double(number: int) -> int:
    return 2 * number


def doubles(numbers: list[int]) -> list[int]:
    return [2 * number for number in numbers]


def several(number: int) -> list[int]:
    return list(range(number % 4))


def where(number: int) -> tuple[int, int]:
    return number, os.getpid()


def die_at(last: int, number: int) -> int:
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_until_the_end(number: int) -> int:
    if number < 3:
        raise ConnectionError  # and waits to be tried again
    return die_at(6, number)
