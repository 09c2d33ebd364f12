"""What the backends for CUDA have to do alike: compared with dense attention and the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_batches import (
    DenseOracle,
    attend,
    filled_cache,
    grouped_decodes,
    large_group,
    make_cache,
    random_decodes,
    random_heads,
    random_steps,
    random_world,
)
from checkpoints import VOCAB_SIZE
from graph_stand_ins import GraphRun, add_graphs
from oracle import assert_greedy, reference_generate
from rows import named
from worker_driver import Driver, Enter, generate, make_driver

from tokasaurus.model.backend.base import PrefixGroups, Rotation, SequenceRows
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.rounding import ceil_div

__all__ = [
    "check_empty_sequences",
    "check_first_member",
    "check_graph_leaves_groups",
    "check_graph_plan",
    "check_greedy_tokens",
    "check_large_group",
    "check_nested_groups",
    "check_prompts_and_decodes",
    "check_same_samples",
    "count_groups",
    "decode_in_graphs",
]


def check_prompts_and_decodes(backend, shapes, dtype, tolerance):
    """The cache is full of NaN where nothing was written.

    Args:
        backend: the class.
        shapes: numbers of heads, key heads, numbers of a head, and positions of a page.
        dtype: of the heads.
        tolerance: of the output.
    """
    for num_heads, num_kv_heads, head_dim, page_size in shapes:
        torch.manual_seed(0)
        num_pages = 3 * ceil_div(200, page_size)
        cache = make_cache(num_pages, page_size, num_kv_heads, head_dim, dtype)
        made, oracle = backend(cache, num_heads), DenseOracle()
        for rows in random_steps(np.random.default_rng(num_heads), 3, 4, page_size):
            parts = random_heads(len(rows.positions), num_heads, num_kv_heads, head_dim, dtype)
            expected = oracle.attend(rows, *parts)
            with named((dtype, num_heads, num_kv_heads, head_dim, page_size)):
                output = attend(made, rows, *parts).double()
                torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def check_nested_groups(backend, shapes, num_seeds, dtype, tolerance):
    """And the same batch without groups.

    Yields:
        Each backend, its batch with groups, and how many rows of it were grouped.
    """
    for seed in range(num_seeds):
        num_heads, num_kv_heads, head_dim, _ = shapes[seed % len(shapes)]
        page_size = (16, 20, 8)[seed % 3]
        plain, grouped, _ = random_world(np.random.default_rng(seed), page_size)
        torch.manual_seed(seed)
        cache = filled_cache(plain.page_table.numel(), page_size, num_kv_heads, head_dim, dtype)
        made = backend(cache, num_heads)
        parts = random_heads(len(plain.positions), num_heads, num_kv_heads, head_dim, dtype)
        with named((dtype, seed)):
            output = attend(made, grouped, *parts)
            num_grouped = sum(made.grouped_rows)
            reference = ReferenceBackend(cache, num_heads)
            expected = attend(reference, grouped, *parts)
            assert made.grouped_rows == reference.grouped_rows
            torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
            alone = attend(made, plain, *parts)
            assert sum(made.grouped_rows) == 0
            torch.testing.assert_close(alone, expected, atol=tolerance, rtol=tolerance)
        yield made, grouped, num_grouped


def check_large_group(backend, dtype, tolerance):
    """Returns the backend, and its batch with the group."""
    torch.manual_seed(1)
    made = backend(filled_cache(60, 16, 1, 64, dtype), 3)
    plain, grouped = large_group(40, 20, 16)
    parts = random_heads(40, 3, 1, 64, dtype)
    expected = attend(made, plain, *parts)
    with named(dtype):
        output = attend(made, grouped, *parts)
        assert made.grouped_rows.num_decodes == 40
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    return made, grouped


def check_first_member(backend):
    """Reading a group through another member's page table would show: its entries are broken."""
    plain, grouped = grouped_decodes(np.random.default_rng(3), 16)
    made = backend(filled_cache(9 * 8, 16, 1, 64), 2)
    parts = random_heads(9, 2, 1, 64, torch.float32)
    expected = attend(made, plain, *parts)
    broken = plain.page_table.clone()
    broken[plain.slots[3], 0] = broken[plain.slots[0], 0]
    output = attend(made, replace(plain, page_table=broken), *parts)
    assert (output[3] - expected[3]).abs().max() > 1e-3
    output = attend(made, replace(grouped, page_table=broken), *parts)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)


def check_empty_sequences(backend):
    """Sequences of no rows, and one of one position."""
    made = backend(make_cache(4, 16, 2, 64), 4)
    rows = SequenceRows(
        slots=np.array([2, 0, 1], np.int32),
        query_starts=np.array([0, 0, 1, 1], np.int32),
        kv_lengths=np.array([0, 1, 0], np.int32),
        positions=np.zeros(1, np.int32),
        page_table=torch.arange(4, dtype=torch.int32)[:, None],
    )
    parts = random_heads(1, 4, 2, 64, torch.float32)
    output = attend(made, rows, *parts)
    # With a single key the output is its value.
    torch.testing.assert_close(output, parts[2].repeat_interleave(2, dim=1))
    empty = np.zeros(0, np.int32)
    nothing = SequenceRows(empty, np.zeros(1, np.int32), empty, empty, rows.page_table)
    parts = random_heads(0, 4, 2, 64, torch.float32)
    assert attend(made, nothing, *parts).shape == (0, 4, 64)


