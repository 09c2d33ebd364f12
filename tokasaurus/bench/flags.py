"""Flags that several commands share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokasaurus.errors import ConfigError

__all__ = ["counts", "scale"]


def counts(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    """The value of a flag that is a list of counts.

    Raises:
        ConfigError: one of them is not a whole number of at least 1.
    """
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"{name}={text}: expected a whole number of at least 1")
    return tuple(int(text) for text in texts)


def scale(size: float) -> None:
    """Raises ConfigError unless the flag ``size`` is a number above 0."""
    if not 0 < size < math.inf:
        raise ConfigError(f"size={size}: expected a number above 0")
