"""How many blocks of a kernel a device runs at a time."""

from __future__ import annotations

import torch

__all__ = ["num_multiprocessors"]

# Kernels that run on a CPU are interpreted or imitated, one block after the other.
_ON_CPU = 2


def num_multiprocessors(device: torch.device) -> int:
    """The device's multiprocessors; a small number for a CPU, so that tests cut ranges, too."""
    if device.type == "cpu":
        return _ON_CPU
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
