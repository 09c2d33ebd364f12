"""A backend in plain torch, for any device: every other backend's oracle and fallback.

It gathers the pages of one sequence after the other. This defines what paged attention means; it is
not fast.

Where decode rows share a prefix, it reads the prefix once for all of them, and merges what each row
gets there with what it gets from its own pages (Juravsky et al. 2024, Hydragen,
https://arxiv.org/abs/2402.05099)::

    columns      0    1    2    3
    row 0        a    b    c    .      own pages: c
    row 1        d    e    f    g      group of rows 1-3: d; own pages: e f g
    row 2        d    h    i    .      group of rows 2-3: h; own pages: i
    row 3        d    h    j    k
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.backend.base import (
    DEFAULT_OPTIONS,
    NO_GROUPS,
    BackendOptions,
    HeadNorms,
    Operators,
    PrefixGroups,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS, norm_and_rotate
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.upload import upload_indices
from tokasaurus.rounding import ceil_div

__all__ = ["ReferenceAttention", "ReferenceBackend"]


class ReferenceBackend:
    """Implements ``Backend``."""

    name: ClassVar[str] = "reference"

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None:
        self._cache, self._num_heads = cache, num_heads
        # It is not fast either way, so it does not measure which is faster.
        self._uses_groups = bool(options.use_groups)
        self.num_grouped_rows = 0

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        return None

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        return REFERENCE_OPERATORS

    @classmethod
    def sampling(cls, options: BackendOptions) -> None:
        return None

    def calibrate(self) -> None:
        """Does nothing."""

    def plan(self, rows: SequenceRows) -> ReferenceAttention:
        if not self._uses_groups:
            rows = replace(rows, groups=NO_GROUPS)
        own_columns = _own_columns(rows.groups, rows.num_decodes)
        self.num_grouped_rows = sum(column > 0 for column in own_columns)
        return ReferenceAttention(self._cache, self._num_heads, rows)


class ReferenceAttention:
    """Implements ``Attention`` for one batch."""

    def __init__(self, cache: KVCache, num_heads: int, rows: SequenceRows) -> None:
        self._cache, self._num_heads = cache, num_heads
        device = rows.page_table.device
        self._row_ranges = list(itertools.pairwise(rows.query_starts.tolist()))
        self._lengths = rows.kv_lengths.tolist()
        self._page_rows = rows.page_table[upload_indices(rows.slots, device)].long()
        # The place of each row's key and value.
        counts = np.diff(rows.query_starts)
        sequence = upload_indices(np.repeat(np.arange(len(counts)), counts), device)
        positions = upload_indices(rows.positions, device)
        self._pages = self._page_rows[sequence, positions // cache.page_size]
        self._offsets = positions % cache.page_size
        self._groups = rows.groups
        self._own_columns = _own_columns(rows.groups, rows.num_decodes)

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        query, key, value = norm_and_rotate(
            heads, self._num_heads, self._cache.num_kv_heads, rotation, norms
        )
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._pages, :, self._offsets] = key
        values[self._pages, :, self._offsets] = value
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        num_grouped = 0
        if len(self._groups):
            num_grouped = len(self._own_columns)
            output[:num_grouped] = self._attend_in_groups(query[:num_grouped], keys, values)
        for (start, end), length, pages in itertools.islice(
            zip(self._row_ranges, self._lengths, self._page_rows, strict=True), num_grouped, None
        ):
            output[start:end] = _attend_sequence(
                query[start:end],
                _gather(keys, pages, length),
                _gather(values, pages, length),
            )
        return output.flatten(1)

    def _attend_in_groups(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the decode rows, [rows, heads, head_dim]."""
        page_size = self._cache.page_size
        partials: list[list[_Partial]] = [[] for _ in self._own_columns]
        groups = self._groups
        for first, count, column, num_columns in zip(
            groups.first_rows.tolist(),
            groups.num_rows.tolist(),
            groups.first_columns.tolist(),
            groups.num_columns.tolist(),
            strict=True,
        ):
            shared = self._page_rows[first, column : column + num_columns]
            length = num_columns * page_size
            whole = _attend_to_all(
                query[first : first + count],
                _gather(keys, shared, length),
                _gather(values, shared, length),
            )
            for row in range(count):
                partials[first + row].append(whole.row(row))
        for row, column in enumerate(self._own_columns):
            own = self._page_rows[row, column:]
            length = self._lengths[row] - column * page_size
            whole = _attend_to_all(
                query[row : row + 1],
                _gather(keys, own, length),
                _gather(values, own, length),
            )
            partials[row].append(whole.row(0))
        return torch.stack([_merged(each) for each in partials]).to(query.dtype)


class _Partial(NamedTuple):
    """Attention to some of a row's positions.

    Attributes:
        mixed: [..., heads, head_dim] in fp32.
        lse: [..., heads], the logarithm of the sum of exponentiated scores.
    """

    mixed: Tensor
    lse: Tensor

    def row(self, index: int) -> _Partial:
        return _Partial(self.mixed[index], self.lse[index])


def _merged(partials: list[_Partial]) -> Tensor:
    """Attention to all positions of the parts together, [heads, head_dim]."""
    shares = torch.stack([each.lse for each in partials]).softmax(0)
    return (torch.stack([each.mixed for each in partials]) * shares[..., None]).sum(0)


def _own_columns(groups: PrefixGroups, num_decodes: int) -> list[int]:
    """For each decode row, the first column of the page table that no group covers."""
    columns = np.zeros(num_decodes, np.int32)
    ends = groups.first_columns + groups.num_columns
    for first, count, end in zip(groups.first_rows, groups.num_rows, ends, strict=True):
        columns[first : first + count] = end  # a group inside another comes later
    own: list[int] = columns.tolist()
    return own


def _attend_to_all(query: Tensor, keys: Tensor, values: Tensor) -> _Partial:
    """Attention of rows that all see all positions.

    Args:
        query: [rows, heads, head_dim].
        keys: [kv_heads, length, head_dim].
        values: of the same shape.
    """
    (num_rows, num_heads, head_dim), num_kv_heads = query.shape, len(keys)
    grouped = query.float().view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("rkgd,kld->rkgl", grouped, keys.float()) * head_dim**-0.5
    mixed = torch.einsum("rkgl,kld->rkgd", scores.softmax(-1), values.float())
    return _Partial(mixed.reshape(num_rows, num_heads, head_dim), scores.logsumexp(-1).flatten(1))


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
