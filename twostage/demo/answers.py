"""What the embedded API answers: tokens, results, and the faults that its user orders by name, in `FAULTS`.

A token is a function of its id, a result one of its token: each answer can be checked. Every fault of ids,
tokens and slots is a function of the seed, the id or token, and how often that one was answered: in which
order requests come, and what they take together, changes nothing. `_embedded_fates.py` has the faults of
whole requests.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "FAULTS",
    "LASTING",
    "MOST_IDS",
    "PENDING",
    "Answers",
    "ApiError",
    "Content",
    "ExpiredToken",
    "Faults",
    "Item",
    "Result",
    "is_pending",
    "orders_of",
    "result_of",
    "token_of",
]

Item: TypeAlias = int | str
Result: TypeAlias = dict[str, int | str]
Content: TypeAlias = dict[str, Any]  # of an answer, as JSON

MOST_IDS: Final = 100  # that one request takes, if its API is not told otherwise
MOST_ORDERS: Final = 3

PENDING: Final[Result] = {"status": "pending"}
"""What stands in the place of a result that is not ready yet."""

FAULTS: Final = {
    "errors": "of the requests fail: by 429, by 503, or by ending the connection",
    "missing": "of the ids do not exist: 404 in their slot, and left out of an answer by key",
    "denied": "of the ids have a 403 in their slot, always",
    "refused": "of the ids make every request that asks for them fail with 400",
    "slots": "of the slots of an answer for several are a 503, this time",
    "unprocessed": "of what an answer by key is about is left out of it, this time",
    "expired": "of the tokens have expired: 401, and the next one given for the same id works",
    "pending": "of the results are not ready: 202 for the first request or two",
    "spikes": "of the requests take 20 times as long, though at most 0.3 s",
    "resets": "of the requests are carried out, but their connection is reset",
    "truncated": "of the answers end, with their connection, in the middle",
    "hangs": "of the requests have no answer until their client gives up",
    "throttled": "of the requests have a 429 with a Retry-After, in each of its forms",
    "bursts": "of the requests have a 503, five in a row, some with a Retry-After",
    "outage": "of five seconds the API is down for every request, once, amid the job",
}
"""All faults by their names: a share each, from 0 to 1."""

LASTING: Final = {
    "refused": HTTPStatus.BAD_REQUEST,
    "missing": HTTPStatus.NOT_FOUND,
    "denied": HTTPStatus.FORBIDDEN,
}
"""The faults that no retry helps against, and their statuses; the first that befalls an id is its own."""


class ApiError(Exception):
    """A request that the API refused, or a slot of its answer that is an error.

    Attributes:
        status: The HTTP status of the answer, or in the slot.
        headers: Of the answer, by the names that it gives them; none of a slot.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.headers = headers or {}

    def __str__(self) -> str:
        return f"{self.status}: {self.args[1]}"


class ExpiredToken(ApiError):  # noqa: N818 - as `refresh_token_on=ExpiredToken` reads
    """A token that was right once: status 401."""


def token_of(item: Item, generation: int = 0, order: int | None = None) -> str:
    """Returns the token that the API gives for an id: its JSON text behind a checksum, in hexadecimal.

    Args:
        item: The id.
        generation: 1 for the token that takes an expired one's place.
        order: Which of the id's orders it is the token of, from 0; None for the one of `/tokens`.
    """
    text = json.dumps([item, generation, order]).encode()
    return (zlib.crc32(text).to_bytes(4) + text).hex()


def orders_of(item: Item, generation: int = 0) -> list[str]:
    """Returns the tokens of an id's orders: none to `MOST_ORDERS`, as the id has it."""
    return [token_of(item, generation, order) for order in range(_number_of_orders(item))]


def result_of(token: str) -> Result:
    """Returns the result that the API gives for a token, of whichever generation.

    Raises:
        ApiError: Of status 404; no id has this token.
    """
    item, _, order = _parts_of(token)
    result: Result = {"id": item, "report": f"report {item}"}
    return result if order is None else result | {"order": order}


def is_pending(result: object) -> bool:
    """Whether the result is not ready yet: for `tenacity.retry_if_result`."""
    return result == PENDING


def _parts_of(token: str) -> tuple[Item, int, int | None]:
    """Returns what `token_of` made it of."""
    try:
        item, generation, order = json.loads(bytes.fromhex(token)[4:])
    except (ValueError, TypeError):
        item, generation, order = None, 0, None
    known = (
        _is_id(item) and generation in (0, 1) and (order is None or order in range(_number_of_orders(item)))
    )
    if not known or token_of(item, generation, order) != token:
        raise ApiError(HTTPStatus.NOT_FOUND, "unknown token")
    return item, generation, order


def _number_of_orders(item: Item) -> int:
    return zlib.crc32(json.dumps(item).encode()) % (MOST_ORDERS + 1)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


