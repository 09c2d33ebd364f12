"""Copies tensors to the host, without waiting for the device, and without the device waiting.

Copies have a stream of their own::

    compute   batch 0 ── its tokens │ batch 1 ───────────────────────
    copies                          └─ tokens of batch 0 ─ arrival
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Download"]


class Download:
    """A tensor's copy that is on its way to the host; on the CPU the tensor itself.

    The copy comes after the work that was enqueued before, which computes the tensor. Any thread
    may wait for it. Later work must not change the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: torch.Event | None = None
        if tensor.device.type == "cpu":
            self._copy = tensor
        elif not tensor.numel():
            self._copy = torch.empty_like(tensor, device="cpu")
        else:
            stream = _stream_of(tensor.device)
            stream.wait_stream(torch.accelerator.current_stream(tensor.device))
            with stream:
                # Without blocking, torch copies into pinned memory.
                self._copy = tensor.to("cpu", non_blocking=True)
            # Its memory is not given out again before the copy is done.
            tensor.record_stream(stream)
            self._arrival = stream.record_event()

    @property
    def has_arrived(self) -> bool:
        """Whether ``array`` would return without waiting."""
        return self._arrival is None or self._arrival.query()

    def array(self) -> NDArray[Any]:
        """Waits for the copy, which the array shares its memory with."""
        if self._arrival is not None:
            self._arrival.synchronize()
        array: NDArray[Any] = self._copy.numpy()
        return array


@cache
def _stream_of(device: torch.device) -> torch.Stream:
    """The stream of all copies from the device."""
    return torch.Stream(device)