def check_graph_plan(backend, num_heads, num_kv_heads, dtype, *, is_made_once):
    """A graph's plan attends as the plan of each batch does, and other rows write nothing.

    Args:
        backend: the class.
        num_heads: query heads.
        num_kv_heads: key heads.
        dtype: of the heads.
        is_made_once: attention is made as it is recorded; otherwise its planning is repeated, too.
    """
    num_columns, source = 20, np.random.default_rng(num_heads)
    torch.manual_seed(0)
    table = torch.randperm(8 * num_columns + 1).to(torch.int32)[1:].view(8, num_columns)
    shape = 8 * num_columns + 1, 16, num_kv_heads, 64, dtype
    one, other = filled_cache(*shape), make_cache(*shape)
    kept = list(zip(one.keys + one.values, other.keys + other.values, strict=True))
    for values, room in kept:
        room.copy_(values)
    plain, fixed = (backend(cache, num_heads) for cache in (one, other))
    graph = fixed.graph_plan(6, table, num_columns * 16)
    assert graph.fill(None)
    recorded = graph.attention()

    def attend_to(heads, rotation):
        attention = recorded if is_made_once else graph.attention()
        return attention.attend(0, heads, rotation, None)

    for step in range(6):
        rows = random_decodes(source, table)
        count = len(rows.slots)
        heads = torch.full((6, num_heads + 2 * num_kv_heads, 64), torch.nan, dtype=dtype)
        heads[:count].normal_()
        angles = torch.rand(6, 1, 32) * 6
        rotation = Rotation(angles.cos(), angles.sin())
        assert graph.fill(rows)
        output = attend_to(heads, rotation)
        exact = Rotation(*(each[:count] for each in rotation))
        expected = plain.plan(rows).attend(0, heads[:count], exact, None)
        with named((num_heads, step)):
            torch.testing.assert_close(output[:count], expected, rtol=1e-5, atol=1e-5)
            assert all(torch.equal(*pair) for pair in kept)
    assert graph.fill(None)
    attend_to(heads, rotation)
    assert all(torch.equal(*pair) for pair in kept)


def check_graph_leaves_groups(backend, dtype):
    """A batch with a group is not planned for a graph, but as usual."""
    made = backend(make_cache(160, 16, 1, 64, dtype), 4)
    table = torch.zeros(8, 20, dtype=torch.int32)
    graph = made.graph_plan(6, table, 320)
    lengths, zero = np.full(4, 100, np.int32), np.zeros(1, np.int32)
    rows = SequenceRows(
        np.arange(4, dtype=np.int32),
        np.arange(5, dtype=np.int32),
        lengths,
        lengths - 1,
        table,
        4,
        PrefixGroups(zero, zero + 4, zero, zero, zero, zero + 2),
    )
    assert not graph.fill(rows)
    made.plan(rows)
    assert made.grouped_rows.num_decodes == 4


def random_prompt(seed, num_tokens):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_tokens).tolist()


def check_greedy_tokens(checkpoint, attention):
    """A worker's are those of transformers, after chunked prefill and over shuffled pages."""
    prompt = random_prompt(0, 90)
    for architecture, (num_heads, num_kv_heads) in (("llama", (6, 2)), ("qwen3", (3, 1))):
        path = checkpoint(architecture, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64)
        ids, logprobs = generate(make_driver(path, attention=attention), prompt, 12, chunk=37)
        with named(architecture):
            assert_greedy(path, prompt, ids, logprobs)
            assert ids == reference_generate(path, prompt, 12)


def decode_in_graphs(path, new_graphs=None, *, has_graphs=True, **fields):
    """Sequences decode together in changing numbers, as graphs of two sizes.

    Returns:
        For each sequence its prompt, its tokens and their logprobs.
    """
    driver = make_driver(
        path,
        linear="plain",
        max_tokens_per_forward=64,
        max_seqs_per_forward=4,
        num_slots=4,
        **fields,
    )
    graphs = add_graphs(driver.worker, (2, 4), 256, new_graphs) if has_graphs else None
    driver.worker.warm_up()
    prompts = [random_prompt(seed, count) for seed, count in enumerate((60, 7, 33))]
    drawn = _decode_together(driver, prompts, graphs)
    return list(zip(prompts, *drawn, strict=True))


def _decode_together(driver: Driver, prompts: list[list[int]], graphs: GraphRun | None):
    tokens, logprobs = [[] for _ in prompts], [[] for _ in prompts]

    def keep(slots, result):
        for row, slot in enumerate(slots):
            tokens[slot].append(int(result.token_ids[row]))
            logprobs[slot].append(float(result.logprobs[row]))

    for slot, prompt in enumerate(prompts):
        driver.start(slot, num_logprobs=0)
        keep([slot], driver.step(prefill=[Enter(slot, prompt)]))
    for slots in ([0], [2, 0], [0, 1, 2], [1, 2], [1, 2, 0], [2, 1, 0]):
        keep(slots, driver.step(decode=slots))
    if graphs is not None:
        assert graphs.recorded == [4, 2]
        assert graphs.replayed == [2, 2, 4, 2, 4, 4]
    return tokens, logprobs


def count_groups(monkeypatch, backend):
    """A list that the grouped rows of each batch are added to."""
    grouped = []
    plan = backend.plan

    def counting(self, rows):
        attention = plan(self, rows)
        grouped.append(self.grouped_rows)
        return attention

    monkeypatch.setattr(backend, "plan", counting)
    return grouped


def check_same_samples(found, expected, grouped):
    """Samples of two engines, of which the first has read prefixes of decodes and prompts once."""
    assert sum(each.num_decodes > 0 for each in grouped) >= 3
    assert any(each.num_prefills for each in grouped)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, rel=1e-4)