class Faults:
    """What goes wrong, and whom it befalls.

    Args:
        shares: The share of each fault by its name in `FAULTS`; a number is that of `errors`.
        seed: Of the draws.

    Raises:
        ValueError: No fault has this name, or a share is not from 0 to 1.
    """

    def __init__(self, shares: float | Mapping[str, float] = 0.0, *, seed: int = 0) -> None:
        self.shares = dict(shares) if isinstance(shares, Mapping) else {"errors": shares}
        self._seed = seed
        for name, share in self.shares.items():
            if name not in FAULTS:
                raise ValueError(f"no fault is called {name!r}; there are {', '.join(FAULTS)}")
            if not 0 <= share <= 1:
                raise ValueError(f"the share of {name!r} is from 0 to 1, not {share!r}")

    def hits(self, name: str, *subject: Item) -> bool:
        """Whether a fault befalls an id or token; for one that passes, with the turn behind it."""
        share = self.shares.get(name, 0.0)
        return share > 0 and self.draw(name, *subject) < share

    def lasting_status(self, item: Item) -> int | None:
        """Returns the status of the fault that keeps an id from its result for good, if one does."""
        return next((status for name, status in LASTING.items() if self.hits(name, item)), None)

    def is_expired(self, token: str) -> bool:
        """Whether a token of the API has expired; one that took another's place has not."""
        return "expired" in self.shares and _parts_of(token)[1] == 0 and self.hits("expired", token)

    def times_pending(self, token: str) -> int:
        """Returns for how many requests the token's result is not ready."""
        return 1 + round(self.draw("times", token)) if self.hits("pending", token) else 0

    def draw(self, *subject: Item) -> float:
        """Returns a number from 0 to below 1, always the same for the same subject and seed."""
        text = json.dumps([self._seed, *subject]).encode()
        return int.from_bytes(blake2b(text, digest_size=6).digest()) / 2**48


class Answers:
    """Answers the requests that are carried out, and counts what they asked for.

    Attributes:
        faults: What goes wrong.
        ids: How often each id was asked for, in requests that were refused too.
        tokens: The same of each token.

    Args:
        faults: As the attribute.
        most_ids: How many ids, or tokens, a request takes.
    """

    def __init__(self, faults: Faults, most_ids: int = MOST_IDS) -> None:
        self.faults = faults
        self.ids: Counter[Item] = Counter()
        self.tokens: Counter[str] = Counter()
        self._most_ids = most_ids
        self._turns: Counter[tuple[str, Item]] = Counter()
        self._renewed: set[Item] = set()  # ids of which a token was used that had expired
        self._lock = threading.Lock()  # of the counts

    def to_ids(self, name: str, body: bytes, *, keyed: bool) -> Content:
        """Answers `/tokens` and `/orders`, in the order of the ids or by key.

        Raises:
            ApiError: The whole request is refused.
        """
        ids = self._asked(body, "ids", self.ids, _is_id)
        if any(self.faults.hits("refused", item) for item in ids):
            raise ApiError(HTTPStatus.BAD_REQUEST, "one of the ids is refused")
        make = token_of if name == "tokens" else orders_of
        slots = [(item, self._slot_of_id(item, make, keyed=keyed)) for item in ids]
        return {name: self._by_key(slots) if keyed else [slot for _, slot in slots]}

    def to_tokens(self, body: bytes) -> Content:
        """Answers `/results`, by key.

        Raises:
            ApiError: The whole request is refused.
        """
        tokens = self._asked(body, "tokens", self.tokens, _is_text)
        return {"results": self._by_key([(token, self._slot_of_token(token)) for token in tokens])}

    def to_token(self, token: str) -> Content:
        """Answers `/results/<token>`.

        Raises:
            ApiError: The token is unknown, or has expired.
        """
        with self._lock:
            self.tokens[token] += 1
        return self._result(token)

    def _asked(
        self, body: bytes, name: str, counts: Counter[Any], fits: Callable[[object], bool]
    ) -> list[Any]:
        """Returns what a request is about, counted."""
        try:
            asked = json.loads(body)[name]
        except (ValueError, TypeError, KeyError):
            asked = None
        if not isinstance(asked, list) or not all(map(fits, asked)):
            raise ApiError(HTTPStatus.BAD_REQUEST, f'expected {{"{name}": [...]}}, of integers or strings')
        with self._lock:
            counts.update(asked)
        if len(asked) > self._most_ids:
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            raise ApiError(status, f"{len(asked)} {name}, at most {self._most_ids} are taken")
        return asked

    def _slot_of_id(self, item: Item, make: Callable[[Item, int], object], *, keyed: bool) -> object:
        """Returns what stands for an id, or None if it is left out."""
        status = self.faults.lasting_status(item)
        if keyed and (status == HTTPStatus.NOT_FOUND or self._befalls("unprocessed", item)):
            return None
        if status is None and self._befalls("slots", item):
            status = HTTPStatus.SERVICE_UNAVAILABLE
        return make(item, int(item in self._renewed)) if status is None else {"error": status}

    def _slot_of_token(self, token: str) -> Content | None:
        """Returns what stands for a token, or None if it is left out."""
        if self._befalls("unprocessed", token):
            return None
        if self._befalls("slots", token):
            return {"error": HTTPStatus.SERVICE_UNAVAILABLE}
        try:
            return self._result(token)
        except ApiError as error:
            return {"error": error.status}

    def _result(self, token: str) -> Content:
        result = result_of(token)
        if self.faults.is_expired(token):
            self._renewed.add(result["id"])
            raise ExpiredToken(HTTPStatus.UNAUTHORIZED, "the token has expired")
        times = self.faults.times_pending(token)
        if times and self._turn("pending", token) <= times:
            return dict(PENDING)
        return {"result": result}

    def _befalls(self, name: str, subject: Item) -> bool:
        """Whether a fault that passes befalls an id or token this time."""
        return name in self.faults.shares and self.faults.hits(name, subject, self._turn(name, subject))

    def _turn(self, name: str, subject: Item) -> int:
        with self._lock:
            self._turns[name, subject] += 1
            return self._turns[name, subject]

    def _by_key(self, slots: Sequence[tuple[Item, object]]) -> list[tuple[Item, object]]:
        """Returns what is not left out, shuffled: in an order that is not that of the request."""
        kept = [(subject, slot) for subject, slot in slots if slot is not None]
        return sorted(kept, key=lambda pair: self.faults.draw("order", pair[0]))
