"""Copies the host's arrays to the device.

No copy waits for the device: on an accelerator arrays are copied from pinned memory, which torch
keeps until the copy is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["upload", "upload_indices", "upload_together"]


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array on the device, in the same dtype. Also copies where both are the host."""
    return _sent(torch.from_numpy(np.array(values, order="C")), device)


def upload_indices(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """A copy of the array on the device in int64, which torch takes for indices."""
    return _sent(torch.from_numpy(values.astype(np.int64)), device)


def upload_together(
    arrays: Mapping[str, NDArray[np.integer[Any]]], device: torch.device
) -> dict[str, Tensor]:
    """Copies of arrays on the device in int64, by name: views of one tensor, sent in one copy.

    Args:
        arrays: one at least.
        device: of the copies.
    """
    lengths = [len(array) for array in arrays.values()]
    host = torch.from_numpy(np.concatenate(list(arrays.values()), dtype=np.int64))
    views = _sent(host, device).split_with_sizes(lengths)
    return dict(zip(arrays, views, strict=True))


def _sent(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
