"""The room that a backend says it takes for attention is what it takes, over random batches."""

from __future__ import annotations

import numpy as np
from attention_batches import MAX_LENGTH, large_group, make_cache, random_steps, random_world

from tokasaurus.model.backend.base import BackendOptions
from tokasaurus.model.backend.cpu.compiled import CompiledBackend


def batches():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        yield from random_steps(rng, 4, 3, 16)
        yield from random_world(rng, 16)[:2]
    yield from large_group(70, 50, 16)
    # A single row that reads far: threads share its ranges.
    yield from large_group(1, 900, 16)[:1]


def test_the_compiled_backend_keeps_its_states_within_its_room():
    largest = 0
    for num_heads, num_kv_heads, head_dim in ((4, 2, 16), (5, 5, 20), (40, 1, 8)):
        cache = make_cache(64, 16, num_kv_heads, head_dim)
        backend = CompiledBackend(cache, num_heads, BackendOptions(use_groups=True))
        for rows in batches():
            longest = int(rows.kv_lengths.max())
            room = backend.workspace_bytes(len(rows.positions), longest)
            taken = 4 * backend.plan(rows)._plan.workspace_size
            assert taken <= room
            largest = max(largest, taken)
    assert largest > MAX_LENGTH, "no batch needs room"
