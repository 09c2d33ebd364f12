"""Which slots of a batch hold the same KV pages, so that attention reads these once for all.

The idea is Hydragen's (Juravsky et al. 2024, https://arxiv.org/abs/2402.05099), nested prefixes
included. A *group* is a range of page-table columns, and the slots that hold the same pages there.
In the picture, one sequence has nothing in common with the others, which all begin with the same
few-shot examples, followed by one of two problems with three samples each::

    decode  0   1 2 3   4 5 6       first_decodes  1  1  4
    column  ┌─┐ ┌───────────┐       num_decodes    6  3  3
      0     │ │ │ examples  │       first_columns  0  2  2
      1     │ │ │           │       num_columns    2  1  2
            │ │ ├─────┬─────┤
      2     │ │ │  A  │  B  │
            │ │ ├─┬─┬─┤     │
      3     │ │ │ │ │ ├─┬─┬─┤
      4     └─┘ └─┴─┴─┴─┴─┴─┘       behind the last group of its slot: read slot by slot

So every column of a slot is in one group or is the slot's own. Slots that feed a chunk of a prompt
are in groups too. They are a range of their own, since a batch has its chunks behind the slots that
decode::

    decode  0 1 2   chunk  0 1 2    first_decodes  1
    column  ┌─┬───┐      ┌─────┬─┐  num_decodes    2
      0     │ │ a │      │  a  │ │  first_chunks   0
      1     │ ├─┬─┤      ├─┬─┬─┤ │  num_chunks     2
            └─┴─┴─┘      └─┴─┴─┴─┘

Finds groups among pages that are known to be shared (see ``shared_prefixes``), and knows nothing of
attention.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.manager.kv.shared_prefixes import SharedPrefixes
from tokasaurus.manager.slots import NO_SLOTS, IndexArray
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["MIN_NESTED_LEN", "GroupFinder", "GroupedChunks", "Groups"]

# A group inside another costs each of its rows one more partial result to write, read and merge.
# That is as much traffic as the keys and values of 8 tokens, where 4 query heads share one head of
# these.
MIN_NESTED_LEN = 64

# A group: its number of slots, its first column, and the column after its last.
_Found: TypeAlias = tuple[int, int, int]

# Candidates are numbered from 1 on. The top above them all counts as a candidate without columns.
_TOP = 0
_NO_CANDIDATE = -1


class GroupedChunks(NamedTuple):
    """The chunks of a batch in an order that makes those of every group a range.

    Attributes:
        order: [chunks] index into the chunks, those in no group first.
        firsts: [groups] index into ``order``.
        counts: [groups].
    """

    order: IndexArray
    firsts: Int32Array
    counts: Int32Array


@dataclass(frozen=True, eq=False, slots=True)
class Groups:
    """The slots of a batch in an order that makes every group two ranges; outer groups come first.

    Attributes:
        slots: [decodes], those in no group first.
        first_decodes: [groups] index into ``slots``.
        num_decodes: [groups].
        first_columns: [groups] of the page table; the end of the group around it, or 0.
        num_columns: [groups].
        chunks: of prompts. None if none is in a group: then their order is free.
    """

    slots: IndexArray
    first_decodes: Int32Array
    num_decodes: Int32Array
    first_columns: Int32Array
    num_columns: Int32Array
    chunks: GroupedChunks | None = None

    @classmethod
    def none(cls, slots: IndexArray) -> Groups:
        """These slots decode, in no groups."""
        return cls(slots, EMPTY_INT32, EMPTY_INT32, EMPTY_INT32, EMPTY_INT32)


class _Known(NamedTuple):
    """The groups that were found for these slots, and the version of the prefixes then."""

    version: int
    slots: IndexArray
    chunk_slots: IndexArray
    groups: Groups

    def is_of(self, version: int, slots: IndexArray, chunk_slots: IndexArray) -> bool:
        """Whether the groups are those of these slots now."""
        return (
            self.version == version
            and np.array_equal(slots, self.slots)
            and (chunk_slots is self.chunk_slots or np.array_equal(chunk_slots, self.chunk_slots))
        )


class GroupFinder:
    """Finds the groups of one batch after the other, and looks again only when something changed.

    A group is all slots of a batch that share a prefix, up to the column where they part:

    - It has at least ``min_group_size`` slots, whether they decode or feed a chunk.
    - Its prefix has at least ``min_prefix_len`` tokens, counted from position 0 whatever groups are
      around it: after a long header, every problem is worth a group, however short.
    - A group inside another adds at least MIN_NESTED_LEN tokens, if that is less.

    Shared pages that make no group are covered by the groups inside them, or read slot by slot.

    Args:
        prefixes: the pages that slots share.
        page_size: tokens.
        min_group_size: slots that a group has at least.
        min_prefix_len: tokens, from position 0 to the end of a group, at least.
        num_lanes: batches after which the same slots may come again.
    """

    def __init__(
        self,
        prefixes: SharedPrefixes,
        page_size: int,
        min_group_size: int,
        min_prefix_len: int,
        num_lanes: int = 1,
    ) -> None:
        self._prefixes = prefixes
        self._min_slots = max(1, min_group_size)
        self._min_end = max(1, ceil_div(min_prefix_len, page_size))
        self._min_columns = min(self._min_end, max(1, ceil_div(MIN_NESTED_LEN, page_size)))
        # Of each lane, the one that is due first.
        nothing = _Known(-1, NO_SLOTS, NO_SLOTS, Groups.none(NO_SLOTS))
        self._known = deque([nothing] * num_lanes)

    def find(self, slots: IndexArray, chunk_slots: IndexArray = NO_SLOTS) -> Groups:
        """The groups of a batch.

        Args:
            slots: [decodes] distinct, in any order; not written to afterwards. Slots that share
                nothing keep their order.
            chunk_slots: [chunks] likewise. All pages that they share are filled already.
        """
        version = self._prefixes.version
        for _ in range(len(self._known)):
            known = self._known.popleft()
            self._known.append(known)
            if known.is_of(version, slots, chunk_slots):
                return known.groups
        self._known.popleft()
        groups = self._look(slots, chunk_slots)
        self._known.append(_Known(version, slots, chunk_slots, groups))
        return groups

    def _look(self, decode_slots: IndexArray, chunk_slots: IndexArray) -> Groups:
        prefixes = self._prefixes
        is_candidate = (prefixes.num_holders >= self._min_slots) & (
            prefixes.end_column >= self._min_end
        )
        candidates = is_candidate.nonzero()[0]
        if not len(candidates) or len(decode_slots) + len(chunk_slots) < self._min_slots:
            return Groups.none(decode_slots)
        slots = np.concatenate((decode_slots, chunk_slots)) if len(chunk_slots) else decode_slots
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
            return Groups.none(decode_slots)
        # Few values, in a type of few bytes: then the sort is a count.
        groups = np.array(group_of, np.min_scalar_type(len(found)))[lowest]
        return _arrange(slots, groups, found, len(decode_slots))

    def _lowest_candidates(self, slots: IndexArray, number: IndexArray) -> IndexArray:
        """[slots] the lowest candidate that each slot holds; 0 if it holds none."""
        parent = self._prefixes.parent
        nodes = self._prefixes.leaf[slots].astype(np.intp)  # numpy looks up with these much faster
        lowest = number[nodes]
        while (is_none := lowest == _NO_CANDIDATE).any():
            nodes = np.where(is_none, parent[nodes], nodes)
            lowest = number[nodes]
        return lowest

    def _choose(
        self, parents: list[int], ends: list[int], num_slots: list[int]
    ) -> tuple[list[_Found], list[int]]:
        """Decides from the top down which candidates are groups. Entry 0 of all lists is the top.

        Args:
            parents: of each candidate; each comes before it.
            ends: the column after the last of each.
            num_slots: slots for which each is the lowest candidate; afterwards, slots of lower
                ones too.

        Returns:
            The groups, those inside a group right behind it; and the innermost group that each
            candidate is in, counted from 1, or 0.
        """
        children: list[list[int]] = [[] for _ in parents]
        for candidate in range(len(parents) - 1, 0, -1):
            children[parents[candidate]].append(candidate)
            num_slots[parents[candidate]] += num_slots[candidate]
        found: list[_Found] = []
        group_of = [0] * len(parents)
        waiting = [(candidate, 0, 0) for candidate in children[_TOP]]
        while waiting:
            candidate, group, start = waiting.pop()
            below, count, end = children[candidate], num_slots[candidate], ends[candidate]
            # Where all slots are in one child, only slots that are not in the batch part here.
            is_whole = not any(num_slots[child] == count for child in below)
            if count >= self._min_slots and end - start >= self._min_columns and is_whole:
                found.append((count, start, end))
                group, start = len(found), end
            group_of[candidate] = group
            for child in below:
                waiting.append((child, group, start))
        return found, group_of


def _arrange(
    slots: IndexArray,
    groups: NDArray[np.unsignedinteger[Any]],
    found: list[_Found],
    num_decodes: int,
) -> Groups:
    """Puts the slots in order.

    Args:
        slots: that decode, then those that feed chunks.
        groups: [slots] the innermost group of each, counted from 1, or 0.
        found: the groups.
        num_decodes: slots that decode.
    """
    if not groups[num_decodes:].any():
        slots, groups = slots[:num_decodes], groups[:num_decodes]
    sizes, first_columns, ends = np.array(found, np.int32).T.copy()
    order = np.argsort(groups, kind="stable")
    firsts = np.cumsum(np.bincount(groups, minlength=len(found) + 1)[:-1], dtype=np.int32)
    chunks = None
    if len(slots) > num_decodes:
        is_chunk = order >= num_decodes
        num_before = np.zeros(len(order) + 1, np.int32)  # chunks before each place
        np.cumsum(is_chunk, out=num_before[1:])
        first_chunks = num_before[firsts]
        counts = num_before[firsts + sizes] - first_chunks
        chunks = GroupedChunks(order[is_chunk] - num_decodes, first_chunks, counts)
        order = order[~is_chunk]
        firsts, sizes = firsts - first_chunks, sizes - counts
    return Groups(
        slots=slots[order],
        first_decodes=firsts,
        num_decodes=sizes,
        first_columns=first_columns,
        num_columns=ends - first_columns,
        chunks=chunks,
    )
