"""Batches for attention backends over shuffled pages, and dense attention in float64 as oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tokasaurus.model.backend.base import PrefixGroups, Rotation, SequenceRows
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.rounding import ceil_div

__all__ = [
    "CPU",
    "HEADS",
    "MAX_LENGTH",
    "DenseOracle",
    "add_prefill",
    "attend",
    "filled_cache",
    "grouped_decodes",
    "large_group",
    "make_cache",
    "random_decodes",
    "random_heads",
    "random_steps",
    "random_world",
]

CPU = torch.device("cpu")

MAX_LENGTH = 200


def make_cache(
    num_pages,
    page_size,
    num_kv_heads,
    head_dim,
    dtype=torch.float32,
    num_layers=1,
    device="cpu",
    kept_dtype=None,
):
    """A cache full of NaN, as uninitialised memory may be, so that reading too far shows."""
    cache = KVCache.allocate(
        num_layers=num_layers,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device(device),
        kept_dtype=kept_dtype,
    )
    for tensor in cache.keys + cache.values:
        tensor.fill_(torch.nan)
    return cache


def filled_cache(*arguments, **options):
    """A cache of random numbers; the arguments are those of ``make_cache``."""
    cache = make_cache(*arguments, **options)
    for tensor in cache.keys + cache.values:
        tensor.normal_()
    return cache


def random_heads(num_rows, num_heads, num_kv_heads, head_dim, dtype):
    """Queries, keys and values, [rows, heads, head_dim] each."""
    heads = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)


def attend(backend, rows, query, key, value, layer=0):
    """Attention without norms or rotation, [rows, heads, head_dim]."""
    zero = torch.zeros(len(query), 1, query.shape[2] // 2)
    heads = torch.cat((query, key, value), dim=1)
    output = backend.plan(rows).attend(layer, heads, Rotation(zero + 1, zero), None)
    assert output.is_contiguous()
    assert output.dtype == query.dtype
    return output.view(query.shape)


class DenseOracle:
    """Keeps each sequence's keys and values in a row; attends in float64."""

    def __init__(self):
        self.keys, self.values = {}, {}

    def attend(self, rows, query, key, value):
        output = torch.empty(query.shape, dtype=torch.float64)
        for index, slot in enumerate(rows.slots.tolist()):
            start, end = rows.query_starts[index : index + 2].tolist()
            for kept, new in ((self.keys, key), (self.values, value)):
                before = kept.get(slot, torch.empty(0, *new.shape[1:], dtype=torch.float64))
                kept[slot] = torch.cat((before, new[start:end].double()))
            group = query.shape[1] // key.shape[1]
            keys = self.keys[slot].repeat_interleave(group, 1)
            values = self.values[slot].repeat_interleave(group, 1)
            for row in range(start, end):
                seen = int(rows.positions[row]) + 1
                scores = torch.einsum("hd,khd->hk", query[row].double(), keys[:seen])
                shares = (scores / query.shape[2] ** 0.5).softmax(-1)
                output[row] = torch.einsum("hk,khd->hd", shares, values[:seen])
        return output


def random_steps(rng, num_sequences, num_steps, page_size):
    """Batches that mix chunks of prompts with decode rows, over shuffled pages."""
    columns = ceil_div(MAX_LENGTH, page_size)
    pages = rng.permutation(num_sequences * columns).astype(np.int32)
    page_table = torch.from_numpy(pages.reshape(num_sequences, columns))
    lengths = np.zeros(num_sequences, np.int32)
    for _ in range(num_steps):
        slots = rng.permutation(num_sequences)[: rng.integers(1, num_sequences + 1)].astype(
            np.int32
        )
        counts = np.where(rng.random(len(slots)) < 0.5, 1, rng.integers(1, 45, len(slots)))
        counts = np.minimum(counts, MAX_LENGTH - lengths[slots]).astype(np.int32)
        slots, counts = slots[counts > 0], counts[counts > 0]
        if not len(slots):
            continue
        lengths[slots] += counts
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        positions = np.concatenate(
            [np.arange(lengths[s] - n, lengths[s]) for s, n in zip(slots, counts, strict=True)]
        ).astype(np.int32)
        yield SequenceRows(slots, starts, lengths[slots], positions, page_table)


def random_decodes(rng, page_table, page_size=16):
    """One to six decodes of random lengths, over a page table of 8 slots."""
    count = int(rng.integers(1, 7))
    lengths = rng.integers(1, page_table.shape[1] * page_size + 1, count).astype(np.int32)
    return SequenceRows(
        slots=rng.permutation(8)[:count].astype(np.int32),
        query_starts=np.arange(count + 1, dtype=np.int32),
        kv_lengths=lengths,
        positions=lengths - 1,
        page_table=page_table,
        num_decodes=count,
    )


HEADS = [  # num_heads, num_kv_heads, head_dim
    (4, 2, 16),
    (3, 1, 32),
    (9, 3, 64),
    (5, 5, 80),
    (8, 1, 128),
    (2, 2, 20),
    (6, 2, 6),
    (40, 1, 8),
]


def groups_of_decodes(first_rows, num_rows, first_columns, num_columns):
    no_chunks = np.zeros_like(first_rows)
    return PrefixGroups(first_rows, num_rows, no_chunks, no_chunks, first_columns, num_columns)


