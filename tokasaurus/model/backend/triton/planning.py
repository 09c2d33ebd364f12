"""Cuts the attention of a batch into tasks, and counts their partial results.

A task is some rows and a range of positions that these rows read from the same pages. The rows come
from one sequence, or from all sequences of a prefix group::

    group of sequences 1-3     rows of 1-3   x  shared positions     one task
    sequence 0                 its rows      x  its positions        two tasks: it is long
    sequences 1, 2, 3          its rows      x  the positions behind the group

A row of one task is done with it. A row of several has a partial result of each, side by side, and
a merge adds them up. They are ordered like the positions::

    row               0     1     2     3
    tasks             2     2     2     2
    partial_starts    0     2     4     6     8

    sequence 0's second task has ordinal 1, the group's 0, and that of sequence 1 has 1

All of this is numpy on the host, and no step is a loop over rows or sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tokasaurus.model.backend.base import SequenceRows
from tokasaurus.model.backend.grouping import ChosenGroups
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["TASK_SIZE", "Plan", "Tiles", "most_partials", "plan_tasks"]

TASK_SIZE = 8
"""Numbers of a task: slot, begin and end of its positions, first row, how many rows follow each
other from it, the row behind these, number of rows, ordinal of its partial results."""

# A task of few positions costs more to merge than another program saves, as far as is known.
SHORTEST_TASK = 256

# Positions of a task are a multiple of this, except for the last.
STEP = 64


@dataclass(frozen=True)
class Tiles:
    """How kernels cut rows.

    Attributes:
        few_rows: that a small tile has room for.
        many_rows: that a large one has room for, at least as many.
        num_programs: tasks that keep the device busy. Long ranges are cut until there are so many.
    """

    few_rows: int
    many_rows: int
    num_programs: int


@dataclass(frozen=True)
class Plan:
    """What the kernels need of a batch, on the host.

    Each array may be filled up, for kernels that run with larger grids: with rows of position -1,
    merged rows that have no partial results, and tasks of zeros. They change nothing.

    Attributes:
        row_slots: [rows].
        row_positions: [rows].
        partial_starts: [rows + 1], the first partial result of each row. A row of one task has
            none.
        merged_rows: rows that have partial results.
        few_tasks: [tasks, TASK_SIZE], for small tiles.
        many_tasks: [tasks, TASK_SIZE], for large ones.
    """

    row_slots: Int32Array
    row_positions: Int32Array
    partial_starts: Int32Array
    merged_rows: Int32Array
    few_tasks: Int32Array
    many_tasks: Int32Array

    @property
    def num_partials(self) -> int:
        return int(self.partial_starts[-1])


class _Sources(NamedTuple):
    """Rows that read the same pages: those of a group, or of a sequence. [sources] each.

    Attributes:
        slots: whose page table names the pages.
        begins: the first position.
        ends: behind the last position that the last row sees.
        first_rows: of the batch.
        num_firsts: rows from ``first_rows`` on that follow each other.
        second_rows: where the others begin.
        num_rows: of both.
        is_group: all rows see all positions. Otherwise each row sees one more than that before it.
    """

    slots: Int32Array
    begins: Int32Array
    ends: Int32Array
    first_rows: Int32Array
    num_firsts: Int32Array
    second_rows: Int32Array
    num_rows: Int32Array
    is_group: np.ndarray[tuple[int], np.dtype[np.bool_]]


class _Blocks(NamedTuple):
    """Rows of a source that share a tile. [blocks] each.

    Attributes:
        sources: of each.
        firsts: the number of its first row within the source.
        lasts: behind its last row.
        ends: behind the last position that it sees.
        steps: positions of each of its tasks.
        num_tasks: that its positions are cut into.
        is_few: it is a small tile.
    """

    sources: Int32Array
    firsts: Int32Array
    lasts: Int32Array
    ends: Int32Array
    steps: Int32Array
    num_tasks: Int32Array
    is_few: np.ndarray[tuple[int], np.dtype[np.bool_]]


def plan_tasks(rows: SequenceRows, groups: ChosenGroups, tiles: Tiles) -> Plan:
    """Plans a batch.

    Args:
        rows: of the batch.
        groups: whose prefix is read once.
        tiles: of the kernels.
    """
    counts = np.diff(rows.query_starts)
    sequences = np.repeat(np.arange(len(counts)), counts)
    row_slots = rows.slots[sequences]
    num_groups = len(groups.first_rows)
    sources = _sources(rows, groups, row_slots)
    blocks = _blocks(sources, tiles)
    bases, num_before = _ordinals(groups, blocks, len(row_slots))
    # The blocks of sequences have each row once, in order.
    own = blocks.sources >= num_groups
    num_own = np.repeat(blocks.num_tasks[own], blocks.lasts[own] - blocks.firsts[own])
    num_tasks = num_before + num_own
    partial_starts = np.zeros(len(row_slots) + 1, np.int32)
    np.cumsum(np.where(num_tasks > 1, num_tasks, 0), out=partial_starts[1:])
    tasks = _tasks(
        sources, blocks, np.concatenate((bases, num_before[sources.first_rows[num_groups:]]))
    )
    is_few = np.repeat(blocks.is_few, blocks.num_tasks)
    return Plan(
        row_slots=row_slots,
        row_positions=rows.positions,
        partial_starts=partial_starts,
        merged_rows=np.flatnonzero(num_tasks > 1).astype(np.int32),
        few_tasks=tasks[is_few],
        many_tasks=tasks[~is_few],
    )


def most_partials(num_rows: int, tiles: Tiles) -> int:
    """Partial results that a batch has at most, if no prefix group lies in another.

    A row has one for its own positions and one for those of its group. Beyond that, no more ranges
    are cut than keep the device busy, and a part has as many rows as a tile. Decodes that the
    device plans are cut apart from the rest of the batch.

    Args:
        num_rows: of the batch.
        tiles: of the kernels.
    """
    return 2 * num_rows + (tiles.many_rows + 1) * tiles.num_programs


def _sources(rows: SequenceRows, groups: ChosenGroups, row_slots: Int32Array) -> _Sources:
    counts, starts = np.diff(rows.query_starts), rows.query_starts[:-1]
    present = counts > 0
    counts, starts = counts[present], starts[present]
    columns = zip(
        (
            row_slots[groups.first_rows],
            groups.begins,
            groups.ends,
            groups.first_rows,
            groups.num_decodes,
            groups.first_chunk_rows,
            groups.num_rows,
            np.ones(len(groups.first_rows), np.bool_),
        ),
        (
            rows.slots[present],
            groups.own_starts[present],
            rows.kv_lengths[present],
            starts,
            counts,
            starts,
            counts,
            np.zeros(len(counts), np.bool_),
        ),
        strict=True,
    )
    return _Sources(*(np.concatenate(pair) for pair in columns))


def _blocks(sources: _Sources, tiles: Tiles) -> _Blocks:
    fits = sources.num_rows <= tiles.few_rows
    in_block = np.where(fits, tiles.few_rows, tiles.many_rows).astype(np.int32)
    num_blocks = ceil_div(sources.num_rows, in_block)
    source, number = _numbered(num_blocks)
    firsts = number * in_block[source]
    num_rows = sources.num_rows[source]
    lasts = np.minimum(firsts + in_block[source], num_rows)
    unseen = np.where(sources.is_group[source], 0, num_rows - lasts).astype(np.int32)
    ends = sources.ends[source] - unseen
    lengths = ends - sources.begins[source]
    longest = max(ceil_div(int(lengths.sum(dtype=np.int64)), tiles.num_programs), SHORTEST_TASK)
    # Parts of a range are equally long, but for the last.
    steps = ceil_div(ceil_div(lengths, ceil_div(lengths, np.int32(longest))), STEP) * STEP
    num_tasks = ceil_div(lengths, steps)
    return _Blocks(source, firsts, lasts, ends, steps, num_tasks, fits[source])


def _ordinals(
    groups: ChosenGroups, blocks: _Blocks, num_rows: int
) -> tuple[Int32Array, Int32Array]:
    """The partial results that come before: [groups], and for rows' own positions [rows]."""
    num_groups = len(groups.first_rows)
    bases, num_before = np.zeros(num_groups, np.int32), np.zeros(num_rows, np.int32)
    if not num_groups:
        return bases, num_before
    # All blocks of a group see the same positions.
    num_tasks = np.empty(num_groups, np.int32)
    of_group = blocks.sources < num_groups
    num_tasks[blocks.sources[of_group]] = blocks.num_tasks[of_group]
    # Where the groups found so far end. One inside another begins there: level by level of a nest.
    reached = np.zeros(num_rows, np.int32)
    left = np.arange(num_groups)
    while len(left):
        first_rows = groups.first_rows[left]
        is_next = groups.begins[left] == reached[first_rows]
        level, left = left[is_next], left[~is_next]
        bases[level] = num_before[groups.first_rows[level]]
        num_before += _spread(groups, level, num_tasks[level], num_rows)
        reached += _spread(groups, level, (groups.ends - groups.begins)[level], num_rows)
    return bases, num_before


