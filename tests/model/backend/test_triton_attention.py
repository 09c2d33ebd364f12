"""Attention in Triton, interpreted, against dense attention in float64 and against the reference.

The interpreter computes in fp32 and fp16. Its bf16 is wrong, so no test here is in bf16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_batches import (
    DenseOracle,
    add_prefill,
    attend,
    filled_cache,
    grouped_decodes,
    large_group,
    make_cache,
    random_heads,
)
from attention_checks import (
    check_empty_sequences,
    check_first_member,
    check_large_group,
    check_nested_groups,
    check_prompts_and_decodes,
)
from rows import named

from tokasaurus.errors import ConfigError
from tokasaurus.model.backend import choose_backend
from tokasaurus.model.backend.base import BackendOptions, HeadNorms, Rotation, SequenceRows
from tokasaurus.model.backend.grouping import ALWAYS, choose_groups
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.triton import planning
from tokasaurus.model.backend.triton.backend import TritonAttention, TritonBackend, is_interpreted
from tokasaurus.model.backend.triton.device_plan import send_plan
from tokasaurus.rounding import ceil_div

pytestmark = pytest.mark.triton

TOLERANCES = [(torch.float32, 2e-5), (torch.float16, 0.003)]
SHAPES = [  # num_heads, num_kv_heads, head_dim, page_size
    (1, 1, 64, 16),
    (4, 2, 128, 16),
    (3, 1, 80, 7),
    (8, 2, 64, 64),
    (5, 1, 96, 1),
    (6, 1, 72, 16),
    (14, 2, 64, 16),
    (8, 1, 112, 33),
    (40, 1, 8, 16),
    (2, 2, 6, 16),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Cuts ranges of few positions, too, so that small batches have partial results."""
    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    monkeypatch.setattr(planning, "SHORTEST_TASK", 64)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["fp32", "fp16"])
def test_prompts_and_decodes_match_dense_attention(dtype, tolerance):
    check_prompts_and_decodes(TritonBackend, SHAPES, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["fp32", "fp16"])
def test_random_nested_groups_match_the_reference(dtype, tolerance):
    checked = check_nested_groups(TritonBackend, SHAPES, 6, dtype, tolerance)
    assert sum(count for _, _, count in checked) > 30


def test_a_group_reads_its_prefix_through_its_first_member():
    check_first_member(TritonBackend)


def test_groups_that_save_no_bytes_are_not_taken():
    """Partial results of a row, with 8 query heads and one key head, are as much as 16 positions.

    Of 70 rows, whose heads fill 18 tiles, 52 save what they would have read.
    """
    _, grouped = large_group(70, 50, 16)
    backend = TritonBackend(make_cache(120, 16, 1, 64), 8, BackendOptions(use_groups=None))
    for num_rows, num_columns, is_taken in (
        (70, 1, False),
        (70, 2, True),
        (2, 2, False),
        (2, 50, True),
    ):
        rows, columns = (np.array([count], np.int32) for count in (num_rows, num_columns))
        groups = replace(grouped.groups, num_decodes=rows, num_columns=columns)
        backend.plan(replace(grouped, groups=groups))
        with named((num_rows, num_columns)):
            assert backend.grouped_rows.num_decodes == (num_rows if is_taken else 0)


def test_a_large_group_is_cut_and_changes_no_result():
    for dtype, tolerance in TOLERANCES:
        check_large_group(TritonBackend, dtype, tolerance)


