"""The border to another process or interpreter: calls go there, and answers come back, as bytes of our own.

A pool of processes breaks for good, or one of its processes dies, when something that it moves can't be
unpickled. So all that it moves is bytes, unpickled under a `try` on either side: what is wrong with them is
the failure of one call, and can be told in its words.
"""

from __future__ import annotations

import io
import pickle
import runpy
import sys
import threading
import time
import traceback
from concurrent.futures import BrokenExecutor
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from twostage.base.kinds import BaseRemoteError, Classified, RemoteError, RemoteTraceback
from twostage.base.words import warn, without_our_frames
from twostage.failing.clients import status_of
from twostage.failing.throttling import retry_after
from twostage.failing.transient import is_timeout, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

__all__ = [
    "check_pickling",
    "is_dask",
    "kinds_of",
    "name_of",
    "pickles_by_value",
    "received",
    "sent",
    "start_processes",
    "why_not",
]

# By package and name along the MRO, so that neither multiprocessing nor loky is imported for it.
STANDARD_POOL = ("concurrent", "ProcessPoolExecutor")
INTERPRETERS = ("concurrent", "InterpreterPoolExecutor")
LOKY_POOLS = {("loky", "ProcessPoolExecutor"), ("joblib", "ProcessPoolExecutor")}
DASK = ("distributed", "ClientExecutor")
MPI = ("mpi4py", "MPIPoolExecutor")

CLOUDPICKLES = ("cloudpickle", "joblib.externals.cloudpickle", "ray.cloudpickle")


class Reply(NamedTuple):
    """What comes back: an answer and `None`, or `None` and an exception, pickled."""

    data: bytes

    def __repr__(self) -> str:
        return "<Reply>"  # tokens and results can be read in it


class Home(NamedTuple):
    """What an interpreter is to know of the one that the job runs in.

    Attributes:
        path: Where modules are looked for.
        is_module: Whether the main one was run by its name, as by `python -m`.
        main: Its name, or its file's.
    """

    path: tuple[str, ...]
    is_module: bool
    main: str


class Sent(partial[Reply]):
    """What goes there: a function of ours, and its arguments, pickled."""

    def __repr__(self) -> str:
        return f"<Sent to {self.args[0]}>"  # keys can be read in the rest


def pickles_by_value(executor: Executor) -> bool:
    """Whether an executor, if it pickles at all, may do so with functions and classes of no module."""
    return not kinds_of(executor) & {STANDARD_POOL, INTERPRETERS}


def check_pickling(fetch: Callable[[Any], Any], executor: Executor) -> None:
    """Checks that a function can be sent to the executor's processes or interpreters, if it has some.

    Raises:
        TypeError: It can't.
    """
    error = why_not(fetch, executor)
    if error is not None:
        what = "one that" if pickles_by_value(executor) else "one of a module's top level, that"
        raise TypeError(
            f"fetch is {name_of(fetch)}, which can't be pickled for the {_whose(executor)} of its executor "
            f"({_text(error)}); expected {what} can be"
        ) from error


def why_not(value: object, executor: Executor) -> Exception | None:
    """Returns why a value can't be sent to an executor's processes or interpreters, if it has some."""
    if not kinds_of(executor) & {STANDARD_POOL, INTERPRETERS, *LOKY_POOLS, DASK, MPI}:
        return None
    try:
        _dumps(value, by_value=pickles_by_value(executor))
    except Exception as error:  # noqa: BLE001 - anything of the user's can raise anything when it is pickled
        return error
    return None


def _whose(executor: Executor) -> str:
    return "interpreters" if INTERPRETERS in kinds_of(executor) else "processes"


def is_dask(executor: Executor) -> bool:
    """Whether an executor is Dask's, which says of calls that run, too, that it has cancelled them."""
    return DASK in kinds_of(executor)


