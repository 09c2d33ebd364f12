"""Array types of the messages, and empty arrays.

An array is never written to once it is part of a message that was sent.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int32Array: TypeAlias = NDArray[np.int32]
Int64Array: TypeAlias = NDArray[np.int64]
Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

EMPTY_INT32: Int32Array = np.empty(0, np.int32)
EMPTY_INT64: Int64Array = np.empty(0, np.int64)
EMPTY_FLOAT32: Float32Array = np.empty(0, np.float32)
