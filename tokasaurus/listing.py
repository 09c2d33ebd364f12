"""Names in error messages: a few of them, however many there are."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["listing"]

_NAMES_SHOWN = 5


def listing(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    names = list(names)
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