def test_a_long_context_is_cut_and_merged():
    """A prompt of several blocks, then a single row, whose context is in many parts."""
    for dtype, tolerance in TOLERANCES:
        torch.manual_seed(0)
        length, page_size = 700, 16
        cache = make_cache(ceil_div(length + 1, page_size), page_size, 1, 64, dtype)
        backend, oracle = TritonBackend(cache, 2), DenseOracle()
        table = torch.arange(cache.num_pages, dtype=torch.int32)[None]
        for start, count in ((0, length - 100), (length - 100, 100), (length, 1)):
            rows = SequenceRows(
                slots=np.zeros(1, np.int32),
                query_starts=np.array([0, count], np.int32),
                kv_lengths=np.array([start + count], np.int32),
                positions=np.arange(start, start + count, dtype=np.int32),
                page_table=table,
            )
            parts = random_heads(count, 2, 1, 64, dtype)
            expected = oracle.attend(rows, *parts)
            with named((dtype, start)):
                output = attend(backend, rows, *parts).double()
                torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def test_a_plan_may_be_filled_up():
    """As a graph of kernels needs it, whose grids and numbers of rows are fixed."""
    rows = add_prefill(grouped_decodes(np.random.default_rng(0), 16)[1], 40)
    num_rows, more = len(rows.positions), 7
    caches = [filled_cache(100, 16, 2, 64) for _ in range(2)]
    for one, other in zip(
        caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True
    ):
        other.copy_(one)
    heads = torch.randn(num_rows + more, 8, 64)
    heads[num_rows:] = torch.nan
    angles = torch.rand(num_rows + more, 1, 32)
    backends = [TritonBackend(cache, 4) for cache in caches]
    exact = Rotation(angles[:num_rows].cos(), angles[:num_rows].sin())
    expected = backends[0].plan(rows).attend(0, heads[:num_rows], exact, None)

    groups = choose_groups(rows, 16, 1, ALWAYS)
    plan = planning.plan_tasks(rows, groups, backends[1]._tiles)
    assert len(plan.merged_rows)
    assert len(plan.many_tasks)
    zeros = np.zeros((more, planning.TASK_SIZE), np.int32)
    unmerged = np.flatnonzero(np.diff(plan.partial_starts) == 0)[:1].astype(np.int32)
    assert len(unmerged)
    filled = planning.Plan(
        row_slots=np.append(plan.row_slots, zeros[:, 0]),
        row_positions=np.append(plan.row_positions, zeros[:, 0] - 1),
        partial_starts=np.append(plan.partial_starts, zeros[:, 0] + plan.num_partials),
        merged_rows=np.append(plan.merged_rows, np.repeat(unmerged, more)),
        few_tasks=np.concatenate((plan.few_tasks, zeros)),
        many_tasks=np.concatenate((plan.many_tasks, zeros)),
    )
    attention = TritonAttention(
        caches[1], backends[1]._shape, send_plan(filled, rows.page_table.device), rows.page_table
    )
    output = attention.attend(0, heads, Rotation(angles.cos(), angles.sin()), None)
    assert torch.equal(output[:num_rows], expected)
    for one, other in zip(
        caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True
    ):
        assert torch.equal(one, other)


def test_sequences_of_no_rows_and_of_one_position_pass():
    check_empty_sequences(TritonBackend)


def test_large_scores_do_not_overflow():
    cache = make_cache(4, 16, 1, 16)
    rows = SequenceRows(
        np.array([0], np.int32),
        np.array([0, 40], np.int32),
        np.array([40], np.int32),
        np.arange(40, dtype=np.int32),
        torch.arange(4, dtype=torch.int32).view(1, 4),
    )
    torch.manual_seed(0)
    query, key = torch.randint(-3, 4, (2, 40, 1, 16)) * 100.0
    parts = query, key, torch.randn(40, 1, 16)
    output = attend(TritonBackend(cache, 1), rows, *parts)
    expected = DenseOracle().attend(rows, *parts)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_heads_are_normed_rotated_and_stored_as_the_reference_does():
    """In fp16, too, where it rounds several times. Only this layer is written."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2 * 2.0**-10)):
        for num_heads, num_kv_heads, head_dim, page_size in SHAPES[1::2]:
            plain, _ = grouped_decodes(np.random.default_rng(0), page_size)
            rows = add_prefill(plain, 5)
            num_rows = len(rows.positions)
            torch.manual_seed(0)
            angles = torch.rand(num_rows, 1, head_dim // 2) * 6
            rotation = Rotation(angles.cos(), angles.sin())
            wide = torch.randn(num_rows, num_heads + 2 * num_kv_heads + 3, head_dim).to(dtype)
            # A part of something wider, as a fused product may give it.
            heads = wide[:, 3:]
            weights = (torch.rand(2, head_dim) + 0.5).to(dtype)
            for norms in (None, HeadNorms(*weights, 1e-5)):
                caches, outputs = [], []
                for backend in (TritonBackend, ReferenceBackend):
                    shape = 10 * 8, page_size, num_kv_heads, head_dim, dtype
                    cache = make_cache(*shape, num_layers=2)
                    for tensor in cache.keys + cache.values:
                        tensor.zero_()
                    plan = backend(cache, num_heads).plan(rows)
                    outputs.append(plan.attend(1, heads, rotation, norms))
                    caches.append(cache)
                with named((dtype, num_heads, head_dim, norms is not None)):
                    one, other = caches
                    assert not one.keys[0].any()
                    assert not one.values[0].any()
                    assert torch.equal(one.values[1], other.values[1])
                    torch.testing.assert_close(
                        one.keys[1], other.keys[1], atol=tolerance, rtol=tolerance
                    )
                    is_written = other.keys[1] != 0
                    differs = (one.keys[1] != other.keys[1])[is_written]
                    assert differs.float().mean() < (0.9 if dtype == torch.float32 else 0.02)
                    torch.testing.assert_close(*outputs, atol=2 * tolerance, rtol=2 * tolerance)


def test_the_interpreter_is_taken_if_it_is_asked_for():
    cpu = torch.device("cpu")
    assert choose_backend("triton", cpu) is TritonBackend
    assert choose_backend("auto", cpu) is not TritonBackend


def test_without_the_interpreter_triton_runs_on_cuda_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="attention=triton does not run on device=cpu: set"):
        choose_backend("triton", torch.device("cpu"))
