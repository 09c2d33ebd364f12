"""Which rows of a batch read the same KV pages, so that attention reads these once for all of them.

The idea is Hydragen's (Juravsky et al. 2024, https://arxiv.org/abs/2402.05099), nested prefixes
included. A *group* is a range of rows and a range of page-table columns in which all these rows
hold the same pages. In the picture, one sequence has nothing in common with the others, which all
begin with the same few-shot examples, followed by one of two problems with three samples each::

    row     0   1 2 3   4 5 6       first_rows     1  1  4
    column  ┌─┐ ┌───────────┐       num_rows       6  3  3
      0     │ │ │ examples  │       first_columns  0  2  2
      1     │ │ │           │       num_columns    2  1  2
            │ │ ├─────┬─────┤
      2     │ │ │  A  │  B  │
            │ │ ├─┬─┬─┤     │
      3     │ │ │ │ │ ├─┬─┬─┤
      4     └─┘ └─┴─┴─┴─┴─┴─┘       behind the last group of its row: read row by row

So every column of a row is in one group or is the row's own. Finds groups among pages that are
known to be shared (see ``shared_prefixes``), and knows nothing of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.manager.kv.shared_prefixes import SharedPrefixes
from tokasaurus.manager.slots import NO_SLOTS, IndexArray
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["MIN_NESTED_LEN", "GroupFinder", "Groups"]

# A group inside another costs each of its rows one more partial result to write, read and merge.
# That is as much traffic as the keys and values of 8 tokens, where 4 query heads share one head of
# these.
MIN_NESTED_LEN = 64

_Found: TypeAlias = tuple[int, int, int]  # a group: its rows, its first column, the column after it

# Candidates are numbered from 1 on. The top above them all counts as a candidate without columns.
_TOP = 0
_NO_CANDIDATE = -1


@dataclass(frozen=True, eq=False, slots=True)
class Groups:
    """The rows of a batch in an order that makes every group a range; outer groups come first.

    Attributes:
        slots: [rows], those in no group first.
        first_rows: [groups] index into ``slots``.
        num_rows: [groups].
        first_columns: [groups] of the page table; the end of the group around it, or 0.
        num_columns: [groups].
    """

    slots: IndexArray
    first_rows: Int32Array
    num_rows: Int32Array
    first_columns: Int32Array
    num_columns: Int32Array

    @classmethod
    def none(cls, slots: IndexArray) -> Groups:
        """These rows, in no groups."""
        return cls(slots, EMPTY_INT32, EMPTY_INT32, EMPTY_INT32, EMPTY_INT32)


class GroupFinder:
    """Finds the groups of one batch after the other, and looks again only when something changed.

    A group is all rows of a batch that share a prefix, up to the column where they part:

    - It has at least ``min_group_size`` rows.
    - Its prefix has at least ``min_prefix_len`` tokens, counted from position 0 whatever groups are
      around it: after a long header, every problem is worth a group, however short.
    - A group inside another adds at least MIN_NESTED_LEN tokens, if that is less.

    Shared pages that make no group are covered by the groups inside them, or read row by row.

    Args:
        prefixes: the pages that slots share.
        page_size: tokens.
        min_group_size: rows that a group has at least.
        min_prefix_len: tokens, from position 0 to the end of a group, at least.
    """

    def __init__(
        self, prefixes: SharedPrefixes, page_size: int, min_group_size: int, min_prefix_len: int
    ) -> None:
        self._prefixes = prefixes
        self._min_rows = max(1, min_group_size)
        self._min_end = max(1, ceil_div(min_prefix_len, page_size))
        self._min_columns = min(self._min_end, max(1, ceil_div(MIN_NESTED_LEN, page_size)))
        # The groups that were found last, for these slots, and the version of the prefixes then.
        self._version = -1
        self._slots: IndexArray = NO_SLOTS
        self._found = Groups.none(self._slots)

    def find(self, slots: IndexArray) -> Groups:
        """The groups of a batch.

        Args:
            slots: [rows] distinct, in any order; not written to afterwards. Slots that share
                nothing keep their order.
        """
        version = self._prefixes.version
        if version != self._version or not np.array_equal(slots, self._slots):
            self._found = self._look(slots)
            self._version, self._slots = version, slots
        return self._found

    def _look(self, slots: IndexArray) -> Groups:
        prefixes = self._prefixes
        is_candidate = (prefixes.num_holders >= self._min_rows) & (
            prefixes.end_column >= self._min_end
        )
        candidates = is_candidate.nonzero()[0]
        if not len(candidates) or len(slots) < self._min_rows:
            return Groups.none(slots)
        ends = prefixes.end_column[candidates]
        parents_first = np.argsort(ends)
        candidates, ends = candidates[parents_first], ends[parents_first]
        number: IndexArray = np.full(len(is_candidate), _NO_CANDIDATE, np.intp)  # over nodes
        number[candidates] = np.arange(1, len(candidates) + 1)
        number[-1] = _TOP
        lowest = self._lowest_candidates(slots, number)
        parents = np.maximum(number[prefixes.parent[candidates]], _TOP)
        found, group_of = self._choose(
            [_TOP, *parents.tolist()],
            [0, *ends.tolist()],
            np.bincount(lowest, minlength=len(candidates) + 1).tolist(),
        )
        if not found:
            return Groups.none(slots)
        # Few values, in a type of few bytes: then the sort is a count.
        groups = np.array(group_of, np.min_scalar_type(len(found)))[lowest]
        return _arrange(slots, groups, found)

    def _lowest_candidates(self, slots: IndexArray, number: IndexArray) -> IndexArray:
        """[rows] the lowest candidate that each row holds; 0 if it holds none."""
        parent = self._prefixes.parent
        nodes = self._prefixes.leaf[slots].astype(np.intp)  # numpy looks up with these much faster
        lowest = number[nodes]
        while (is_none := lowest == _NO_CANDIDATE).any():
            nodes = np.where(is_none, parent[nodes], nodes)
            lowest = number[nodes]
        return lowest

    def _choose(
        self, parents: list[int], ends: list[int], num_rows: list[int]
    ) -> tuple[list[_Found], list[int]]:
        """Decides from the top down which candidates are groups. Entry 0 of all lists is the top.

        Args:
            parents: of each candidate; each comes before it.
            ends: the column after the last of each.
            num_rows: rows for which each is the lowest candidate; afterwards, rows of lower ones
                too.

        Returns:
            The groups, those inside a group right behind it; and the innermost group that each
            candidate is in, counted from 1, or 0.
        """
        children: list[list[int]] = [[] for _ in parents]
        for candidate in range(len(parents) - 1, 0, -1):
            children[parents[candidate]].append(candidate)
            num_rows[parents[candidate]] += num_rows[candidate]
        found: list[_Found] = []
        group_of = [0] * len(parents)
        waiting = [(candidate, 0, 0) for candidate in children[_TOP]]
        while waiting:
            candidate, group, start = waiting.pop()
            below, count, end = children[candidate], num_rows[candidate], ends[candidate]
            # Where all rows are in one child, only slots that are not in the batch part here.
            is_whole = not any(num_rows[child] == count for child in below)
            if count >= self._min_rows and end - start >= self._min_columns and is_whole:
                found.append((count, start, end))
                group, start = len(found), end
            group_of[candidate] = group
            for child in below:
                waiting.append((child, group, start))
        return found, group_of


def _arrange(
    slots: IndexArray, groups: NDArray[np.unsignedinteger[Any]], found: list[_Found]
) -> Groups:
    """Puts the rows in order; ``groups`` has the innermost group of each, counted from 1, or 0."""
    counts = np.bincount(groups, minlength=len(found) + 1)
    num_rows, first_columns, ends = np.array(found, np.int32).T.copy()
    return Groups(
        slots=slots[np.argsort(groups, kind="stable")],
        first_rows=np.cumsum(counts[:-1], dtype=np.int32),
        num_rows=num_rows,
        first_columns=first_columns,
        num_columns=ends - first_columns,
    )
