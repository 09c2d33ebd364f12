"""Weights packed once into panels, and multiplied by a kernel of ours on the CPU.

``F.linear`` repacks a weight at every call, which costs most where a batch has few rows: when it
decodes. ``packed.cpp`` has the layout and the loops.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from torch import Tensor

from tokasaurus.model.backend.cpu.calls import Kernel, load_kernels
from tokasaurus.model.linear_methods.base import LinearSpec
from tokasaurus.model.linear_methods.panels import PanelLinear, why_no_panels
from tokasaurus.model.placement import Placement

__all__ = ["PackedLinear", "why_not"]

_SOURCE = Path(__file__).with_name("packed.cpp")


class _Product(ctypes.Structure):
    """Mirrors ``Arguments`` of the C++ file."""

    _fields_ = (
        *(("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("in_size", "out_size")),
        *(("following", ctypes.c_void_p), ("element", ctypes.c_int32)),
    )


@cache
def _library(instruction_set: str) -> tuple[ctypes.CDLL, Kernel]:
    """The library, and its product."""
    library, (multiply,) = load_kernels(_SOURCE, instruction_set, {"tokasaurus_multiply": _Product})
    pointer, number, element = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.tokasaurus_packed_size.argtypes = (number, number, element)
    library.tokasaurus_packed_size.restype = number
    library.tokasaurus_pack.argtypes = (pointer, number, number, number, element, pointer)
    library.tokasaurus_unpack.argtypes = (pointer, pointer, number, number, element, pointer)
    for function in (library.tokasaurus_pack, library.tokasaurus_unpack):
        function.restype = None
    return library, multiply


class PackedLinear(PanelLinear):
    """Multiplies by a weight in panels, in its own dtype.

    Args:
        spec: the product.
        place: dtype of the tensors, fp32 or bf16; the device is the CPU.

    Raises:
        BuildError: the kernel cannot be built on this machine.
    """

    def __init__(self, spec: LinearSpec, place: Placement) -> None:
        self._library, multiply = _library(place.instruction_set)
        super().__init__(spec, place, multiply, _Product)
        size = self._library.tokasaurus_packed_size(spec.out_size, spec.in_size, self._element)
        self._packed = place.empty(size)
        self._zero_padding()

    def restore(self) -> None:
        super().restore()
        self._zero_padding()

    def _zero_padding(self) -> None:
        """Padding is multiplied too. Without padding no page is touched before it is filled."""
        if self._packed.numel() > self._spec.out_size * self._spec.in_size:
            self._packed.zero_()

    def _weight(self) -> dict[str, Tensor]:
        return {"weight": self._packed}

    def _pack(self, block: Tensor, first: int) -> None:
        self._library.tokasaurus_pack(
            block.data_ptr(),
            len(block),
            self._spec.in_size,
            first,
            self._element,
            self._packed.data_ptr(),
        )

    def _unpack(self, ids: Tensor, rows: Tensor) -> None:
        self._library.tokasaurus_unpack(
            self._packed.data_ptr(),
            ids.data_ptr(),
            len(ids),
            self._spec.in_size,
            self._element,
            rows.data_ptr(),
        )


def why_not(place: Placement) -> str | None:
    """Why weights of this dtype cannot be packed on this device; None if they can."""
    return why_no_panels(place, _library)