def start_processes(executor: Executor) -> None:
    """Has a pool that forks do so in this thread, now: beside threads of ours it might be a deadlock.

    Any other pool of processes gets a call that does nothing as well, as it does not say which it is.
    """
    if STANDARD_POOL not in kinds_of(executor):
        return
    from multiprocessing import active_children  # noqa: PLC0415 - whoever has no such pool does without

    threads = threading.active_count()
    before = active_children()
    executor.submit(int)
    new = [child for child in active_children() if child not in before]
    if threads > 1 and any(type(child).__name__ == "ForkProcess" for child in new):
        warn(
            f"the executor's processes were forked while {threads} threads ran, which can be a deadlock in "
            'them; give it mp_context=multiprocessing.get_context("spawn"), or use it before threads start',
            RuntimeWarning,
        )


# --- here


def sent(stage: str, fetch: Callable[[Any], Any], argument: object, executor: Executor) -> tuple[Any, ...]:
    """Returns what makes a call in another process or interpreter, as `__reduce__` does."""
    left = time.time()
    by_value = pickles_by_value(executor)
    home = _home() if INTERPRETERS in kinds_of(executor) else None
    function = f"{stage}'s {name_of(fetch)}"
    try:
        packed = _dumps(argument, by_value=by_value)
    except Exception as error:  # noqa: BLE001 - anything of the user's can raise anything when it is pickled
        kind = type(_culprit(argument, by_value=by_value)).__name__
        text = f"{function} was to be given a {kind} that can't be pickled: {_text(error)}"
        return Sent, (_refuse, text, by_value)
    return Sent, (_attempt, function, by_value, left, home, _dumps(fetch, by_value=by_value), packed)


def _home() -> Home | None:
    """Returns how another interpreter finds what is here; `None` if the main module has no file."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = getattr(main, "__file__", None) if spec is None else spec.name
    return None if name is None else Home(tuple(sys.path), spec is not None, name)


def received(stage: str, fetch: Callable[[Any], Any], answer: object) -> tuple[object, BaseException | None]:
    """Returns a call's answer or its exception, from wherever it was made."""
    if not isinstance(answer, Reply):
        return answer, None
    try:
        return cast("tuple[object, BaseException | None]", pickle.loads(answer.data))  # noqa: S301 - as the pool does
    except Exception as error:  # noqa: BLE001 - as above
        function = f"{stage}'s {name_of(fetch)}"
        return None, TypeError(f"{function} returned what can't be unpickled: {_text(error)}")


def _culprit(argument: object, *, by_value: bool) -> object:
    """Returns what of a batch can't be pickled; of anything else itself."""
    for member in argument if isinstance(argument, list) else ():
        try:
            _dumps(member, by_value=by_value)
        except Exception:  # noqa: BLE001 - as above
            return member
    return argument


# --- in the other process or interpreter


_interrupted: list[float] = []
"""When Ctrl-C has interrupted a call in this process for the last time."""


def _attempt(
    function: str,
    by_value: bool,  # noqa: FBT001 - pickled by place
    left: float,
    home: Home | None,
    fetch: bytes,
    argument: bytes,
) -> Reply:
    if _interrupted and left <= _interrupted[-1]:
        # It was on its way already, which nobody can cancel, and nobody waits for any more.
        return _reply(None, KeyboardInterrupt(), by_value=by_value)
    try:
        if home is not None:
            _load_main(home)
        call: Callable[[Any], Any] = pickle.loads(fetch)  # noqa: S301 - as the pool does
    except Exception as error:
        # No call will do better, so that it ends the job.
        raise BrokenExecutor(f"{function} can't be unpickled where it is to run: {_text(error)}") from error
    try:
        given = pickle.loads(argument)  # noqa: S301 - as above
    except Exception as error:  # noqa: BLE001 - as above
        text = f"{function} was to be given what can't be unpickled where it runs: {_text(error)}"
        return _refuse(text, by_value)
    try:
        answer = call(given)
    except BaseException as error:  # noqa: BLE001 - it is raised where the answer is awaited
        if isinstance(error, KeyboardInterrupt):
            _interrupted[:] = [time.time()]
        return _reply(None, error, by_value=by_value)
    try:
        return _reply(answer, None, by_value=by_value)
    except Exception as error:  # noqa: BLE001 - as above
        text = f"{function} returned a {type(answer).__name__} that can't be pickled: {_text(error)}"
        return _reply(None, TypeError(text), by_value=by_value)


