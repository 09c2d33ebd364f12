"""Copies tensors to the host, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Download"]


class Download:
    """A tensor's copy that is on its way to the host; on the CPU the tensor itself.

    The copy is enqueued behind the work that computes the tensor. Any thread may wait for it.
    """

    def __init__(self, tensor: Tensor) -> None:
        # Without blocking, torch copies into pinned memory.
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrival: torch.Event | None = None
        if tensor.device.type != "cpu":
            self._arrival = torch.Event(tensor.device)
            self._arrival.record()

    def array(self) -> NDArray[Any]:
        """Waits for the copy, which the array shares its memory with."""
        if self._arrival is not None:
            self._arrival.synchronize()
        array: NDArray[Any] = self._copy.numpy()
        return array
