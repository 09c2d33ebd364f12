"""Measures on this machine what prefix groups of a model's shape save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from tokasaurus.model.backend.base import Backend, PrefixGroups, Rotation, SequenceRows
from tokasaurus.model.backend.grouping import (
    GroupCosts,
    GroupSize,
    KernelBlocks,
    fit_costs,
)
from tokasaurus.rounding import ceil_div

__all__ = ["PAGES", "PAGE_SIZE", "measure_group_costs"]

# The page size hardly matters to the costs.
PAGE_SIZE = 16
# Sequences, and rows of each: those that decode have one.
_DECODES = ((2, 1), (8, 1), (32, 1), (64, 1))
_CHUNKS = ((16, 4), (16, 8))
_COLUMNS = (4, 12, 32)
PAGES = max(_COLUMNS) + 64  # each sequence has one page of its own
_ROUNDS = 5


class _Case(NamedTuple):
    """A batch that is one group."""

    num_sequences: int
    num_rows: int  # of each
    num_columns: int  # of the prefix

    def grouped(self, rows: SequenceRows) -> SequenceRows:
        num_decodes = self.num_sequences if self.num_rows == 1 else 0
        numbers = (0, num_decodes, 0, self.num_sequences - num_decodes, 0, self.num_columns)
        groups = PrefixGroups(*(np.array([number], np.int32) for number in numbers))
        return replace(rows, groups=groups)

    def size(self, blocks: KernelBlocks) -> GroupSize:
        is_direct = self.num_rows <= blocks.rows_without_layout
        num_rows = self.num_sequences * self.num_rows
        own_blocks = self.num_sequences * ceil_div(self.num_rows, blocks.num_rows)
        return GroupSize(
            num_rows=num_rows,
            num_tokens=self.num_columns * PAGE_SIZE,
            num_direct_rows=num_rows if is_direct else 0,
            num_own_blocks=0 if is_direct else own_blocks,
        )


def measure_group_costs(
    backend: Backend, num_all_heads: int, head_dim: int, dtype: torch.dtype, blocks: KernelBlocks
) -> GroupCosts:
    """Times groups of several sizes, as groups and row by row.

    Args:
        backend: uses all groups. Its cache has one layer and PAGES pages of PAGE_SIZE, all written.
        num_all_heads: query, key and value heads.
        head_dim: of each.
        dtype: of the cache.
        blocks: of the kernel.
    """
    kinds = product(_DECODES + _CHUNKS, _COLUMNS)
    cases = [_Case(count, num_rows, num_columns) for (count, num_rows), num_columns in kinds]
    saved = np.empty(len(cases))
    for index, case in enumerate(cases):
        plain = _batch(case)
        heads = torch.zeros(len(plain.positions), num_all_heads, head_dim, dtype=dtype)
        plain_s, grouped_s = _seconds(backend, (plain, case.grouped(plain)), heads)
        saved[index] = plain_s - grouped_s
    return fit_costs([case.size(blocks) for case in cases], saved, blocks)


def _batch(case: _Case) -> SequenceRows:
    """Sequences that share columns of the page table, and have one page behind them."""
    num_sequences, num_rows, num_columns = case
    length = num_columns * PAGE_SIZE + PAGE_SIZE // 2
    table = torch.arange(num_columns + 1, dtype=torch.int32).repeat(num_sequences, 1)
    table[:, -1] += torch.arange(num_sequences, dtype=torch.int32)
    positions = np.arange(length - num_rows, length, dtype=np.int32)
    return SequenceRows(
        slots=np.arange(num_sequences, dtype=np.int32),
        query_starts=np.arange(num_sequences + 1, dtype=np.int32) * np.int32(num_rows),
        kv_lengths=np.full(num_sequences, length, np.int32),
        positions=np.tile(positions, num_sequences),
        page_table=table,
    )


def _seconds(backend: Backend, batches: Sequence[SequenceRows], heads: torch.Tensor) -> list[float]:
    """The shortest time of each batch. They take turns, so that other work disturbs all alike."""
    half = torch.ones(len(heads), 1, heads.shape[2] // 2, dtype=torch.float32)
    rotation = Rotation(half, half)
    seconds = [math.inf] * len(batches)
    for _ in range(_ROUNDS):
        for index, rows in enumerate(batches):
            attention = backend.plan(rows)
            started = time.perf_counter()
            attention.attend(0, heads, rotation, None)
            seconds[index] = min(seconds[index], time.perf_counter() - started)
    return seconds
