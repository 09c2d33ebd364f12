"""A row of attention gets the same bits whatever runs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rows import named

from tokasaurus.model.backend.base import BackendOptions, Rotation, SequenceRows
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.instruction_sets import usable_sets
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.rounding import ceil_div

SETS = [instructions.name for instructions in usable_sets()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = [(9, 3, 64), (6, 2, 24), (8, 1, 128), (2, 2, 80)]
# Around the ends of tiles and ranges.
LENGTHS = np.array([1, 63, 64, 65, 130, 513, 700])
CHUNKS = (0, 1, 1, 2, 5, 33, 100, 300)


@dataclass(frozen=True)
class Sequences:
    """Queries, keys and values, [rows, heads, head_dim], sequence by sequence."""

    lengths: np.ndarray
    tensors: tuple[torch.Tensor, ...]

    def one(self, number):
        start, end = np.append(0, np.cumsum(self.lengths))[number : number + 2]
        tensors = tuple(tensor[start:end] for tensor in self.tensors)
        return Sequences(self.lengths[number : number + 1], tensors)


def random_sequences(dtype, num_heads, num_kv_heads, head_dim):
    torch.manual_seed(head_dim)
    counts = (num_heads, num_kv_heads, num_kv_heads)
    tensors = (torch.randn(LENGTHS.sum(), count, head_dim).to(dtype) for count in counts)
    return Sequences(LENGTHS, tuple(tensors))


def page_table_of(lengths, page_size):
    """Each sequence has its own pages, in descending order."""
    num_columns = ceil_div(lengths, page_size)
    table = torch.zeros(len(lengths), num_columns.max(), dtype=torch.int32)
    for slot, end in enumerate(np.cumsum(num_columns)):
        columns = torch.arange(num_columns[slot], dtype=torch.int32)
        table[slot, : len(columns)] = end - 1 - columns
    return table


def attend(sequences, instruction_set, page_size, next_chunk):
    """Feeds all sequences side by side in chunks. ``next_chunk`` returns at most what is left."""
    query, key, value = sequences.tensors
    lengths = sequences.lengths
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=int(ceil_div(lengths, page_size).sum()),
        page_size=page_size,
        num_kv_heads=key.shape[1],
        head_dim=key.shape[2],
        dtype=key.dtype,
        device=torch.device("cpu"),
    )
    for tensor in cache.keys + cache.values:
        tensor.fill_(torch.nan)
    backend = CompiledBackend(cache, query.shape[1], BackendOptions(instruction_set))
    table = page_table_of(lengths, page_size)
    starts = np.cumsum(lengths) - lengths
    results = torch.empty_like(query)
    done = np.zeros_like(lengths)
    while (done < lengths).any():
        counts = np.array([next_chunk(left) for left in (lengths - done).tolist()])
        if not counts.any():
            continue
        slots = np.flatnonzero(counts)
        positions = [np.arange(done[slot], done[slot] + counts[slot]) for slot in slots]
        indices = np.concatenate(
            [starts[slot] + p for slot, p in zip(slots, positions, strict=True)]
        )
        done += counts
        rows = SequenceRows(
            slots=slots.astype(np.int32),
            query_starts=np.append(0, np.cumsum(counts[slots])).astype(np.int32),
            kv_lengths=done[slots].astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            page_table=table,
        )
        heads = torch.cat([tensor[indices] for tensor in (query, key, value)], dim=1)
        zero = torch.zeros(len(indices), 1, key.shape[2] // 2)
        mixed = backend.plan(rows).attend(0, heads, Rotation(zero + 1, zero), None)
        results[indices] = mixed.view(len(indices), *query.shape[1:])
    return results.split(lengths.tolist())


@pytest.mark.parametrize("instruction_set", SETS)
def test_a_row_gets_the_same_bits_whatever_runs_beside_it(instruction_set, monkeypatch):
    """Over chunks, neighbours, page sizes and numbers of threads."""
    for dtype in DTYPES:
        for shape in HEADS:
            sequences = random_sequences(dtype, *shape)
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
            alone = [
                attend(sequences.one(number), instruction_set, 16, lambda left: left)[0]
                for number in range(len(LENGTHS))
            ]
            for page_size, num_threads in ((1, 2), (7, 1), (16, 3), (64, 4)):
                monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
                rng = np.random.default_rng(page_size)
                beside = attend(
                    sequences,
                    instruction_set,
                    page_size,
                    lambda left, rng=rng: min(left, int(rng.choice(CHUNKS))),
                )
                for result, expected in zip(beside, alone, strict=True):
                    with named((dtype, shape, page_size, len(result))):
                        assert torch.equal(result, expected)
