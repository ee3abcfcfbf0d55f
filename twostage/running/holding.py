"""Which executors an attempt holds a worker of, so that a job in it does not wait for itself."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from contextvars import Context

__all__ = ["check_not_held", "variables_for"]

_running_on: ContextVar[tuple[Executor, ...]] = ContextVar("running_on", default=())
"""The executors that the current attempt holds a worker of, and those of the jobs around it."""


def check_not_held(executor: Executor, name: str) -> None:
    """Checks that the attempt that we may be called in holds none of an executor's workers.

    Raises:
        RuntimeError: It does.
    """
    if any(executor is one for one in _running_on.get()):
        raise RuntimeError(
            f"{name} runs the attempt that starts this job, which could then wait for itself for ever; "
            "expected another executor"
        )


def variables_for(executor: Executor | None) -> Context:
    """Returns the context variables of a stage's attempts: the caller's, and where they run."""
    variables = copy_context()
    if executor is not None:
        variables.run(_running_on.set, (*_running_on.get(), executor))
    return variables
