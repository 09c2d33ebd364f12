"""Paged attention in plain torch, on any device: every other backend's oracle and fallback.

It gathers the pages of one sequence after the other. This defines what paged attention means; it is
not fast.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.backend.base import SequenceRows
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.upload import upload_indices
from tokasaurus.rounding import ceil_div

__all__ = ["ReferenceAttention", "ReferenceBackend"]


class ReferenceBackend:
    """Implements ``Backend``."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def plan(self, rows: SequenceRows) -> ReferenceAttention:
        return ReferenceAttention(self._cache, rows)


class ReferenceAttention:
    """Implements ``Attention`` for one batch."""

    def __init__(self, cache: KVCache, rows: SequenceRows) -> None:
        self._cache = cache
        device = rows.page_table.device
        self._row_ranges = list(itertools.pairwise(rows.query_starts.tolist()))
        self._lengths = rows.kv_lengths.tolist()
        self._page_rows = rows.page_table[upload_indices(rows.slots, device)].long()
        # The place of each row's key and value.
        counts = upload_indices(np.diff(rows.query_starts), device)
        sequence = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        positions = upload_indices(rows.positions, device)
        self._pages = self._page_rows[sequence, positions // cache.page_size]
        self._offsets = positions % cache.page_size

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._pages, :, self._offsets] = key
        values[self._pages, :, self._offsets] = value
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for (start, end), length, pages in zip(
            self._row_ranges, self._lengths, self._page_rows, strict=True
        ):
            output[start:end] = _attend_sequence(
                query[start:end],
                _gather(keys, pages, length),
                _gather(values, pages, length),
            )
        return output


def _gather(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """One sequence's positions, [kv_heads, length, head_dim], without unwritten memory."""
    page_size = cache.shape[2]
    used = cache[pages[: ceil_div(length, page_size)]]
    return used.transpose(0, 1).flatten(1, 2)[:, :length]


def _attend_sequence(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last rows of one sequence, in fp32.

    Args:
        query: [rows, heads, head_dim].
        keys: [kv_heads, length, head_dim].
        values: of the same shape.

    Returns:
        [rows, heads, head_dim].
    """
    (num_rows, num_heads, head_dim), (num_kv_heads, length, _) = query.shape, keys.shape
    group = num_heads // num_kv_heads
    # Query heads that share a key head become rows of it: [kv_heads, rows * group, head_dim].
    grouped = query.view(num_rows, num_kv_heads, group, head_dim).transpose(0, 1).flatten(1, 2)
    visible = torch.ones(num_rows, length, dtype=torch.bool, device=query.device)
    visible = visible.tril(length - num_rows).repeat_interleave(group, dim=0)
    mixed = F.scaled_dot_product_attention(
        grouped[None].float(), keys[None].float(), values[None].float(), attn_mask=visible
    )[0]
    mixed = mixed.view(num_kv_heads, num_rows, group, head_dim).transpose(0, 1)
    return mixed.reshape(num_rows, num_heads, head_dim).to(query.dtype)
