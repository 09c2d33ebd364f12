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

from tokasaurus.model.backend.cpu.build import BuildError
from tokasaurus.model.backend.cpu.calls import Kernel, call, load_kernels, result
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.placement import Placement
from tokasaurus.rounding import round_up

__all__ = ["Int8Linear", "why_not"]

_SOURCE = Path(__file__).with_name("int8.cpp")
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}

# Rows of the weight that lie together.
_PANEL = 32

# Numbers of a tensor that are packed at once.
_BLOCK_SIZE = 1 << 22


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


class Int8Linear(LinearMethod):
    """Multiplies by a weight in int8, which lies in panels. There is no other copy of it.

    Args:
        spec: the product.
        place: dtype of activations and results, fp32 or bf16; the device is the CPU.

    Raises:
        BuildError: the kernel cannot be built on this machine.
    """

    def __init__(self, spec: LinearSpec, place: Placement) -> None:
        self._spec, self._dtype = spec, place.dtype
        self._library, self._multiply = _library(place.instruction_set)
        self._element = _ELEMENTS[place.dtype]
        self._memory = place.memory
        size = self._library.tokasaurus_packed_size(spec.out_size, spec.in_size)
        whole_panels = (round_up(spec.out_size, _PANEL),)
        self._packed = self._memory.empty((size,), torch.int8, place.device)
        self._scales = self._memory.empty(whole_panels, torch.float32, place.device)
        self._sums = self._memory.empty(whole_panels, torch.int32, place.device)
        self._bias = place.empty(spec.out_size) if spec.bias else None

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        rows = self._spec.rows(part)
        if kind == "bias":
            assert self._bias is not None
            self._bias[rows].copy_(tensor)
            return
        # In blocks, since a tensor of another dtype or device is copied on the way.
        first = rows.start
        for block in torch.split(tensor, max(_BLOCK_SIZE // self._spec.in_size, 1)):
            plain = block.to("cpu", torch.float32).contiguous()
            self._library.tokasaurus_pack(
                plain.data_ptr(),
                len(plain),
                self._spec.in_size,
                first,
                self._packed.data_ptr(),
                self._scales.data_ptr(),
                self._sums.data_ptr(),
            )
            first += len(plain)

    def finish(self) -> None:
        """Does nothing: each tensor is in its place."""

    def release(self) -> None:
        self._memory.release(*self._tensors())

    def restore(self) -> None:
        self._memory.restore(*self._tensors())

    def _tensors(self) -> list[Tensor]:
        tensors = [self._packed, self._scales, self._sums]
        return tensors if self._bias is None else [*tensors, self._bias]

    def apply(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows = x.shape[0]
        y = result(num_rows, self._spec.out_size, self._dtype)
        arguments = _Product(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            weight=self._packed.data_ptr(),
            scales=self._scales.data_ptr(),
            sums=self._sums.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            y=y.data_ptr(),
            in_size=self._spec.in_size,
            out_size=self._spec.out_size,
            element=self._element,
        )
        former = call(self._multiply, arguments, num_rows)
        if former is not None:
            former.following = ctypes.addressof(arguments)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        ids = ids.contiguous()
        found = torch.empty(len(ids), self._spec.in_size, dtype=self._dtype)
        self._library.tokasaurus_unpack(
            self._packed.data_ptr(),
            self._scales.data_ptr(),
            ids.data_ptr(),
            len(ids),
            self._spec.in_size,
            self._element,
            found.data_ptr(),
        )
        return found


def why_not(place: Placement) -> str | None:
    """Why products of this dtype on this device cannot be in int8; None if they can."""
    if place.device.type != "cpu":
        return "it is for device=cpu"
    if place.dtype not in _ELEMENTS:
        return f"it is for fp32 and bf16, not for {place.dtype}"
    try:
        _library(place.instruction_set)
    except BuildError as error:
        return f"no kernel can be built: {error}; install g++"
    return None
