"""Weights in int8, and activations that are quantized row by row, multiplied on the CPU.

``int8.cpp`` has the arithmetic, the layout and the loops. Sums are exact integers, so results are
the same, bit for bit, for every batch, number of threads and instruction set.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tokasaurus.model.backend.cpu.calls import Kernel, load_kernels
from tokasaurus.model.linear_methods.base import LinearSpec
from tokasaurus.model.linear_methods.panels import PanelLinear, why_no_panels
from tokasaurus.model.placement import Placement
from tokasaurus.rounding import round_up

__all__ = ["Int8Linear", "why_not"]

_SOURCE = Path(__file__).with_name("int8.cpp")
# Rows of the weight that lie together.
_PANEL = 32


class _Product(ctypes.Structure):
    """Mirrors ``Arguments`` of the C++ file."""

    _fields_ = (
        *(("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "sums", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("in_size", "out_size")),
        *(("following", ctypes.c_void_p), ("element", ctypes.c_int32)),
    )


@cache
def _library(instruction_set: str) -> tuple[ctypes.CDLL, Kernel]:
    """The library, and its product."""
    library, (multiply,) = load_kernels(_SOURCE, instruction_set, {"tokasaurus_multiply": _Product})
    pointer, number, element = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.tokasaurus_packed_size.argtypes = (number, number)
    library.tokasaurus_packed_size.restype = number
    library.tokasaurus_pack.argtypes = (pointer, *(number,) * 3, *(pointer,) * 3)
    library.tokasaurus_unpack.argtypes = (*(pointer,) * 3, number, number, element, pointer)
    for function in (library.tokasaurus_pack, library.tokasaurus_unpack):
        function.restype = None
    return library, multiply


class Int8Linear(PanelLinear):
    """Multiplies by a weight in panels, in int8.

    Args:
        spec: the product.
        place: dtype of activations and results, fp32 or bf16; the device is the CPU.

    Raises:
        BuildError: the kernel cannot be built on this machine.
    """

    def __init__(self, spec: LinearSpec, place: Placement) -> None:
        self._library, multiply = _library(place.instruction_set)
        super().__init__(spec, place, multiply, _Product)
        size = self._library.tokasaurus_packed_size(spec.out_size, spec.in_size)
        whole_panels = (round_up(spec.out_size, _PANEL),)
        self._packed = self._memory.empty((size,), torch.int8, place.device)
        self._scales = self._memory.empty(whole_panels, torch.float32, place.device)
        self._sums = self._memory.empty(whole_panels, torch.int32, place.device)

    @property
    def _packed_from(self) -> torch.dtype:
        return torch.float32

    def _weight(self) -> dict[str, Tensor]:
        return {"weight": self._packed, "scales": self._scales, "sums": self._sums}

    def _pack(self, block: Tensor, first: int) -> None:
        self._library.tokasaurus_pack(
            block.data_ptr(),
            len(block),
            self._spec.in_size,
            first,
            self._packed.data_ptr(),
            self._scales.data_ptr(),
            self._sums.data_ptr(),
        )

    def _unpack(self, ids: Tensor, rows: Tensor) -> None:
        self._library.tokasaurus_unpack(
            self._packed.data_ptr(),
            self._scales.data_ptr(),
            ids.data_ptr(),
            len(ids),
            self._spec.in_size,
            self._element,
            rows.data_ptr(),
        )


def why_not(place: Placement) -> str | None:
    """Why products of this dtype on this device cannot be in int8; None if they can."""
    return why_no_panels(place, _library)