def grouped_decodes(rng, page_size):
    """Decode rows over one page table, with groups and without: the same pages either way.

    Rows 0 and 1 share nothing. Rows 2 to 8 share two pages; of these, rows 4 to 8 three more, and
    rows 6 to 8 another one.
    """
    first_rows, num_rows = np.array([2, 4, 6], np.int32), np.array([7, 5, 3], np.int32)
    first_columns, num_columns = np.array([0, 2, 5], np.int32), np.array([2, 3, 1], np.int32)
    num_sequences, num_pages = 9, 9 * 8
    pages = rng.permutation(num_pages).astype(np.int32).reshape(num_sequences, 8)
    shared = np.zeros(num_sequences, np.int32)
    for row, count, column, width in zip(
        first_rows, num_rows, first_columns, num_columns, strict=True
    ):
        pages[row : row + count, column : column + width] = pages[row, column : column + width]
        shared[row : row + count] = column + width
    lengths = (shared * page_size + rng.integers(1, 2 * page_size, num_sequences)).astype(np.int32)
    slots = rng.permutation(num_sequences).astype(np.int32)
    page_table = np.empty_like(pages)
    page_table[slots] = pages
    rows = SequenceRows(
        slots=slots,
        query_starts=np.arange(num_sequences + 1, dtype=np.int32),
        kv_lengths=lengths,
        positions=lengths - 1,
        page_table=torch.from_numpy(page_table),
        num_decodes=num_sequences,
    )
    groups = groups_of_decodes(first_rows, num_rows, first_columns, num_columns)
    return rows, replace(rows, groups=groups)


def add_prefill(rows, num_rows):
    """The same batch with a chunk of a prompt behind the decode rows, in pages of its own."""
    num_slots, num_columns = rows.page_table.shape
    own = torch.arange(num_columns, dtype=torch.int32) + num_slots * num_columns
    return replace(
        rows,
        slots=np.append(rows.slots, np.int32(num_slots)),
        query_starts=np.append(rows.query_starts, np.int32(rows.query_starts[-1] + num_rows)),
        kv_lengths=np.append(rows.kv_lengths, np.int32(num_rows)),
        positions=np.append(rows.positions, np.arange(num_rows, dtype=np.int32)),
        page_table=torch.cat((rows.page_table, own[None])),
    )


def nested_groups(rng, decodes, chunks, column=0, depth=0):
    """Groups of random parts of two ranges of sequences, outer ones first: ranges and columns."""
    if len(decodes) + len(chunks) < 2 or depth == 3:
        return []
    end = column + int(rng.integers(1, 4))
    groups = [(decodes, chunks, column, end)] if rng.random() < 0.8 else []
    column = end if groups else column
    cuts = (int(rng.integers(0, len(each) + 1)) for each in (decodes, chunks))
    decode_cut, chunk_cut = cuts
    for parts in (
        (decodes[:decode_cut], chunks[:chunk_cut]),
        (decodes[decode_cut:], chunks[chunk_cut:]),
    ):
        groups += nested_groups(rng, *parts, column, depth + 1)
    return groups


def random_world(rng, page_size):
    """A batch of decodes and chunks over shared pages, with its groups and without."""
    num_decodes, num_chunks = int(rng.integers(0, 9)), int(rng.integers(0, 7))
    num_decodes += num_decodes + num_chunks == 0
    count = num_decodes + num_chunks
    found = nested_groups(
        rng, range(rng.integers(0, num_decodes + 1), num_decodes), range(num_decodes, count)
    )
    pages = rng.permutation(count * 15).astype(np.int32).reshape(count, 15)
    shared = np.zeros(count, np.int32)
    for decodes, chunks, column, end in found:
        members = [*decodes, *chunks]
        pages[members, column:end] = pages[members[0], column:end]
        shared[members] = end
    counts = np.where(np.arange(count) < num_decodes, 1, rng.integers(1, 5 * page_size, count))
    counts = np.minimum(counts, 45)
    assert (shared < 15).all()
    firsts = shared * page_size + rng.integers(0, page_size, count)
    slots = rng.permutation(count).astype(np.int32)
    page_table = np.empty_like(pages)
    page_table[slots] = pages
    columns = [
        (decodes.start, len(decodes), chunks.start, len(chunks), column, end - column)
        for decodes, chunks, column, end in found
    ]
    rows = SequenceRows(
        slots=slots,
        query_starts=np.append(0, np.cumsum(counts)).astype(np.int32),
        kv_lengths=(firsts + counts).astype(np.int32),
        positions=np.concatenate(
            [np.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]
        ).astype(np.int32),
        page_table=torch.from_numpy(page_table),
        num_decodes=num_decodes,
    )
    groups = PrefixGroups(*np.array(columns, np.int32).reshape(-1, 6).T.copy())
    return rows, replace(rows, groups=groups), shared * page_size


def large_group(num_rows, num_columns, page_size):
    """Rows that share so many pages that the group is cut into blocks of rows and positions."""
    shared = np.tile(np.arange(num_columns, dtype=np.int32), (num_rows, 1))
    own = num_columns + np.arange(num_rows, dtype=np.int32)[:, None]
    lengths = num_columns * page_size + 1 + np.arange(num_rows, dtype=np.int32) % page_size
    rows = SequenceRows(
        slots=np.arange(num_rows, dtype=np.int32),
        query_starts=np.arange(num_rows + 1, dtype=np.int32),
        kv_lengths=lengths,
        positions=lengths - 1,
        page_table=torch.from_numpy(np.concatenate((shared, own), axis=1)),
        num_decodes=num_rows,
    )
    group = (np.array([number], np.int32) for number in (0, num_rows, 0, num_columns))
    return rows, replace(rows, groups=groups_of_decodes(*group))
