"""Division that rounds up: the pages that tokens fill, the blocks that ids take."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokasaurus.protocol.arrays import Int32Array, Int64Array

__all__ = ["ceil_div", "round_up"]

Count = TypeVar("Count", int, Int32Array, Int64Array, NDArray[np.integer[Any]])


def ceil_div(count: Count, size: Count | int) -> Count:
    """``count / size`` rounded up, for whole numbers and for arrays of them. Sizes are positive."""
    return -(-count // size)


def round_up(count: Count, multiple: Count | int) -> Count:
    """The smallest multiple of ``multiple`` that is not below ``count``."""
    return ceil_div(count, multiple) * multiple
