"""Copies the host's arrays to the device.

No copy waits for the device: on an accelerator arrays are copied from pinned memory, which torch
keeps until the copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from tokasaurus.protocol.arrays import Int32Array

__all__ = ["Later", "OnDevice", "Staged", "Staging", "pinned", "upload_indices"]

_TORCH_TYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}


class OnDevice(Protocol):
    """A tensor that is on the device once a staging buffer is sent."""

    @property
    def tensor(self) -> Tensor: ...


class Later:
    """Implements ``OnDevice``: made of tensors that are sent, or that are there.

    Args:
        make: is called when the tensor is first asked for.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            assert self._make is not None
            self._tensor = self._make()
            # It holds what the tensor is made of, which may be a whole staging buffer.
            self._make = None
        return self._tensor


class Staged:
    """Implements ``OnDevice``: an array that a staging buffer sends. ``Staging.add`` makes it."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._shape = array.shape
        self._array: NDArray[Any] | None = array
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The copy on the device, which is there once the buffer is sent."""
        assert self._tensor is not None, "the staging buffer is not sent yet"
        return self._tensor

    def _take_array(self) -> NDArray[Any]:
        """The array, flat, which is forgotten here."""
        assert self._array is not None, "the staging buffer is sent already"
        array, self._array = self._array.reshape(-1), None
        return array

    def _arrive(self, flat: Tensor) -> None:
        self._tensor = flat if len(self._shape) == 1 else flat.view(self._shape)


class Staging:
    """Collects arrays on the host, and sends them to the device in one copy::

        rows = staging.add_indices(sampled_rows)
        scale = staging.add(temperature)
        staging.send()
        logits[rows.tensor] / scale.tensor

    The buffer holds one type after the other, those with the largest elements first. So every array
    is aligned::

        int64 │ float64 │ int32 │ float32 │ bool

    On the CPU the tensors are views of the buffer itself.

    Args:
        device: of the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staged: dict[np.dtype[Any], list[Staged]] = {}

    def add(self, array: NDArray[Any], dtype: DTypeLike | None = None) -> Staged:
        """Adds an array of any shape, which must not change before ``send``.

        Args:
            array: of a type that ``_TORCH_TYPES`` has.
            dtype: of the copy; None for the array's own.
        """
        staged = Staged(array)
        key = array.dtype if dtype is None else np.dtype(dtype)
        self._staged.setdefault(key, []).append(staged)
        return staged

    def add_indices(self, array: NDArray[np.integer[Any]]) -> Staged:
        """Adds an array that is copied in int64, which torch takes for indices."""
        return self.add(array, np.int64)

    def send(self) -> None:
        """Copies the arrays that were added. It is called once."""
        if not self._staged:
            return
        groups = sorted(self._staged.items(), key=lambda group: -group[0].itemsize)
        arrays = [[each._take_array() for each in staged] for _, staged in groups]
        lengths = [[len(array) for array in flat] for flat in arrays]
        sizes = [
            dtype.itemsize * sum(counts) for (dtype, _), counts in zip(groups, lengths, strict=True)
        ]
        host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=_can_pin(self._device))
        regions = host.split_with_sizes(sizes)
        for (dtype, _), region, flat in zip(groups, regions, arrays, strict=True):
            np.concatenate(flat, out=region.numpy().view(dtype), casting="same_kind")
        parts = _sent(host, self._device).split_with_sizes(sizes)
        for (dtype, staged), part, counts in zip(groups, parts, lengths, strict=True):
            views = part.view(_TORCH_TYPES[dtype]).split_with_sizes(counts)
            for each, view in zip(staged, views, strict=True):
                each._arrive(view)


def pinned(arrays: Sequence[Int32Array], device: torch.device) -> list[Tensor]:
    """Copies of arrays on the host, in one buffer from which copies to the device do not wait.

    Args:
        arrays: [any] each.
        device: that will get them.
    """
    sizes = [len(array) for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=_can_pin(device))
    np.concatenate(arrays, out=host.numpy())
    return list(host.split_with_sizes(sizes))


def upload_indices(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """A copy of the array on the device in int64, which torch takes for indices."""
    host = torch.from_numpy(values.astype(np.int64))
    return _sent(host.pin_memory() if _can_pin(device) else host, device)


def _can_pin(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")


def _sent(host: Tensor, device: torch.device) -> Tensor:
    """Every array goes to the device through here."""
    return host if device.type == "cpu" else host.to(device, non_blocking=True)
