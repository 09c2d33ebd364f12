"""The compiled paged-attention kernel: ``paged_attention.cpp`` through ctypes.

Owns the kernel's arguments and the blocks that a batch is cut into. ``reference.py`` defines the
result.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.backend.base import (
    DEFAULT_OPTIONS,
    BackendOptions,
    HeadNorms,
    Operators,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.cpu.build import BuildError, load_library
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS, norm_and_rotate
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["CompiledAttention", "CompiledBackend"]

_SOURCE = Path(__file__).with_name("paged_attention.cpp")
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Queries that share one pass over the keys: enough of them to use each key often, few enough to
# spread a short prompt over the cores.
_QUERIES_PER_BLOCK = 32

# Multiply-adds of one layer that justify one more thread; they take about 50 microseconds.
_WORK_PER_THREAD = 250_000


class _Arguments(ctypes.Structure):
    """Mirrors ``Arguments`` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("key_cache", "value_cache", "output")),
        *((name, ctypes.c_void_p) for name in ("page_table", "slots", "query_starts")),
        *((name, ctypes.c_void_p) for name in ("kv_lengths", "block_sequences", "block_rows")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        ("page_table_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_blocks", "rows_per_block")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("page_size", "element", "num_threads")),
    )


@cache
def _library(instruction_set: str) -> ctypes.CDLL:
    library = load_library(_SOURCE, instruction_set)
    library.tokasaurus_arguments_size.restype = ctypes.c_int64
    library.tokasaurus_paged_attention.argtypes = [ctypes.POINTER(_Arguments)]
    library.tokasaurus_paged_attention.restype = None
    if library.tokasaurus_arguments_size() != ctypes.sizeof(_Arguments):
        raise BuildError("the compiler lays out the kernel's arguments in an unexpected way")
    return library


class CompiledBackend:
    """Implements ``Backend``.

    Args:
        cache: on the processor, in fp32, bf16 or fp16.
        num_heads: query heads.

    Raises:
        BuildError: the kernel cannot be built on this machine.
    """

    name: ClassVar[str] = "compiled"

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        try:
            _library(options.instruction_set)
        except BuildError as error:
            return f"no kernel can be built: {error}; install g++"
        return None

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        return REFERENCE_OPERATORS

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None:
        self._kernel = _library(options.instruction_set).tokasaurus_paged_attention
        self._cache = cache
        self._num_heads = num_heads

    def plan(self, rows: SequenceRows) -> CompiledAttention:
        return CompiledAttention(self._kernel, self._cache, self._num_heads, rows)


class CompiledAttention:
    """Implements ``Attention`` for one batch. Keeps the arrays alive that the kernel points to."""

    def __init__(
        self, kernel: ctypes._NamedFuncPointer, cache: KVCache, num_heads: int, rows: SequenceRows
    ) -> None:
        self._kernel, self._cache, self._num_heads, self._rows = kernel, cache, num_heads, rows
        rows_per_block = max(_QUERIES_PER_BLOCK * cache.num_kv_heads // num_heads, 1)
        block_sequences, block_rows = self._blocks = _blocks(rows.query_starts, rows_per_block)
        num_keys = int(np.dot(np.diff(rows.query_starts), rows.kv_lengths.astype(np.int64)))
        work = 2 * num_keys * num_heads * cache.head_dim
        self._arguments = _Arguments(
            page_table=rows.page_table.data_ptr(),
            slots=rows.slots.ctypes.data,
            query_starts=rows.query_starts.ctypes.data,
            kv_lengths=rows.kv_lengths.ctypes.data,
            block_sequences=block_sequences.ctypes.data,
            block_rows=block_rows.ctypes.data,
            page_table_stride=rows.page_table.stride(0),
            num_blocks=len(block_rows),
            rows_per_block=rows_per_block,
            num_heads=num_heads,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            page_size=cache.page_size,
            element=_ELEMENTS[cache.dtype],
            num_threads=min(torch.get_num_threads(), 1 + work // _WORK_PER_THREAD),
        )

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        query, key, value = norm_and_rotate(
            heads, self._num_heads, self._cache.num_kv_heads, rotation, norms
        )
        output = torch.empty(query.shape, dtype=torch.float32)
        arguments = self._arguments
        arguments.query, arguments.query_stride = query.data_ptr(), query.stride(0)
        arguments.key, arguments.key_stride = key.data_ptr(), key.stride(0)
        arguments.value, arguments.value_stride = value.data_ptr(), value.stride(0)
        arguments.key_cache = self._cache.keys[layer].data_ptr()
        arguments.value_cache = self._cache.values[layer].data_ptr()
        arguments.output = output.data_ptr()
        self._kernel(ctypes.byref(arguments))
        return output.to(query.dtype).flatten(1)


def _blocks(query_starts: Int32Array, rows_per_block: int) -> tuple[Int32Array, Int32Array]:
    """Cuts each sequence's rows into blocks::

        query_starts [0, 1, 6], 2 rows per block:
        rows              0 │ 1 2 │ 3 4 │ 5
        block_sequences   0   1     1     1
        block_rows        0   1     3     5

    Returns:
        block_sequences: [blocks], the sequence of each.
        block_rows: [blocks], the first row of each.
    """
    counts = ceil_div(np.diff(query_starts), rows_per_block)
    sequences = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    firsts = np.cumsum(counts) - counts
    within = np.arange(len(sequences), dtype=np.int32) - firsts[sequences]
    rows = query_starts[sequences] + within * rows_per_block
    return sequences, rows.astype(np.int32)
