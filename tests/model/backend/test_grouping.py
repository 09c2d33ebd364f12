"""Which prefix groups the compiled backend uses, and the costs that decide it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokasaurus.model.backend.base import NO_GROUPS, BackendOptions, PrefixGroups, SequenceRows
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.backend.grouping import (
    ALWAYS,
    GroupCosts,
    GroupSize,
    KernelBlocks,
    choose_groups,
    fit_costs,
)
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.kv_cache import KVCache

CPU = torch.device("cpu")
PAGE_SIZE = 4
BLOCKS = KernelBlocks(num_rows=32, rows_without_layout=2)
COSTS = GroupCosts(saved_per_pair=2e-8, per_token=1e-7, per_row=1e-6, fixed=5e-6, blocks=BLOCKS)


def groups_of(*columns):
    return PrefixGroups(*(np.array(column, np.int32) for column in columns))


def batch_of(num_rows, groups):
    """Sequences of these numbers of rows; those of one row decode."""
    starts = np.append(0, np.cumsum(num_rows)).astype(np.int32)
    return SequenceRows(
        slots=np.arange(len(num_rows), dtype=np.int32),
        query_starts=starts,
        kv_lengths=np.full(len(num_rows), 1000, np.int32),
        positions=np.zeros(starts[-1], np.int32),
        page_table=torch.empty(0, dtype=torch.int32),
        num_decodes=num_rows.count(1),
        groups=groups,
    )


# Rows 1 to 6 share 2 pages; of these, rows 1 to 3 one more, and rows 4 to 6 five more.
NESTED = batch_of([1] * 8, groups_of([1, 1, 4], [6, 3, 3], [8] * 3, [0] * 3, [0, 2, 2], [2, 1, 5]))
# Two decodes and three chunks share 16 pages; of these, the last two chunks four more.
MIXED = batch_of([1, 1, 1, 5, 40, 3], groups_of([1, 3], [2, 0], [3, 4], [3, 2], [0, 16], [16, 4]))


def decodes(num_rows, num_tokens):
    return GroupSize(num_rows, num_tokens, num_rows, 0)


def test_every_group_is_taken_if_every_group_saves_time():
    chosen = choose_groups(NESTED, PAGE_SIZE, PAGE_SIZE, ALWAYS)
    assert chosen.first_rows.tolist() == [1, 1, 4]
    assert chosen.num_rows.tolist() == [6, 3, 3]
    assert chosen.begins.tolist() == [0, 8, 8]
    assert chosen.ends.tolist() == [8, 12, 28]
    assert chosen.own_starts.tolist() == [0, 12, 12, 12, 28, 28, 28, 0]
    assert chosen.grouped_rows(NESTED) == (6, 0)


def test_the_rows_of_a_group_are_its_decodes_and_all_rows_of_its_chunks():
    chosen = choose_groups(MIXED, PAGE_SIZE, PAGE_SIZE, ALWAYS)
    assert chosen.first_rows.tolist() == [1, 8]
    assert chosen.num_decodes.tolist() == [2, 0]
    assert chosen.first_chunk_rows.tolist() == [3, 8]
    assert chosen.num_rows.tolist() == [50, 43]
    assert chosen.begins.tolist() == [0, 64]
    assert chosen.ends.tolist() == [64, 80]
    assert chosen.own_starts.tolist() == [0, 64, 64, 64, 80, 80]
    assert chosen.grouped_rows(MIXED) == (2, 48)


def test_a_group_inside_one_that_is_not_taken_begins_where_that_one_began():
    longer_than_10_tokens = GroupCosts(1.0, 0.0, 10.0, 0.0, BLOCKS)
    chosen = choose_groups(NESTED, PAGE_SIZE, PAGE_SIZE, longer_than_10_tokens)
    assert chosen.begins.tolist() == [0, 0]
    assert chosen.ends.tolist() == [12, 28]
    assert chosen.own_starts.tolist() == [0, 12, 12, 12, 28, 28, 28, 0]


def test_a_row_reads_the_pages_of_a_group_that_is_not_taken_by_itself():
    more_than_4_rows = GroupCosts(1.0, 4.0, 0.0, 0.0, BLOCKS)
    chosen = choose_groups(NESTED, PAGE_SIZE, PAGE_SIZE, more_than_4_rows)
    assert chosen.ends.tolist() == [8]
    assert chosen.own_starts.tolist() == [0, 8, 8, 8, 8, 8, 8, 0]
    none = choose_groups(batch_of([1, 1], NO_GROUPS), PAGE_SIZE, PAGE_SIZE, ALWAYS)
    assert (none.own_starts.tolist(), none.grouped_rows(NESTED)) == ([0, 0], (0, 0))


def test_a_group_ends_at_a_multiple_of_the_kernels_step():
    chosen = choose_groups(NESTED, PAGE_SIZE, 16, ALWAYS)
    assert chosen.begins.tolist() == [0]
    assert chosen.ends.tolist() == [16]
    assert chosen.own_starts.tolist() == [0, 0, 0, 0, 16, 16, 16, 0]


def test_a_group_of_long_chunks_saves_only_the_blocks_that_it_fills_better():
    """A long chunk lays its keys out once for many rows, with a group or without."""
    layouts = GroupCosts(0.0, 1.0, 0.0, 0.5, BLOCKS)
    for num_rows, expected in (([64, 64], False), ([40, 40], True), ([20, 20], False)):
        batch = batch_of(num_rows, groups_of([0], [0], [0], [2], [0], [4]))
        is_taken = bool(len(choose_groups(batch, PAGE_SIZE, PAGE_SIZE, layouts).ends))
        assert is_taken is expected, num_rows


def test_costs_are_found_from_savings_that_follow_them():
    sizes = [decodes(rows, tokens) for rows in (2, 8, 32, 64) for tokens in (64, 192, 512)]
    sizes += [GroupSize(32, 64, 0, 4), GroupSize(128, 512, 0, 16)]
    found = fit_costs(sizes, np.array([COSTS.saved(size) for size in sizes]), BLOCKS)
    assert found[:4] == pytest.approx(COSTS[:4])
    assert found.blocks == BLOCKS


def test_no_cost_is_negative_whatever_was_measured():
    sizes = [decodes(rows, tokens) for rows in (2, 8, 32, 64) for tokens in (64, 192, 512)]
    sizes += [GroupSize(32, 64, 0, 4), GroupSize(128, 512, 0, 16)]
    for seed in range(20):
        measured = np.random.default_rng(seed).normal(size=len(sizes))
        costs = fit_costs(sizes, measured, BLOCKS)
        assert min(costs[:4]) >= 0, seed


def test_long_prefixes_of_many_rows_pay_and_short_ones_of_few_rows_do_not():
    assert COSTS.saved(decodes(32, 512)) > 0
    assert COSTS.saved(decodes(2, 512)) < 0
    assert COSTS.saved(decodes(32, 16)) < 0


def one_group():
    rows = SequenceRows(
        slots=np.arange(3, dtype=np.int32),
        query_starts=np.arange(4, dtype=np.int32),
        kv_lengths=np.full(3, 66, np.int32),
        positions=np.full(3, 65, np.int32),
        page_table=torch.tensor([[0, 1], [0, 2], [0, 3]], dtype=torch.int32),
        num_decodes=3,
        groups=groups_of([0], [3], [3], [0], [0], [1]),
    )
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=4,
        page_size=64,
        num_kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device=CPU,
    )
    return rows, cache


@pytest.mark.parametrize("backend_type", [ReferenceBackend, CompiledBackend])
def test_a_backend_counts_the_rows_that_it_groups(backend_type):
    rows, cache = one_group()
    for use_groups, expected in ((True, (3, 0)), (False, (0, 0)), (None, (0, 0))):
        backend = backend_type(cache, 2, BackendOptions("auto", use_groups))
        backend.plan(rows)
        assert backend.grouped_rows == expected, use_groups


def test_auto_groups_where_the_measured_costs_say_that_it_saves_time(monkeypatch):
    rows, cache = one_group()
    backend = CompiledBackend(cache, 2, BackendOptions("auto", None))
    for costs, expected in ((ALWAYS, (3, 0)), (COSTS, (0, 0))):
        monkeypatch.setattr(
            "tokasaurus.model.backend.cpu.compiled.measure_group_costs", lambda *_, c=costs: c
        )
        backend.calibrate(list)
        backend.plan(rows)
        assert backend.grouped_rows == expected


def test_a_calibration_measures_finite_costs_and_leaves_the_cache_alone():
    _, cache = one_group()
    for tensor in cache.keys + cache.values:
        tensor.fill_(7)
    backend = CompiledBackend(cache, 2, BackendOptions("auto", None))
    backend.calibrate(list)
    assert np.isfinite(backend._costs[:4]).all()
    assert all(tensor.eq(7).all() for tensor in cache.keys + cache.values)
