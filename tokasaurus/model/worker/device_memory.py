"""What a device says about its memory: the seam that tests replace."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["DeviceMemory", "open_device_memory"]


class DeviceMemory(Protocol):
    """The memory of a device, in bytes, where this process allocates tensors.

    An allocator takes memory from the driver in large pieces, and keeps what tensors have freed.
    """

    def total(self) -> int:
        """Of the device."""
        ...

    def free(self) -> int:
        """That the driver has left, for this process or another."""
        ...

    def held(self) -> int:
        """By tensors of this process."""
        ...

    def peak(self) -> int:
        """The most that tensors have held since ``reset_peak``."""
        ...

    def reset_peak(self) -> None:
        """Begins a new measurement of the peak."""
        ...

    def give_back(self) -> None:
        """Waits for the device, and gives the driver what no tensor holds."""
        ...


class CudaMemory:
    """Implements ``DeviceMemory`` by PyTorch's allocator.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def give_back(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def open_device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a device; None where none can be measured: the system promises memory of a CPU
    before it has it, and other processes take it meanwhile."""
    return CudaMemory(device) if device.type == "cuda" else None
