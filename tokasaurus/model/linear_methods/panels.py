"""What linear methods have in common whose kernel multiplies by a weight in panels, on the CPU.

``panels.h`` has what their kernels have in common.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokasaurus.model.backend.cpu.build import BuildError
from tokasaurus.model.backend.cpu.calls import Kernel, call, result
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.placement import Placement

__all__ = ["PanelLinear", "why_no_panels"]

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}

# Numbers of a tensor that are packed at once.
_BLOCK_SIZE = 1 << 22


class PanelLinear(LinearMethod):
    """Multiplies by a weight that lies in panels. There is no other copy of it.

    Args:
        spec: the product.
        place: dtype of activations and results, fp32 or bf16; the device is the CPU.
        multiply: the kernel.
        arguments: its structure. It has ``x``, ``x_stride``, ``bias``, ``y``, ``in_size``,
            ``out_size``, ``following`` and ``element``, and what ``_weight`` returns.
    """

    def __init__(
        self,
        spec: LinearSpec,
        place: Placement,
        multiply: Kernel,
        arguments: type[ctypes.Structure],
    ) -> None:
        self._spec, self._dtype = spec, place.dtype
        self._multiply, self._arguments = multiply, arguments
        self._element = _ELEMENTS[place.dtype]
        self._memory = place.memory
        self._bias = place.empty(spec.out_size) if spec.bias else None

    @abstractmethod
    def _pack(self, block: Tensor, first: int) -> None:
        """Packs consecutive rows of the weight, [rows, in], contiguous in ``_packed_from``."""

    @abstractmethod
    def _unpack(self, ids: Tensor, rows: Tensor) -> None:
        """Writes the rows of the weight that ids name."""

    @abstractmethod
    def _weight(self) -> dict[str, Tensor]:
        """The tensors of the weight by the names of the kernel's arguments."""

    @property
    def _packed_from(self) -> torch.dtype:
        """The dtype of rows that are packed."""
        return self._dtype

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        rows = self._spec.rows(part)
        if kind == "bias":
            assert self._bias is not None
            self._bias[rows].copy_(tensor)
            return
        # In blocks, since a tensor of another dtype or device is copied on the way.
        first = rows.start
        for block in torch.split(tensor, max(_BLOCK_SIZE // self._spec.in_size, 1)):
            self._pack(block.to("cpu", self._packed_from).contiguous(), first)
            first += len(block)

    def finish(self) -> None:
        """Does nothing: each tensor is in its place."""

    def release(self) -> None:
        self._memory.release(*self._tensors())

    def restore(self) -> None:
        self._memory.restore(*self._tensors())

    def _tensors(self) -> list[Tensor]:
        tensors = list(self._weight().values())
        return tensors if self._bias is None else [*tensors, self._bias]

    def apply(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows = x.shape[0]
        y = result(num_rows, self._spec.out_size, self._dtype)
        arguments = self._arguments(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            bias=None if self._bias is None else self._bias.data_ptr(),
            y=y.data_ptr(),
            in_size=self._spec.in_size,
            out_size=self._spec.out_size,
            element=self._element,
            **{name: tensor.data_ptr() for name, tensor in self._weight().items()},
        )
        former = call(self._multiply, arguments, num_rows)
        if former is not None:
            former.following = ctypes.addressof(arguments)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        found = torch.empty(len(ids), self._spec.in_size, dtype=self._dtype)
        self._unpack(ids.contiguous(), found)
        return found


def why_no_panels(place: Placement, load: Callable[[str], Any]) -> str | None:
    """Why a kernel cannot multiply there; None if it can.

    Args:
        place: of the product.
        load: loads the kernel of an instruction set, or raises BuildError.
    """
    if place.device.type != "cpu":
        return "it is for device=cpu"
    if place.dtype not in _ELEMENTS:
        return f"it is for fp32 and bf16, not for {place.dtype}"
    try:
        load(place.instruction_set)
    except BuildError as error:
        return f"no kernel can be built: {error}; install g++"
    return None
