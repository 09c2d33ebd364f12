"""A backend in plain torch, for any device: every other backend's oracle and fallback.

It gathers the pages of one sequence after the other. This defines what paged attention means; it is
not fast.

Where sequences share a prefix, it reads the prefix once for all their rows, and merges what each
row gets there with what it gets from its sequence's own pages (Juravsky et al. 2024, Hydragen,
https://arxiv.org/abs/2402.05099)::

    columns        0    1    2    3
    sequence 0     a    b    c    .      own pages: a b c
    sequence 1     d    e    f    g      group of sequences 1-3: d; own pages: e f g
    sequence 2     d    h    i    .      group of sequences 2-3: h; own pages: i
    sequence 3     d    h    j    k
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.backend.base import (
    DEFAULT_OPTIONS,
    NO_GROUPED_ROWS,
    NO_GROUPS,
    BackendOptions,
    GroupedRows,
    HeadNorms,
    ModelHeads,
    Operators,
    PrefixGroups,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS, norm_and_rotate
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.upload import upload_indices
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["ReferenceAttention", "ReferenceBackend"]


class ReferenceBackend:
    """Implements ``Backend``."""

    name: ClassVar[str] = "reference"
    is_independent_of_batch: ClassVar[bool] = False

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None:
        self._cache, self._num_heads = cache, num_heads
        # It is not fast either way, so it does not measure which is faster.
        self._uses_groups = bool(options.use_groups)
        self.grouped_rows = NO_GROUPED_ROWS

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        return None

    @classmethod
    def why_not_model(cls, heads: ModelHeads) -> str | None:
        return None

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        return REFERENCE_OPERATORS

    @classmethod
    def sampling(cls, options: BackendOptions) -> None:
        return None

    def calibrate(self, shared: Callable[[Sequence[float]], list[float]]) -> None:
        """Does nothing."""

    def workspace_bytes(self, num_rows: int, longest: int) -> int:
        cache = self._cache
        # Keys and values of a sequence are gathered, and widened. Each row of each query head has a
        # mask in bytes, and another one in fp32, if all rows are of this sequence.
        positions = 2 * cache.num_kv_heads * cache.head_dim * (cache.heads_dtype.itemsize + 4)
        group = ceil_div(self._num_heads, cache.num_kv_heads)
        return longest * (positions + num_rows * group * 5)

    def plan(self, rows: SequenceRows) -> ReferenceAttention:
        if not self._uses_groups:
            rows = replace(rows, groups=NO_GROUPS)
        counts = np.where(_own_columns(rows) > 0, np.diff(rows.query_starts), 0)
        num_decodes = rows.num_decodes
        self.grouped_rows = GroupedRows(
            int(counts[:num_decodes].sum()), int(counts[num_decodes:].sum())
        )
        return ReferenceAttention(self._cache, self._num_heads, rows)

    def graph_plan(self, num_rows: int, page_table: Tensor, max_tokens: int) -> None:
        """There is none: how often its loops turn follows from the batch."""


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
        self._own_columns: list[int] = _own_columns(rows).tolist()

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        query, key, value = norm_and_rotate(
            heads, self._num_heads, self._cache.num_kv_heads, rotation, norms
        )
        cache = self._cache
        keys, values = cache.raw(cache.keys[layer]), cache.raw(cache.values[layer])
        keys[self._pages, :, self._offsets] = cache.rounded(key)
        values[self._pages, :, self._offsets] = cache.rounded(value)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        shared = self._attend_to_prefixes(query, keys, values)
        for sequence, (start, end) in enumerate(self._row_ranges):
            column = self._own_columns[sequence]
            pages = self._page_rows[sequence, column:]
            length = self._lengths[sequence] - column * self._cache.page_size
            own = query[start:end], *(self._gather(kept, pages, length) for kept in (keys, values))
            if column:
                partials = [*shared[sequence], _attend_partly(*own, is_causal=True)]
                output[start:end] = _merged(partials).to(query.dtype)
            else:
                output[start:end] = _attend_sequence(*own)
        return output.flatten(1)

    def _attend_to_prefixes(
        self, query: Tensor, keys: Tensor, values: Tensor
    ) -> list[list[_Partial]]:
        """For each sequence, the attention of its rows to the prefix of each of its groups."""
        partials: list[list[_Partial]] = [[] for _ in self._row_ranges]
        for members, first, end in _each_group(self._groups):
            ranges = [range(*self._row_ranges[member]) for member in members]
            rows = list(itertools.chain(*ranges))
            pages = self._page_rows[members[0], first:end]
            length = (end - first) * self._cache.page_size
            whole = _attend_partly(
                query[rows],
                self._gather(keys, pages, length),
                self._gather(values, pages, length),
                is_causal=False,
            )
            at = 0
            for member, own in zip(members, ranges, strict=True):
                part = slice(at, at + len(own))
                partials[member].append(_Partial(whole.mixed[part], whole.lse[part]))
                at += len(own)
        return partials

    def _gather(self, raw: Tensor, pages: Tensor, length: int) -> Tensor:
        """One sequence's positions, [kv_heads, length, head_dim], without unwritten memory."""
        used = raw[pages[: ceil_div(length, self._cache.page_size)]]
        return self._cache.widened(used.transpose(0, 1).flatten(1, 2)[:, :length])


