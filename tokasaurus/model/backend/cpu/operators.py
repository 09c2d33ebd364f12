"""The element-wise kernels of a layer, ``operators.cpp``.

``reference_operators.py`` defines the results.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tokasaurus.model.backend.cpu.calls import call, load_kernels, result

__all__ = ["ELEMENTS", "CompiledOperators", "load_operators"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SOURCE = Path(__file__).with_name("operators.cpp")

_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


# These mirror the structures of the C++ file.
class _Norm(ctypes.Structure):
    _fields_ = (
        *(("x", _pointer), ("stride", _long), ("weight", _pointer), ("output", _pointer)),
        *(("eps", _float), ("size", _int), ("element", _int)),
    )


class _AddNorm(ctypes.Structure):
    _fields_ = (
        *(("stream", _pointer), ("added", _pointer), ("stride", _long), ("weight", _pointer)),
        *(("output", _pointer), ("eps", _float), ("size", _int), ("element", _int)),
    )


class _SiluMultiply(ctypes.Structure):
    _fields_ = (
        *(("gate_up", _pointer), ("stride", _long), ("output", _pointer)),
        *(("size", _int), ("element", _int)),
    )


class CompiledOperators:
    """Implements ``Operators``.

    Args:
        instruction_set: the name of one, or "auto".

    Raises:
        BuildError: the library cannot be built on this machine.
        ConfigError: the processor does not run this instruction set.
    """

    def __init__(self, instruction_set: str) -> None:
        _, kernels = load_kernels(
            _SOURCE,
            instruction_set,
            {
                "tokasaurus_rms_norm": _Norm,
                "tokasaurus_add_rms_norm": _AddNorm,
                "tokasaurus_silu_multiply": _SiluMultiply,
            },
        )
        self._rms_norm, self._add_rms_norm, self._silu_multiply = kernels

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        num_rows, size = rows.shape
        output = result(num_rows, size, x.dtype)
        arguments = _Norm(
            x=rows.data_ptr(),
            stride=rows.stride(0),
            weight=weight.data_ptr(),
            output=output.data_ptr(),
            eps=eps,
            size=size,
            element=ELEMENTS[x.dtype],
        )
        call(self._rms_norm, arguments, num_rows)
        return output.view(x.shape)

    def add_rms_norm(self, stream: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_rows, size = stream.shape
        output = result(num_rows, size, stream.dtype)
        arguments = _AddNorm(
            stream=stream.data_ptr(),
            added=added.data_ptr(),
            stride=added.stride(0),
            weight=weight.data_ptr(),
            output=output.data_ptr(),
            eps=eps,
            size=size,
            element=ELEMENTS[stream.dtype],
        )
        call(self._add_rms_norm, arguments, num_rows)
        return output

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        num_rows, double_size = gate_up.shape
        output = result(num_rows, double_size // 2, gate_up.dtype)
        arguments = _SiluMultiply(
            gate_up=gate_up.data_ptr(),
            stride=gate_up.stride(0),
            output=output.data_ptr(),
            size=double_size // 2,
            element=ELEMENTS[gate_up.dtype],
        )
        call(self._silu_multiply, arguments, num_rows)
        return output


@cache
def load_operators(instruction_set: str) -> CompiledOperators:
    """The operators of an instruction set, once for all models."""
    return CompiledOperators(instruction_set)
