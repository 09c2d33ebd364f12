"""Memory of tensors that live as long as the model: its weights, and the KV cache.

On a CPU it lies in huge pages, where the system offers them. Every pass reads all weights, from
more pages of 4 KiB than the processor keeps addresses of: with these, the products of SmolLM2-135M
take about twice as long, with few rows and with many.
"""

from __future__ import annotations

import contextlib
import mmap
from math import prod

import torch
from torch import Tensor

from tokasaurus.rounding import round_up

__all__ = ["Region"]

# Of Linux on x86, and on ARM with pages of 4 KiB.
_HUGE_PAGE = 2 << 20

# Bytes that are mapped at once, for tensors that are smaller.
_BLOCK = 64 << 20

# Of the address of a tensor: a line of the cache.
_ALIGNMENT = 64


class Region:
    """Allocates tensors that are freed together. Those of a CPU share blocks of huge pages.

    The system provides a page as it is first written.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor."""
        if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or not prod(shape):
            return torch.empty(shape, dtype=dtype, device=device)
        size = prod(shape) * dtype.itemsize
        block, offset = self._room(size)
        self._used = offset + size
        flat = torch.frombuffer(block, dtype=dtype, count=prod(shape), offset=offset)
        # The tensor is no view, so that nothing else keeps its block.
        tensor = torch.empty(0, dtype=dtype)
        return tensor.set_(flat.untyped_storage(), 0, shape, flat.view(shape).stride())

    def release(self, *tensors: Tensor) -> None:
        """Frees the tensors' memory. To read or write one before ``restore`` is undefined.

        A block is unmapped with the last of its tensors. A view keeps the memory.
        """
        self._block = None
        for tensor in tensors:
            one = torch.empty(1, dtype=tensor.dtype, device=tensor.device)
            tensor.set_(one.untyped_storage(), 0, tensor.shape, (0,) * tensor.dim())

    def restore(self, *tensors: Tensor) -> None:
        """Gives memory back to tensors that were released: uninitialised, at other addresses."""
        for tensor in tensors:
            if tensor.untyped_storage().nbytes() < tensor.nbytes:
                new = self.empty(tensor.shape, tensor.dtype, tensor.device)
                tensor.set_(new.untyped_storage(), 0, new.shape, new.stride())

    def _room(self, size: int) -> tuple[mmap.mmap, int]:
        """A block, and where in it these bytes have room."""
        offset = round_up(self._used, _ALIGNMENT)
        if self._block is None or offset + size > len(self._block):
            self._block, offset = _mapped(max(size, _BLOCK))
        return self._block, offset


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    """A new block, and where its first huge page begins."""
    block = mmap.mmap(
        -1,
        size + _HUGE_PAGE,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )
    # A system that was built without huge pages, as real-time ones are, refuses the advice.
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block, -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