class _Partial(NamedTuple):
    """Attention of rows to some of their positions.

    Attributes:
        mixed: [rows, heads, head_dim] in fp32.
        lse: [rows, heads], the logarithm of the sum of exponentiated scores.
    """

    mixed: Tensor
    lse: Tensor


def _merged(partials: list[_Partial]) -> Tensor:
    """Attention to all positions of the parts together, [rows, heads, head_dim]."""
    shares = torch.stack([each.lse for each in partials]).softmax(0)
    return (torch.stack([each.mixed for each in partials]) * shares[..., None]).sum(0)


def _each_group(groups: PrefixGroups) -> Iterator[tuple[list[int], int, int]]:
    """The sequences of each group, its first column, and the column behind its last."""
    columns = (
        groups.first_decodes,
        groups.num_decodes,
        groups.first_chunks,
        groups.num_chunks,
        groups.first_columns,
        groups.num_columns,
    )
    for decode, num_decodes, chunk, num_chunks, column, num_columns in zip(
        *(each.tolist() for each in columns), strict=True
    ):
        members = [*range(decode, decode + num_decodes), *range(chunk, chunk + num_chunks)]
        yield members, column, column + num_columns


def _own_columns(rows: SequenceRows) -> Int32Array:
    """For each sequence, the first column of the page table that no group covers."""
    columns = np.zeros(len(rows.slots), np.int32)
    for members, _, end in _each_group(rows.groups):
        columns[members] = end  # a group inside another comes later
    return columns


def _attend_partly(query: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool) -> _Partial:
    """Attention to some positions.

    Args:
        query: [rows, heads, head_dim].
        keys: [kv_heads, length, head_dim].
        values: of the same shape.
        is_causal: the rows are the last positions, in order. Otherwise each sees all positions.
    """
    (num_rows, num_heads, head_dim), (num_kv_heads, length, _) = query.shape, keys.shape
    grouped = query.float().view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("rkgd,kld->rkgl", grouped, keys.float()) * head_dim**-0.5
    if is_causal:
        visible = torch.ones(num_rows, length, dtype=torch.bool, device=query.device)
        visible = visible.tril(length - num_rows)
        scores.masked_fill_(~visible[:, None, None], -torch.inf)
    mixed = torch.einsum("rkgl,kld->rkgd", scores.softmax(-1), values.float())
    return _Partial(mixed.reshape(num_rows, num_heads, head_dim), scores.logsumexp(-1).flatten(1))


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
