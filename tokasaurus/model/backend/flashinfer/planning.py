"""Cuts the attention of a batch into calls of FlashInfer, and says which pages each one reads.

A call attends with some rows of the batch. Its rows belong to *requests*, each of which reads a
list of pages: those of a sequence behind its last group, or those of a group::

    rows         0    1 2 3    4 5 6         sequences 1 to 3 decode and share the pages p and q
    own pages    a    b c d    e f f         sequence 4 feeds the rows 4 to 6
    group             p q

    call         rows      requests' rows    requests' pages
    decodes      0 to 3    0 │ 1 │ 2 │ 3     a │ b │ c │ d
    chunks       4 to 6    4 5 6             e f
    depth 0      1 to 3    1 2 3             p q

A group that has decodes and chunks is two requests, since the rows of a request follow each other.
Groups inside others are calls of their own: a row is in a call at most once.

All of this is numpy on the host. No step is a loop over rows or sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.model.backend.base import SequenceRows
from tokasaurus.model.backend.grouping import ChosenGroups
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["BatchPlan", "Call", "plan_calls"]


@dataclass(frozen=True)
class Call:
    """What one call of FlashInfer attends to, on the host.

    Attributes:
        rows: of the batch: a range of rows, or [rows] where they do not follow each other.
        query_starts: [requests + 1], the first of these rows of each request.
        slots: [requests], whose row of the page table names the pages.
        first_columns: [requests], of the page table.
        lengths: [requests], positions, from the first one of the first column on.
        page_size: in tokens.
    """

    rows: slice | Int32Array
    query_starts: Int32Array
    slots: Int32Array
    first_columns: Int32Array
    lengths: Int32Array
    page_size: int

    @property
    def num_rows(self) -> Int32Array:
        """[requests]."""
        return self.query_starts[1:] - self.query_starts[:-1]

    @property
    def num_pages(self) -> Int32Array:
        """[requests]."""
        return ceil_div(self.lengths, self.page_size)

    @property
    def page_starts(self) -> Int32Array:
        """[requests + 1], where the pages of each request begin in the list of all pages."""
        return _starts(self.num_pages)

    @property
    def last_page_lengths(self) -> Int32Array:
        """[requests], positions in the last page of each; 0 if it has none."""
        in_full_pages: Int32Array = np.maximum(self.num_pages - 1, 0) * np.int32(self.page_size)
        return self.lengths - in_full_pages


@dataclass(frozen=True)
class BatchPlan:
    """The calls of a batch.

    Attributes:
        decodes: rows that decode, over their own pages; None if no row does.
        chunks: the other rows, over their own pages; None if there are none.
        levels: of groups, those around others first.
        row_requests: [rows], the request of each row in ``decodes``, then in ``chunks``.
        own_positions: [rows], within the pages of that request.
        row_slots: [rows], whose row of the page table names these pages.
    """

    decodes: Call | None
    chunks: Call | None
    levels: tuple[Call, ...]
    row_requests: Int32Array
    own_positions: Int32Array
    row_slots: Int32Array

    @property
    def own(self) -> tuple[Call, ...]:
        """The calls over the rows' own pages. They have each row once, in order."""
        return tuple(call for call in (self.decodes, self.chunks) if call is not None)


def plan_calls(rows: SequenceRows, groups: ChosenGroups, page_size: int) -> BatchPlan:
    """Plans a batch.

    Args:
        rows: of the batch.
        groups: whose prefix is read once. They end with a page.
        page_size: in tokens.
    """
    counts = np.diff(rows.query_starts)
    # A sequence of no rows has nothing to attend with.
    (present,) = np.nonzero(counts)
    own_starts = groups.own_starts[present]
    lengths, counts = rows.kv_lengths[present] - own_starts, counts[present]
    num_decodes = rows.num_decodes

    def call(first: int, last: int) -> Call | None:
        if first == last:
            return None
        part = slice(first, last)
        starts = rows.query_starts[present[first]] + _starts(counts[part])
        return Call(
            rows=slice(int(starts[0]), int(starts[-1])),
            query_starts=starts - starts[0],
            slots=rows.slots[present[part]],
            first_columns=own_starts[part] // np.int32(page_size),
            lengths=lengths[part],
            page_size=page_size,
        )

    row_requests = np.repeat(np.arange(len(present), dtype=np.int32), counts)
    return BatchPlan(
        decodes=call(0, num_decodes),
        chunks=call(num_decodes, len(present)),
        levels=_levels(rows, groups, page_size),
        row_requests=row_requests,
        own_positions=rows.positions - own_starts[row_requests],
        row_slots=rows.slots[present][row_requests],
    )


def _levels(rows: SequenceRows, groups: ChosenGroups, page_size: int) -> tuple[Call, ...]:
    # Of each group its decodes, then its chunks.
    first_rows = np.concatenate((groups.first_rows, groups.first_chunk_rows))
    counts = np.concatenate((groups.num_decodes, groups.num_rows - groups.num_decodes))
    (kept,) = np.nonzero(counts)
    kept = kept[np.argsort(first_rows[kept])]
    first_rows, counts, group = first_rows[kept], counts[kept], kept % len(groups.depths)
    # All members of a group name the same pages. The sequence of its first row has them.
    member = np.searchsorted(rows.query_starts, groups.first_rows[group], side="right") - 1
    levels = []
    for depth in np.unique(groups.depths[group]):
        (level,) = np.nonzero(groups.depths[group] == depth)
        of_level = group[level]
        levels.append(
            Call(
                rows=_rows(first_rows[level], counts[level]),
                query_starts=_starts(counts[level]),
                slots=rows.slots[member[level]],
                first_columns=groups.begins[of_level] // np.int32(page_size),
                lengths=(groups.ends - groups.begins)[of_level],
                page_size=page_size,
            )
        )
    return tuple(levels)


def _rows(firsts: Int32Array, counts: Int32Array) -> slice | Int32Array:
    """The rows of ranges, which are sorted and do not overlap."""
    behind = firsts + counts
    if (firsts[1:] == behind[:-1]).all():
        return slice(int(firsts[0]), int(behind[-1]))
    starts = _starts(counts)
    return np.arange(starts[-1], dtype=np.int32) + np.repeat(firsts - starts[:-1], counts)


def _starts(counts: Int32Array) -> Int32Array:
    """[counts + 1], the sums of the counts before each."""
    return np.concatenate((_ZERO, np.cumsum(counts, dtype=np.int32)))


_ZERO = np.zeros(1, np.int32)