def _spread(
    groups: ChosenGroups,
    chosen: np.ndarray[tuple[int], np.dtype[np.intp]],
    values: Int32Array,
    num_rows: int,
) -> Int32Array:
    """[rows], the value of the chosen group that each is in; 0 if it is in none."""
    first, num_decodes = groups.first_rows[chosen], groups.num_decodes[chosen]
    second = groups.first_chunk_rows[chosen]
    num_others = groups.num_rows[chosen] - num_decodes
    changes = np.zeros(num_rows + 1, np.int32)
    for starts, counts in ((first, num_decodes), (second, num_others)):
        np.add.at(changes, starts, values)
        np.subtract.at(changes, starts + counts, values)
    return np.cumsum(changes[:-1], dtype=np.int32)


def _tasks(sources: _Sources, blocks: _Blocks, bases: Int32Array) -> Int32Array:
    """[tasks, TASK_SIZE]. ``bases`` is the ordinal of each source's first task."""
    block, number = _numbered(blocks.num_tasks)
    source, first = blocks.sources[block], blocks.firsts[block]
    steps, num_firsts = blocks.steps[block], sources.num_firsts[source]
    num_rows = blocks.lasts[block] - first
    begins = sources.begins[source] + number * steps
    return np.stack(
        (
            sources.slots[source],
            begins,
            np.minimum(begins + steps, blocks.ends[block]),
            sources.first_rows[source] + first,
            np.clip(num_firsts - first, 0, num_rows),
            sources.second_rows[source] + np.maximum(first - num_firsts, 0),
            num_rows,
            bases[source] + number,
        ),
        axis=1,
        dtype=np.int32,
    )


def _numbered(counts: Int32Array) -> tuple[Int32Array, Int32Array]:
    """For items of which there are several: the index of each one, and its number among these."""
    index = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    before = np.cumsum(counts, dtype=np.int32) - counts
    return index, np.arange(len(index), dtype=np.int32) - before[index]
