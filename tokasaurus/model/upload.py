"""Copies the host's arrays to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["upload", "upload_indices"]


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array on the device, in the same dtype. Also copies where both are the host."""
    return torch.from_numpy(np.array(values, order="C")).to(device)


def upload_indices(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """A copy of the array on the device in int64, which torch takes for indices."""
    return torch.from_numpy(values.astype(np.int64)).to(device)
