"""Pooling over random batches, against the mean and the last row of each whole prompt."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import torch
from rows import named
from sampling_driver import sent

from tokasaurus.model.worker.pooling import Pooler
from tokasaurus.protocol.messages import Pooling

HIDDEN = 5


def batch(chunks, num_decodes, entering):
    """A batch of chunks (slot, start, length, ends, kind)."""
    columns = [np.array(column, np.int32) for column in zip(*chunks, strict=True)] or [[]] * 5
    slots, starts, lengths, ends, kinds = columns
    return SimpleNamespace(
        parameters=SimpleNamespace(slots=np.array(entering, np.int32)) if entering else None,
        decode_slots=np.arange(100, 100 + num_decodes, dtype=np.int32),
        prefill_slots=slots,
        prefill_starts=starts,
        prefill_lengths=lengths,
        prefill_next_ids=np.where(ends, -1, 7).astype(np.int32),
        prefill_pooling=kinds if np.any(kinds) else None,
    )


def mean_row_by_row(states):
    """The mean in one order of additions, however the states come."""
    total = torch.zeros(HIDDEN)
    for row in states:
        total = total + row
    return total / len(states)


def check_random_batches(seed):
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    pooler = Pooler()
    # By slot: [kind, states, position].
    feeding = {}
    for _ in range(40):
        for slot in [slot for slot in feeding if chance.random() < 0.1]:
            # It is aborted.
            del feeding[slot]
        entering = [slot for slot in range(6) if slot not in feeding and chance.random() < 0.5]
        for slot in entering:
            states = torch.randn(chance.randint(1, 12), HIDDEN, generator=generator)
            feeding[slot] = [chance.choice([0, Pooling.MEAN, Pooling.LAST]), states, 0]
        chunks, rows, expected = [], [], []
        num_decodes = chance.randint(0, 3)
        for slot in chance.sample(sorted(feeding), len(feeding)):
            if slot not in entering and chance.random() < 0.3:
                continue
            kind, states, start = feeding[slot]
            end = min(len(states), start + chance.randint(1, 6))
            chunks.append((slot, start, end - start, end == len(states), int(kind)))
            rows.append(states[start:end])
            feeding[slot][2] = end
            if end == len(states):
                del feeding[slot]
                if kind:
                    expected.append(mean_row_by_row(states) if kind == Pooling.MEAN else states[-1])
        if not chunks:
            continue
        hidden = torch.cat([torch.randn(num_decodes, HIDDEN, generator=generator), *rows])
        plan = sent(pooler.plan, batch(chunks, num_decodes, entering))
        assert (plan is None) == (not any(chunk[-1] for chunk in chunks))
        if plan is not None:
            found = pooler.pool(plan, hidden)
            wanted = torch.stack(expected) if expected else torch.empty(0, HIDDEN)
            assert torch.equal(found, wanted)
    assert len(pooler._sums) <= 6


def test_chunks_among_decode_rows_pool_like_whole_prompts():
    """Only some prompts are pooled. Some vanish half-way, and others reuse their slots.

    Chunks change no bit.
    """
    for seed in range(20):
        with named(seed):
            check_random_batches(seed)
