"""Graphs of decodes with Triton's kernels, interpreted: fixed grids, rows without a sequence."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from attention_batches import make_cache
from checkpoints import VOCAB_SIZE
from graph_stand_ins import add_graphs, launch_recorded
from oracle import assert_greedy
from rows import named
from worker_driver import Enter, make_driver

from tokasaurus.model.backend.base import PrefixGroups, Rotation, SequenceRows
from tokasaurus.model.backend.triton import planning
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted

pytestmark = pytest.mark.triton

COLUMNS = 20


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    monkeypatch.setattr(planning, "SHORTEST_TASK", 64)


def decodes(source, page_table):
    count = source.integers(1, 7)
    lengths = source.integers(1, COLUMNS * 16 + 1, count).astype(np.int32)
    return SequenceRows(
        slots=source.permutation(8)[:count].astype(np.int32),
        query_starts=np.arange(count + 1, dtype=np.int32),
        kv_lengths=lengths,
        positions=lengths - 1,
        page_table=page_table,
        num_decodes=int(count),
    )


def test_a_plan_of_a_graph_attends_as_the_plan_of_each_batch_does():
    """Pages without a sequence hold NaN, and stay what they are."""
    for num_heads, num_kv_heads in ((4, 1), (2, 2)):
        source = np.random.default_rng(num_heads)
        torch.manual_seed(0)
        pages = torch.randperm(8 * COLUMNS + 1).to(torch.int32)[1:].view(8, COLUMNS)
        caches = [make_cache(8 * COLUMNS + 1, 16, num_kv_heads, 64) for _ in range(2)]
        for one, other in zip(caches[0].keys, caches[1].keys, strict=True):
            other.copy_(one.normal_())
        for one, other in zip(caches[0].values, caches[1].values, strict=True):
            other.copy_(one.normal_())
        plain, fixed = (TritonBackend(cache, num_heads) for cache in caches)
        plan = fixed.graph_plan(6, pages, 1 << 20)
        for step in range(5):
            rows = decodes(source, pages)
            count = len(rows.slots)
            heads = torch.full((6, num_heads + 2 * num_kv_heads, 64), torch.nan)
            heads[:count].normal_()
            angles = torch.rand(6, 1, 32)
            assert plan.fill(rows)
            output = plan.attention().attend(0, heads, Rotation(angles.cos(), angles.sin()), None)
            exact = Rotation(angles[:count].cos(), angles[:count].sin())
            expected = plain.plan(rows).attend(0, heads[:count], exact, None)
            with named((num_heads, step)):
                torch.testing.assert_close(output[:count], expected, rtol=1e-5, atol=1e-5)
                assert torch.equal(caches[0].keys[0], caches[1].keys[0])
                assert torch.equal(caches[0].values[0], caches[1].values[0])
        assert plan.fill(None)
        plan.attention().attend(0, heads, Rotation(angles.cos(), angles.sin()), None)
        assert torch.equal(caches[0].keys[0], caches[1].keys[0])


def test_a_batch_with_a_group_is_not_planned_for_a_graph():
    cache = make_cache(8 * COLUMNS, 16, 1, 64)
    pages = torch.zeros(8, COLUMNS, dtype=torch.int32)
    backend = TritonBackend(cache, 4)
    plan = backend.graph_plan(6, pages, 1 << 20)
    lengths = np.full(4, 100, np.int32)
    zero = np.zeros(1, np.int32)
    rows = SequenceRows(
        np.arange(4, dtype=np.int32),
        np.arange(5, dtype=np.int32),
        lengths,
        lengths - 1,
        pages,
        4,
        PrefixGroups(zero, zero + 4, zero, zero, zero, zero + 2),
    )
    assert not plan.fill(rows)
    backend.plan(rows)
    assert backend.grouped_rows.num_decodes == 4


def test_recorded_kernels_give_the_tokens_of_transformers(checkpoint, monkeypatch):
    """Of sequences that decode together in changing numbers, as graphs of two sizes."""
    from triton.runtime import interpreter

    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", launch_recorded(interpreter.GridExecutor.__call__)
    )
    path = checkpoint("qwen3", num_heads=4, num_kv_heads=2, head_dim=64)
    driver = make_driver(
        path,
        attention="triton",
        linear="plain",
        max_tokens_per_forward=64,
        max_seqs_per_forward=4,
        num_slots=4,
    )
    graphs = add_graphs(driver.worker, (2, 4))
    driver.worker.warm_up()
    source = random.Random(0)
    prompts = [[source.randrange(VOCAB_SIZE) for _ in range(n)] for n in (60, 7, 33)]
    tokens, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    for slot, prompt in enumerate(prompts):
        driver.start(slot, num_logprobs=0)
        result = driver.step(prefill=[Enter(slot, prompt)])
        tokens[slot].append(int(result.token_ids[0]))
        logprobs[slot].append(float(result.logprobs[0]))
    for slots in ([0], [2, 0], [0, 1, 2], [1, 2], [1, 2, 0], [2, 1, 0]):
        result = driver.step(decode=slots)
        for row, slot in enumerate(slots):
            tokens[slot].append(int(result.token_ids[row]))
            logprobs[slot].append(float(result.logprobs[row]))
    assert graphs.recorded == [4, 2]
    assert graphs.replayed == [2, 2, 4, 2, 4, 4]
    for prompt, *drawn in zip(prompts, tokens, logprobs, strict=True):
        assert_greedy(path, prompt, *drawn)
