"""The kernels of sampling: ``sampling.cpp`` through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tokasaurus.model.backend.base import DRAW
from tokasaurus.model.backend.cpu.build import BuildError, load_library
from tokasaurus.model.backend.cpu.operators import ELEMENTS
from tokasaurus.model.backend.masking import mask_rows

__all__ = ["CompiledSampling", "load_sampling"]

_SOURCE = Path(__file__).with_name("sampling.cpp")

# Logits that justify several threads. To start them takes as long as one thread needs for this
# many.
_LOGITS_PER_THREAD = 65_536

_int, _long, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Rows(ctypes.Structure):
    """``Rows`` of sampling.cpp."""

    _fields_ = (
        ("logits", _pointer),
        ("stride", _long),
        ("index", _pointer),
        ("num_rows", _long),
        ("size", _int),
        ("num_threads", _int),
    )


class CompiledSampling:
    """Implements ``SamplingKernels``.

    Args:
        instruction_set: the name of one, or "auto".

    Raises:
        BuildError: the library cannot be built on this machine.
        ConfigError: the processor does not run this instruction set.
    """

    def __init__(self, instruction_set: str) -> None:
        library = load_library(_SOURCE, instruction_set)
        library.tokasaurus_draw_size.restype = _long
        if library.tokasaurus_draw_size() != DRAW.itemsize:
            raise BuildError("the compiler lays out the kernel's arguments in an unexpected way")
        self._draw = library.tokasaurus_draw_rows
        self._draw.argtypes = (_int, _pointer, _pointer, _pointer)
        self._sum = library.tokasaurus_sum_rows
        self._sum.argtypes = (_int, *[_pointer] * 5)
        self._rank = library.tokasaurus_rank_rows
        self._rank.argtypes = (_int, _pointer, _pointer, _int, _pointer, _pointer)
        for function in (self._draw, self._sum, self._rank):
            function.restype = None

    def draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        ids = torch.empty(len(logits), dtype=torch.int64)
        self._draw(ELEMENTS[logits.dtype], _rows(logits, None), draws.data_ptr(), ids.data_ptr())
        return ids

    def log_sums(
        self,
        logits: Tensor,
        index: Tensor | None,
        temperature: Tensor | None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        count = len(logits if index is None else index)
        norms = torch.empty(count, dtype=torch.float32)
        higher = None if token_ids is None else torch.empty(count, dtype=torch.int64)
        self._sum(
            ELEMENTS[logits.dtype],
            _rows(logits, index),
            None if temperature is None else temperature.data_ptr(),
            None if token_ids is None else token_ids.data_ptr(),
            norms.data_ptr(),
            None if higher is None else higher.data_ptr(),
        )
        return norms, higher

    def ranked(
        self, logits: Tensor, index: Tensor | None, temperature: Tensor | None, depth: int
    ) -> tuple[Tensor, Tensor]:
        count = len(logits if index is None else index)
        scores = torch.empty(count, depth, dtype=torch.float32)
        ids = torch.empty(count, depth, dtype=torch.int64)
        self._rank(
            ELEMENTS[logits.dtype],
            _rows(logits, index),
            None if temperature is None else temperature.data_ptr(),
            depth,
            ids.data_ptr(),
            scores.data_ptr(),
        )
        return scores, ids

    def mask(self, adjusted: Tensor, logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
        return mask_rows(adjusted, logits, rows, bits)


@cache
def load_sampling(instruction_set: str) -> CompiledSampling:
    """The kernels of an instruction set, once for all models."""
    return CompiledSampling(instruction_set)


def _rows(logits: Tensor, index: Tensor | None) -> ctypes._CArgObject:
    """Some rows of logits, by reference."""
    assert logits.stride(1) == 1
    num_rows, size = logits.shape
    if index is not None:
        num_rows = len(index)
    work = num_rows * size // _LOGITS_PER_THREAD
    return ctypes.byref(
        _Rows(
            logits.data_ptr(),
            logits.stride(0),
            None if index is None else index.data_ptr(),
            num_rows,
            size,
            max(min(torch.get_num_threads(), num_rows, work), 1),
        )
    )
