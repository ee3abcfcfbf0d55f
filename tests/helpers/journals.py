"""What the tests of journals share: both functions of a job, which count what they are asked for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from forms import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forms import Run


class Api:
    """Both functions of a job. It counts what it is asked for, and fails where it is told to."""

    def __init__(self, **failing: dict[Any, Exception]) -> None:
        self.items: Counter[Any] = Counter()
        self.tokens: Counter[str] = Counter()
        self.batches: list[int] = []
        self.failing = {"item": {}, "token": {}, **failing}

    def fetch_token(self, item: Any) -> Any:  # noqa: ANN401 - of any item
        self.items[item] += 1
        if item in self.failing["item"]:
            raise self.failing["item"][item]
        return f"token {item}"

    def fetch_tokens(self, items: Sequence[Any]) -> list[Any]:
        self.batches.append(len(items))
        return [self.fetch_token(item) for item in items]

    def fetch_result(self, token: str) -> Any:  # noqa: ANN401 - of any token
        self.tokens[token] += 1
        if token in self.failing["token"]:
            raise self.failing["token"][token]
        return {"of": token}

    def run(self, items: Any, job: Run = run, **settings: Any) -> list[Any]:  # noqa: ANN401 - any job
        return job(items, self.fetch_token, self.fetch_result, **{"retry": None, **settings})


def results_of(items: Any) -> list[Any]:  # noqa: ANN401 - any items
    return [{"of": f"token {item}"} for item in items]
