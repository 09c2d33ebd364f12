"""Which rows of a step read the same KV pages, so that attention reads these once for all of them.

The idea is Hydragen's (Juravsky et al. 2024, https://arxiv.org/abs/2402.05099), nested prefixes included.
A *group* is a range of rows and a range of page-table columns in which all these rows hold the same pages.
Few-shot examples that everybody reads, two problems with three samples each, and a sequence with nothing
in common with others::

    row     0   1 2 3   4 5 6       first_rows     1  1  4
    column  ┌─┐ ┌───────────┐       num_rows       6  3  3
      0     │ │ │ examples  │       first_columns  0  2  2
      1     │ │ │           │       num_columns    2  1  2
            │ │ ├─────┬─────┤
      2     │ │ │  A  │  B  │
            │ │ ├─┬─┬─┤     │
      3     │ │ │ │ │ ├─┬─┬─┤
      4     └─┘ └─┴─┴─┴─┴─┴─┘       behind the last group of its row: read row by row

So every column of a row is in one group or is the row's own. Finds groups; knows nothing of how they are
attended to. What pages are shared is known before; see shared_prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tokasaurus.manager.shared_prefixes import SharedPrefixes
from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.arrays import BoolArray, Int32Array

__all__ = ["MIN_NESTED_LEN", "GroupFinder", "Groups"]

# A group inside another costs each of its rows one partial result more to write, read and merge. That is
# as much traffic as the keys and values of 8 tokens, where 4 query heads share a head of them.
MIN_NESTED_LEN = 64

_Found: TypeAlias = tuple[int, int, int]  # a group: its rows, its first column, the column after it

_NONE = -1
_EMPTY: Int32Array = np.empty(0, np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Groups:
    """The rows of a step in an order that makes every group a range; groups in others come after them.

    Attributes:
        slots: [rows], those in no group first.
        first_rows: [groups] index into ``slots``.
        num_rows: [groups].
        first_columns: [groups] of the page table; where the group around it ends, or 0.
        num_columns: [groups].
    """

    slots: IndexArray
    first_rows: Int32Array
    num_rows: Int32Array
    first_columns: Int32Array
    num_columns: Int32Array


class GroupFinder:
    """Finds the groups of one step after the other, and only looks anew when something changed.

    A group is all rows of a step that share a prefix, up to the column where they part. There must be
    enough of them, and the prefix must be long enough, counted from position 0 whatever groups are around
    it: problems after a long header are worth a group each, however short. Only must a group inside
    another add MIN_NESTED_LEN tokens. A run that is too short for this, or ends too early, is covered by
    the groups inside it, and otherwise read row by row.

    Args:
        prefixes: what the slots share.
        page_size: tokens.
        min_group_size: rows that a group has at least.
        min_prefix_len: tokens, from position 0 to the end of a group, at least.
    """

    def __init__(
        self, prefixes: SharedPrefixes, page_size: int, min_group_size: int, min_prefix_len: int
    ) -> None:
        self._prefixes = prefixes
        self._min_rows = max(1, min_group_size)
        self._min_end = max(1, -(-min_prefix_len // page_size))
        self._min_columns = min(self._min_end, max(1, -(-MIN_NESTED_LEN // page_size)))
        self._version = -1  # of the prefixes, when the groups were last looked for
        self._slots: IndexArray = np.empty(0, np.intp)  # of which they were looked for
        self._found = _no_groups(self._slots)

    def find(self, slots: IndexArray) -> Groups:
        """The groups of a step.

        Args:
            slots: [rows] distinct, in any order; not written to afterwards. Those that share nothing
                keep their order.
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
        candidates = np.flatnonzero(is_candidate)
        if not len(candidates) or len(slots) < self._min_rows:
            return _no_groups(slots)
        ends = prefixes.end_column[candidates]
        parents_first = np.argsort(ends)
        candidates, ends = candidates[parents_first], ends[parents_first]
        number: IndexArray = np.full(len(is_candidate), _NONE, np.intp)  # over nodes
        number[candidates] = np.arange(len(candidates))
        lowest = number[self._lowest_candidates(slots, is_candidate)]
        counts = np.bincount(lowest + 1, minlength=len(candidates) + 1)[1:]
        found, innermost = self._choose(
            number[prefixes.parent[candidates]].tolist(), ends.tolist(), counts.tolist()
        )
        return _arrange(slots, innermost[lowest], found) if found else _no_groups(slots)

    def _lowest_candidates(self, slots: IndexArray, is_candidate: BoolArray) -> IndexArray:
        """[rows] the lowest node that is a candidate and that a row holds; -1 where it holds none."""
        prefixes = self._prefixes
        nodes = prefixes.leaf[slots].astype(np.intp)  # numpy looks up with these much faster
        is_candidate[-1] = True  # above the trie every search ends
        above = np.where(is_candidate, np.arange(len(is_candidate)), prefixes.parent)
        above[-1] = _NONE
        while not is_candidate[nodes].all():
            nodes = above[nodes]
        return nodes

    def _choose(
        self, parents: list[int], ends: list[int], num_rows: list[int]
    ) -> tuple[list[_Found], IndexArray]:
        """Which candidates are groups, from the top down.

        Args:
            parents: of each candidate, before it; -1 at the top.
            ends: the column after its last.
            num_rows: whose lowest candidate it is; counts those of lower ones too afterwards.

        Returns:
            The groups, those inside a group right behind it; and for each candidate, then for none,
            the innermost group that it is in.
        """
        children: list[list[int]] = [[] for _ in range(len(parents) + 1)]  # the last: at the top
        for candidate in range(len(parents) - 1, -1, -1):
            parent = parents[candidate]
            children[parent].append(candidate)
            if parent != _NONE:
                num_rows[parent] += num_rows[candidate]
        found: list[_Found] = []
        innermost = [_NONE] * len(children)
        waiting = [(candidate, _NONE, 0) for candidate in children[-1]]
        while waiting:
            candidate, group, start = waiting.pop()
            below, count, end = children[candidate], num_rows[candidate], ends[candidate]
            # Where all rows are in one child, others part here that are not in the step.
            is_whole = not any(num_rows[child] == count for child in below)
            if count >= self._min_rows and end - start >= self._min_columns and is_whole:
                group = len(found)
                found.append((count, start, end))
                start = end
            innermost[candidate] = group
            for child in below:
                waiting.append((child, group, start))
        return found, np.array(innermost, np.intp)


def _arrange(slots: IndexArray, innermost: IndexArray, found: list[_Found]) -> Groups:
    """Puts the rows in order; ``innermost`` is the group of each, -1 for none."""
    # Few values, in a type of few bytes: then the sort is a count.
    keys = (innermost + 1).astype(np.min_scalar_type(len(found)))
    counts = np.bincount(keys, minlength=len(found) + 1)
    num_rows, first_columns, ends = np.array(found, np.int32).T.copy()
    return Groups(
        slots=slots[np.argsort(keys, kind="stable")],
        first_rows=np.cumsum(counts[:-1], dtype=np.int32),
        num_rows=num_rows,
        first_columns=first_columns,
        num_columns=ends - first_columns,
    )


def _no_groups(slots: IndexArray) -> Groups:
    return Groups(slots, _EMPTY, _EMPTY, _EMPTY, _EMPTY)