@cache
def _load_main(home: Home) -> None:
    """Has this interpreter know what a spawned process would: the path, and the main module by that name."""
    sys.path[:] = home.path
    run = runpy.run_module if home.is_module else runpy.run_path
    main = ModuleType("__mp_main__")
    main.__dict__.update(run(home.main, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main


def _refuse(text: str, by_value: bool) -> Reply:  # noqa: FBT001 - as above
    # A ValueError, since it has a batch split: only one of its items may be like that.
    return _reply(None, ValueError(text), by_value=by_value)


def _reply(answer: object, error: BaseException | None, *, by_value: bool) -> Reply:
    return Reply(_dumps((answer, error), by_value=by_value))


# --- pickling


def _dumps(value: object, *, by_value: bool) -> bytes:
    buffer = io.BytesIO()
    _careful(_pickler(by_value=by_value))(  # type: ignore[arg-type] # a class can be hashed
        buffer, pickle.HIGHEST_PROTOCOL
    ).dump(value)
    return buffer.getvalue()


def _pickler(*, by_value: bool) -> type[pickle.Pickler]:
    """Returns what a pool pickles with, without the reducers that loky may have been given."""
    if by_value:
        for name in CLOUDPICKLES:
            if name in sys.modules:
                return cast("type[pickle.Pickler]", sys.modules[name].Pickler)
    from multiprocessing.reduction import ForkingPickler  # noqa: PLC0415 - as in start_processes

    return ForkingPickler


@cache
def _careful(base: type[pickle.Pickler]) -> type[pickle.Pickler]:
    """Returns a pickler all of whose exceptions, wherever they are, will be unpickled as something."""
    override = getattr(base, "reducer_override", None)

    class Careful(base):  # type: ignore[misc, valid-type] # made for each of the two
        def reducer_override(self, value: object) -> Any:  # noqa: ANN401 - as pickle has it
            if isinstance(value, BaseException) and not isinstance(value, BaseRemoteError):
                return _arrived, _packed(value, base)
            return NotImplemented if override is None else override(self, value)

    return Careful


def _packed(
    error: BaseException, pickler: type[pickle.Pickler]
) -> tuple[bytes, BaseRemoteError, str, Classified]:
    """Returns an exception's pickle, what stands for it, its traceback's text, and what is known of it."""
    buffer = io.BytesIO()
    try:
        pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(error)
        data = buffer.getvalue()
    except Exception:  # noqa: BLE001 - as above
        data = b""  # which can't be unpickled either
    known = Classified(kind_of(error), is_timeout(error), retry_after(error))
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    stand_in = RemoteError if isinstance(error, Exception) else BaseRemoteError
    one = stand_in(name, _text(error), status_of(error), known)
    for note in getattr(error, "__notes__", ()):
        one.add_note(str(note))
    return data, one, "".join(traceback.format_exception(without_our_frames(error))), known


def _arrived(data: bytes, stand_in: BaseRemoteError, text: str, known: Classified) -> BaseException:
    cause = RemoteTraceback(text, known)
    try:
        error: BaseException = pickle.loads(data)  # noqa: S301 - as the pool does
        error.__cause__ = cause
        if isinstance(error, BaseException):
            return error
    except Exception:  # noqa: BLE001, S110 - as above
        pass
    stand_in.__cause__ = cause
    return stand_in


# --- names for messages


def kinds_of(value: object) -> set[tuple[str, str]]:
    """Returns the package and name of each class that a value is of."""
    return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__}


def name_of(fetch: object) -> str:
    """Returns the function's name; no repr, as a partial's shows its arguments, keys among them."""
    while isinstance(fetch, partial):
        fetch = fetch.func
    return str(getattr(fetch, "__qualname__", type(fetch).__qualname__))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - what stands for it must not be lost over this
        return type(error).__name__
