"""The memory behind tensors, given back and allocated again under the same tensor objects."""

from __future__ import annotations

from torch import Tensor

__all__ = ["release", "restore"]


def release(*tensors: Tensor) -> None:
    """Frees the tensors' memory. To read or write one before ``restore`` is undefined.

    Views share the memory: they are released and restored with it.
    """
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def restore(*tensors: Tensor) -> None:
    """Gives memory back to the tensors that were released: uninitialised, at other addresses."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(tensor.numel() * tensor.element_size())
