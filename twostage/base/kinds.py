"""What a failure says of the API; and what stands for one that comes from another process."""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = ["BaseRemoteError", "Classified", "Kind", "RemoteError", "RemoteTraceback"]


class Kind(enum.Enum):
    """What a failure says of the API.

    Attributes:
        LASTING: The same call will not succeed a moment later.
        PASSING: It may.
        THROTTLED: The calls are too many, so that all of them had better slow down.
        OUTAGE: The API seems to be down: not reached, late, or out of service without saying for how long.
    """

    LASTING = enum.auto()
    PASSING = enum.auto()
    THROTTLED = enum.auto()
    OUTAGE = enum.auto()


class Classified(NamedTuple):
    """What was found out about an exception in the process that raised it, where its causes were there too.

    Attributes:
        kind: Of failure.
        late: Whether it says that the answer is late.
        retry_after: How many seconds the API's answer asks to wait.
    """

    kind: Kind
    late: bool
    retry_after: float | None


class BaseRemoteError(BaseException):
    """A `RemoteError` for one that is no `Exception`, and so ends the job."""

    def __init__(self, type_name: str, text: str, status: int | None, known: Classified) -> None:
        super().__init__(type_name, text, status, known)
        self.type_name = type_name
        self.text = text
        self.status = status
        self.retry_after = known.retry_after
        self.known = known

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}"

    def __repr__(self) -> str:
        status = "" if self.status is None else f", status {self.status}"
        return f"<{type(self).__name__} for {self.type_name}{status}>"  # the text often holds a URL


class RemoteError(BaseRemoteError, Exception):
    """Stands for an exception of another process that can't be pickled, or not unpickled.

    It counts as what it stands for: whether it is transient, throttled or an outage, and how long it asks
    to wait. Those are many clients' errors, as `httpx.HTTPStatusError` or `openai.RateLimitError`, whose
    classes want arguments that pickle does not keep.

    Attributes:
        type_name: The exception's class, as "openai.RateLimitError".
        text: What `str` makes of it.
        status: The HTTP status that it carries, or `None`.
        retry_after: How many seconds the API's answer asks to wait, or `None`.
    """


class RemoteTraceback(BaseException):
    """The traceback of an exception of another process, as that one's `__cause__`.

    (It is no `Exception`, so that nobody takes it for the failure behind the failure.)

    Attributes:
        text: As Python prints it, with the causes.
        known: What else did not travel with the exception.
    """

    def __init__(self, text: str, known: Classified) -> None:
        super().__init__(text, known)
        self.text = text
        self.known = known

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"
