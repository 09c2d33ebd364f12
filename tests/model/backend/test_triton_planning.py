"""The plan of a batch: each row meets each of its positions once, and partial results have room."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_batches import large_group, random_steps, random_world

from tokasaurus.model.backend.base import NO_GROUPS, SequenceRows
from tokasaurus.model.backend.grouping import ALWAYS, NEVER, choose_groups
from tokasaurus.model.backend.triton import planning
from tokasaurus.model.backend.triton.device_plan import plan_decodes, plan_without_groups
from tokasaurus.model.backend.triton.planning import Tiles, most_partials, plan_tasks

ROOMY = Tiles(few_rows=4, many_rows=16, num_programs=1)
TIGHT = Tiles(few_rows=1, many_rows=3, num_programs=64)


@pytest.fixture(autouse=True)
def short_tasks(monkeypatch):
    """Cuts ranges of few positions, too."""
    monkeypatch.setattr(planning, "SHORTEST_TASK", 16)
    monkeypatch.setattr(planning, "STEP", 16)


def rows_of(task):
    first, num_firsts, second, num_rows = task[3:7]
    return [*range(first, first + num_firsts), *range(second, second + num_rows - num_firsts)]


def check_plan(rows, page_size, tiles, costs=ALWAYS):
    """Every row sees its own positions through its own pages, and no partial result twice."""
    groups = choose_groups(rows, page_size, 1, costs)
    return check_tasks(plan_tasks(rows, groups, tiles), rows, page_size, tiles)


def check_tasks(plan, rows, page_size, tiles):
    table = rows.page_table.numpy()
    num_rows = len(rows.positions)
    seen = [[] for _ in range(num_rows)]
    places = [[] for _ in range(num_rows)]
    slots = np.repeat(rows.slots, np.diff(rows.query_starts))
    assert plan.row_slots.tolist() == slots.tolist()
    assert plan.row_positions.tolist() == rows.positions.tolist()
    for tasks, most in ((plan.few_tasks, tiles.few_rows), (plan.many_tasks, tiles.many_rows)):
        assert tasks.dtype == np.int32
        for task in tasks.tolist():
            slot, begin, end = task[:3]
            assert 0 < task[6] <= most
            assert 0 <= task[4] <= task[6]
            assert begin < end <= rows.positions[rows_of(task)].max() + 1
            columns = np.arange(begin, end) // page_size
            for row in rows_of(task):
                assert (table[slot, columns] == table[slots[row], columns]).all()
                seen[row] += [n for n in range(begin, end) if n <= rows.positions[row]]
                places[row].append(task[7])
    counts = np.diff(plan.partial_starts)
    for row in range(num_rows):
        assert sorted(seen[row]) == list(range(rows.positions[row] + 1))
        assert sorted(places[row]) == list(range(len(places[row])))
        assert counts[row] == (len(places[row]) if len(places[row]) > 1 else 0)
    assert plan.merged_rows.tolist() == np.flatnonzero(counts).tolist()
    assert plan.num_partials == counts.sum()
    # Each group that a row is in, beyond the first, may add one.
    depth = max((len(groups_of(rows, row)) for row in range(num_rows)), default=0)
    assert plan.num_partials <= most_partials(num_rows, tiles) + max(depth - 1, 0) * num_rows
    return plan


def groups_of(rows, row):
    """The groups whose sequences include this row's."""
    sequence = int(np.searchsorted(rows.query_starts, row, side="right")) - 1
    each, groups = np.arange(len(rows.groups)), rows.groups
    decodes = sequence - groups.first_decodes
    chunks = sequence - groups.first_chunks
    is_in = (decodes >= 0) & (decodes < groups.num_decodes)
    is_in |= (chunks >= 0) & (chunks < groups.num_chunks)
    return each[is_in]


