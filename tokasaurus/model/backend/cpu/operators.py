"""The element-wise kernels of a layer: ``operators.cpp`` through ctypes.

A call costs a few microseconds beyond its work, so arguments are plain numbers, and a batch of few
rows stays in one thread. ``reference_operators.py`` defines the results.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tokasaurus.model.backend.cpu.build import load_library

__all__ = ["ELEMENTS", "CompiledOperators", "load_operators"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SOURCE = Path(__file__).with_name("operators.cpp")

# Elements of a result that justify several threads. To start them takes as long as one thread needs
# for this many.
_ELEMENTS_PER_THREAD = 32_768

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CompiledOperators:
    """Implements ``Operators``.

    Args:
        instruction_set: the name of one, or "auto".

    Raises:
        BuildError: the library cannot be built on this machine.
        ConfigError: the processor does not run this instruction set.
    """

    def __init__(self, instruction_set: str) -> None:
        library = load_library(_SOURCE, instruction_set)
        rows = (_long, _int, _int)
        self._rms_norm = library.tokasaurus_rms_norm
        self._rms_norm.argtypes = (_int, _pointer, _long, _pointer, _float, _pointer, *rows)
        self._add_rms_norm = library.tokasaurus_add_rms_norm
        self._add_rms_norm.argtypes = (
            *(_int, _pointer, _pointer, _long, _pointer, _float, _pointer),
            *rows,
        )
        self._silu_multiply = library.tokasaurus_silu_multiply
        self._silu_multiply.argtypes = (_int, _pointer, _long, _pointer, *rows)
        for function in (self._rms_norm, self._add_rms_norm, self._silu_multiply):
            function.restype = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        num_rows, size = rows.shape
        output = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            ELEMENTS[x.dtype],
            rows.data_ptr(),
            rows.stride(0),
            weight.data_ptr(),
            eps,
            output.data_ptr(),
            num_rows,
            size,
            _num_threads(num_rows * size),
        )
        return output

    def add_rms_norm(self, stream: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_rows, size = stream.shape
        output = torch.empty((num_rows, size), dtype=stream.dtype)
        self._add_rms_norm(
            ELEMENTS[stream.dtype],
            stream.data_ptr(),
            added.data_ptr(),
            added.stride(0),
            weight.data_ptr(),
            eps,
            output.data_ptr(),
            num_rows,
            size,
            _num_threads(num_rows * size),
        )
        return output

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        num_rows, double_size = gate_up.shape
        size = double_size // 2
        output = torch.empty((num_rows, size), dtype=gate_up.dtype)
        self._silu_multiply(
            ELEMENTS[gate_up.dtype],
            gate_up.data_ptr(),
            gate_up.stride(0),
            output.data_ptr(),
            num_rows,
            size,
            _num_threads(4 * num_rows * size),
        )
        return output


@cache
def load_operators(instruction_set: str) -> CompiledOperators:
    """The operators of an instruction set, once for all models."""
    return CompiledOperators(instruction_set)


def _num_threads(num_elements: int) -> int:
    if num_elements < 2 * _ELEMENTS_PER_THREAD:
        return 1
    return min(torch.get_num_threads(), num_elements // _ELEMENTS_PER_THREAD)
