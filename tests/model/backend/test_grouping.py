"""Which prefix groups the compiled backend uses, and the costs that decide it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokasaurus.model.backend.base import NO_GROUPS, BackendOptions, PrefixGroups, SequenceRows
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.backend.cpu.grouping import ALWAYS, GroupCosts, choose_groups, fit_costs
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.kv_cache import KVCache

CPU = torch.device("cpu")
PAGE_SIZE = 4
COSTS = GroupCosts(saved_per_pair=2e-8, per_token=1e-7, per_row=1e-6, fixed=5e-6, rows_per_block=32)


def groups_of(*columns):
    return PrefixGroups(*(np.array(column, np.int32) for column in columns))


# Rows 1 to 6 share 2 pages; of these, rows 1 to 3 one more, and rows 4 to 6 five more.
NESTED = groups_of([1, 1, 4], [6, 3, 3], [0, 2, 2], [2, 1, 5])


def test_every_group_is_taken_if_every_group_saves_time():
    chosen = choose_groups(NESTED, PAGE_SIZE, 8, ALWAYS.saved)
    assert chosen.first_rows.tolist() == [1, 1, 4]
    assert chosen.num_rows.tolist() == [6, 3, 3]
    assert chosen.begins.tolist() == [0, 8, 8]
    assert chosen.ends.tolist() == [8, 12, 28]
    assert chosen.own_starts.tolist() == [0, 12, 12, 12, 28, 28, 28, 0]
    assert chosen.num_grouped == 6


def test_a_group_inside_one_that_is_not_taken_begins_where_that_one_began():
    chosen = choose_groups(NESTED, PAGE_SIZE, 8, lambda rows, tokens: tokens - 10)
    assert chosen.begins.tolist() == [0, 0]
    assert chosen.ends.tolist() == [12, 28]
    assert chosen.own_starts.tolist() == [0, 12, 12, 12, 28, 28, 28, 0]


def test_a_row_reads_the_pages_of_a_group_that_is_not_taken_by_itself():
    chosen = choose_groups(NESTED, PAGE_SIZE, 8, lambda rows, tokens: rows - 3)
    assert chosen.ends.tolist() == [8]
    assert chosen.own_starts.tolist() == [0, 8, 8, 8, 8, 8, 8, 0]
    none = choose_groups(NO_GROUPS, PAGE_SIZE, 2, ALWAYS.saved)
    assert (none.own_starts.tolist(), none.num_grouped) == ([0, 0], 0)


def test_costs_are_found_from_savings_that_follow_them():
    rows = np.repeat(np.array([2, 8, 32, 64], np.int32), 3)
    tokens = np.tile(np.array([64, 192, 512], np.int32), 4)
    saved = np.array([COSTS.saved(r, t) for r, t in zip(rows, tokens, strict=True)])
    found = fit_costs(rows, tokens, saved, 32)
    assert found == pytest.approx(COSTS)


def test_long_prefixes_of_many_rows_pay_and_short_ones_of_few_rows_do_not():
    assert COSTS.saved(32, 512) > 0
    assert COSTS.saved(2, 512) < 0
    assert COSTS.saved(32, 16) < 0


def one_group():
    rows = SequenceRows(
        slots=np.arange(3, dtype=np.int32),
        query_starts=np.arange(4, dtype=np.int32),
        kv_lengths=np.full(3, 6, np.int32),
        positions=np.full(3, 5, np.int32),
        page_table=torch.tensor([[0, 1], [0, 2], [0, 3]], dtype=torch.int32),
        num_decodes=3,
        groups=groups_of([0], [3], [0], [1]),
    )
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=4,
        page_size=PAGE_SIZE,
        num_kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device=CPU,
    )
    return rows, cache


@pytest.mark.parametrize("backend_type", [ReferenceBackend, CompiledBackend])
def test_a_backend_counts_the_rows_that_it_groups(backend_type):
    rows, cache = one_group()
    for use_groups, expected in ((True, 3), (False, 0), (None, 0)):
        backend = backend_type(cache, 2, BackendOptions("auto", use_groups))
        backend.plan(rows)
        assert backend.num_grouped_rows == expected, use_groups


def test_auto_groups_where_the_measured_costs_say_that_it_saves_time(monkeypatch):
    rows, cache = one_group()
    backend = CompiledBackend(cache, 2, BackendOptions("auto", None))
    for costs, expected in ((ALWAYS, 3), (COSTS, 0)):
        monkeypatch.setattr(
            "tokasaurus.model.backend.cpu.compiled.measure_group_costs", lambda *_, c=costs: c
        )
        backend.calibrate()
        backend.plan(rows)
        assert backend.num_grouped_rows == expected


def test_a_calibration_measures_finite_costs_and_leaves_the_cache_alone():
    _, cache = one_group()
    for tensor in cache.keys + cache.values:
        tensor.fill_(7)
    backend = CompiledBackend(cache, 2, BackendOptions("auto", None))
    backend.calibrate()
    assert np.isfinite(backend._costs).all()
    assert all(tensor.eq(7).all() for tensor in cache.keys + cache.values)
