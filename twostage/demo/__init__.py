"""The demonstration: an HTTP API on this machine, its client, and the ways that are compared."""

from __future__ import annotations

__all__ = ["serve"]


def serve(**faults: float) -> str:
    """Starts the demonstration's API on a free port of this machine, until Python ends.

    Args:
        **faults: Shares of what goes wrong, by name: `python -m twostage --help` lists them. Default: none.

    Returns:
        Its address.

    Raises:
        ValueError: No fault has this name, or a share is not from 0 to below 1.
    """
    from twostage.demo.api import EmbeddedApi  # noqa: PLC0415 - who wants a part of it does not need all

    return EmbeddedApi(faults=faults).__enter__().url
