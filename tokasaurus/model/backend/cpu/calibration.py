"""Measures on this machine what prefix groups of a model's shape save."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from tokasaurus.model.backend.base import Backend, PrefixGroups, Rotation, SequenceRows
from tokasaurus.model.backend.cpu.grouping import GroupCosts, fit_costs

__all__ = ["PAGES", "PAGE_SIZE", "measure_group_costs"]

# The page size hardly matters to the costs.
PAGE_SIZE = 16
_ROWS = (2, 8, 32, 64)
_COLUMNS = (4, 12, 32)
PAGES = max(_COLUMNS) + max(_ROWS)  # each row has one page of its own
_ROUNDS = 3


def measure_group_costs(
    backend: Backend, num_all_heads: int, head_dim: int, dtype: torch.dtype, rows_per_block: int
) -> GroupCosts:
    """Times groups of several sizes, as groups and row by row.

    Args:
        backend: uses all groups. Its cache has one layer and PAGES pages of PAGE_SIZE, all written.
        num_all_heads: query, key and value heads.
        head_dim: of each.
        dtype: of the cache.
        rows_per_block: rows of a group for which keys are laid out once.
    """
    sizes = list(product(_ROWS, _COLUMNS))
    saved = np.empty(len(sizes))
    for index, (num_rows, num_columns) in enumerate(sizes):
        heads = torch.zeros(num_rows, num_all_heads, head_dim, dtype=dtype)
        plain = _batch(num_rows, num_columns)
        group = PrefixGroups(*(np.array([n], np.int32) for n in (0, num_rows, 0, num_columns)))
        grouped = replace(plain, groups=group)
        saved[index] = _seconds(backend, plain, heads) - _seconds(backend, grouped, heads)
    num_rows, num_columns = np.array(sizes, np.int32).T
    return fit_costs(num_rows, num_columns * np.int32(PAGE_SIZE), saved, rows_per_block)


def _batch(num_rows: int, num_columns: int) -> SequenceRows:
    """Decode rows that share these columns of the page table, and have one page behind them."""
    length = num_columns * PAGE_SIZE + PAGE_SIZE // 2
    table = torch.arange(num_columns + 1, dtype=torch.int32).repeat(num_rows, 1)
    table[:, -1] += torch.arange(num_rows, dtype=torch.int32)
    return SequenceRows(
        slots=np.arange(num_rows, dtype=np.int32),
        query_starts=np.arange(num_rows + 1, dtype=np.int32),
        kv_lengths=np.full(num_rows, length, np.int32),
        positions=np.full(num_rows, length - 1, np.int32),
        page_table=table,
        num_decodes=num_rows,
    )


def _seconds(backend: Backend, rows: SequenceRows, heads: torch.Tensor) -> float:
    half = torch.ones(len(heads), 1, heads.shape[2] // 2)
    attention = backend.plan(rows)
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        attention.attend(0, heads, Rotation(half, half), None)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