@pytest.mark.parametrize("tiles", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_every_row_meets_each_of_its_positions_once(tiles):
    for page_size in (1, 7, 16):
        for seed in range(5):
            for rows in random_steps(np.random.default_rng(seed), 4, 4, page_size):
                check_plan(rows, page_size, tiles)


@pytest.mark.parametrize("tiles", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_rows_of_nested_groups_meet_each_position_once(tiles):
    num_merged = 0
    for seed in range(40):
        page_size = (4, 16, 40)[seed % 3]
        plain, grouped, shared = random_world(np.random.default_rng(seed), page_size)
        plan = check_plan(grouped, page_size, tiles)
        is_shared = np.repeat(shared > 0, np.diff(plain.query_starts))
        assert (np.diff(plan.partial_starts)[is_shared] > 1).all()
        num_merged += len(plan.merged_rows)
        check_plan(grouped, page_size, tiles, NEVER)
    assert num_merged > 100


def test_a_group_inside_one_that_is_not_taken_begins_earlier(monkeypatch):
    """As ``choose_groups`` says. Here each second group is not worth its while."""
    taken = []
    for seed in range(40):
        _, grouped, _ = random_world(np.random.default_rng(seed), 16)
        answers = iter([True, False] * 20)
        monkeypatch.setattr(type(ALWAYS), "saved", lambda *_, of=answers: 1.0 if next(of) else -1.0)
        check_plan(grouped, 16, ROOMY)
        taken.append(len(grouped.groups))
    assert max(taken) > 2


def test_the_prefix_of_a_group_is_read_by_few_tasks():
    plain, grouped = large_group(70, 50, 16)
    alone = check_plan(plain, 16, ROOMY)
    together = check_plan(grouped, 16, ROOMY)

    def positions(plan):
        tasks = np.concatenate((plan.few_tasks, plan.many_tasks))
        return int((tasks[:, 2] - tasks[:, 1]).sum())

    assert positions(alone) > 70 * 800
    assert positions(together) <= 5 * 800 + 70 * 16


def test_the_number_of_tasks_has_a_bound_that_lengths_do_not_change():
    """A graph of kernels needs it: one task for each block of rows, and those that keep busy."""
    for length in (1, 100, 5000, 100_000):
        lengths = np.array([length, 7, 300], np.int32)
        rows = SequenceRows(
            slots=np.arange(3, dtype=np.int32),
            query_starts=np.arange(4, dtype=np.int32),
            kv_lengths=lengths,
            positions=lengths - 1,
            page_table=torch.zeros(3, 1, dtype=torch.int32),
            num_decodes=3,
        )
        groups = choose_groups(rows, 16, 1, NEVER)
        plan = plan_tasks(rows, groups, Tiles(4, 16, num_programs=50))
        assert len(plan.few_tasks) <= 3 + 50
        assert (length < 5000) == (len(plan.few_tasks) < 30)


def test_the_room_for_partial_results_is_needed():
    """Two for each row of a group; and one for each part of a long range."""
    _, grouped = large_group(70, 400, 16)
    groups = choose_groups(grouped, 16, 1, ALWAYS)
    plan = plan_tasks(grouped, groups, ROOMY)
    assert plan.num_partials == 2 * 70
    long = np.full(1, 100_000, np.int32)
    rows = SequenceRows(
        np.zeros(1, np.int32),
        np.array([0, 1], np.int32),
        long,
        long - 1,
        torch.zeros(1, 1, dtype=torch.int32),
        num_decodes=1,
    )
    plan = plan_tasks(rows, choose_groups(rows, 16, 1, NEVER), TIGHT)
    assert plan.num_partials > 50


def decodes(lengths):
    count = len(lengths)
    return SequenceRows(
        slots=np.arange(count, dtype=np.int32)[::-1].copy(),
        query_starts=np.arange(count + 1, dtype=np.int32),
        kv_lengths=lengths,
        positions=lengths - 1,
        page_table=torch.zeros(count, 1, dtype=torch.int32),
        num_decodes=count,
    )


def test_the_device_plans_decodes_as_the_host_does():
    """Rows of length 0 have no sequence: between others, and behind them, as a graph has them."""
    num_cut = 0
    for seed in range(60):
        source = np.random.default_rng(seed)
        count, longest = source.integers(1, 40), 10 ** source.integers(1, 5)
        lengths = source.integers(1, longest + 1, count).astype(np.int32)
        lengths[source.random(count) < 0.2 * (seed % 3)] = 0
        tiles = Tiles(4, 16, int(source.integers(1, 90)))
        rows = decodes(lengths)
        found = plan_decodes(torch.from_numpy(rows.slots), torch.from_numpy(lengths), tiles)
        there = np.flatnonzero(lengths)
        some = decodes(lengths[there])
        expected = plan_tasks(some, choose_groups(some, 16, 1, NEVER), tiles)
        tasks = expected.few_tasks
        # Where the rows without a sequence were left out, slots and numbers of rows differ.
        tasks[:, 0] = rows.slots[there][tasks[:, 3]]
        tasks[:, [3, 5]] = there[tasks[:, [3, 5]]]
        assert found.few_tasks[: len(tasks)].tolist() == tasks.tolist()
        assert not found.few_tasks[len(tasks) :].any()
        assert len(found.few_tasks) == len(found.many_tasks) + count + tiles.num_programs
        counts = np.zeros(count, np.int32)
        counts[there] = np.diff(expected.partial_starts)
        assert found.partial_starts.diff().tolist() == counts.tolist()
        assert set(found.merged_rows.tolist()) - {0} == set(np.flatnonzero(counts).tolist()) - {0}
        assert counts[0] == 0 or 0 in found.merged_rows
        assert expected.num_partials <= found.num_partials
        assert found.row_slots.tolist() == rows.slots.tolist()
        assert found.row_positions.tolist() == (lengths - 1).tolist()
        num_cut += expected.num_partials > 0
    assert num_cut > 20


def test_decodes_planned_on_the_device_and_chunks_meet_each_position_once():
    num_mixed = 0
    for seed in range(15):
        for rows in random_steps(np.random.default_rng(seed), 6, 4, 16):
            counts = np.diff(rows.query_starts)
            order = np.argsort(counts != 1, kind="stable")
            if counts[order[0]] != 1:
                continue
            starts = np.concatenate(([0], np.cumsum(counts[order]))).astype(np.int32)
            positions = np.split(rows.positions, rows.query_starts[1:-1])
            rows = replace(
                rows,
                slots=rows.slots[order],
                query_starts=starts,
                kv_lengths=rows.kv_lengths[order],
                positions=np.concatenate([positions[each] for each in order]),
                num_decodes=int(np.count_nonzero(counts == 1)),
            )
            num_mixed += rows.num_decodes < len(order)
            for tiles in (ROOMY, TIGHT):
                check_tasks(on_the_host(plan_without_groups(rows, tiles)), rows, 16, tiles)
    assert num_mixed > 20


def on_the_host(found):
    """A plan without what only fills it up."""
    few, many = found.few_tasks.numpy(), found.many_tasks.numpy()
    starts = found.partial_starts.numpy()
    assert starts[-1] <= found.num_partials
    merged = np.unique(found.merged_rows.numpy())
    return planning.Plan(
        row_slots=found.row_slots.numpy(),
        row_positions=found.row_positions.numpy(),
        partial_starts=starts,
        merged_rows=merged[np.diff(starts)[merged] > 0],
        few_tasks=few[few[:, 6] > 0],
        many_tasks=many[many[:, 6] > 0],
    )


def test_sequences_without_rows_have_no_tasks():
    rows = SequenceRows(
        slots=np.array([2, 0, 1], np.int32),
        query_starts=np.array([0, 0, 1, 1], np.int32),
        kv_lengths=np.array([0, 1, 0], np.int32),
        positions=np.zeros(1, np.int32),
        page_table=torch.zeros(3, 1, dtype=torch.int32),
    )
    plan = check_plan(rows, 16, ROOMY)
    assert plan.few_tasks.tolist() == [[0, 0, 1, 0, 1, 0, 1, 0]]
    empty = np.zeros(0, np.int32)
    nothing = SequenceRows(
        empty, np.zeros(1, np.int32), empty, empty, rows.page_table, 0, NO_GROUPS
    )
    plan = plan_tasks(nothing, choose_groups(nothing, 16, 1, ALWAYS), ROOMY)
    assert len(plan.few_tasks) == len(plan.many_tasks) == plan.num_partials == 0
