"""Which running slots hold the same leading KV pages: a trie over page numbers.

A node is a *run* of pages that the same slots hold. A slot holds the pages of its leaf node and of
all ancestors of it. Slots 0 and 1 with pages 7 3 9, slot 2 with 7 3 4 5, slot 3 with 7 3::

    leaf         0: b   1: b   2: c   3: a

    a [7 3]      parent -1   end_column 2   num_holders 4
    ├── b [9]    parent a    end_column 3   num_holders 2
    └── c [4 5]  parent a    end_column 4   num_holders 1

Every node is the leaf of some slot or has at least two children, so there are less than two nodes
per slot. A node keeps its number as long as it lives; after that the number is used again.

Compares page numbers, never tokens: equal pages that were computed twice are not shared. Knows
nothing of the contents of pages or their owners.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import numpy as np

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["SharedPrefixes"]

_BYTES_PER_PAGE = 4
_ROOT = -1  # above the trie, without pages; indexes the last entry of every column over nodes


class SharedPrefixes:
    """A trie in columns, for readers that look at all slots or all nodes at once.

    Readers may index the columns as they like and must not write to them. No node has the last
    number: the entries there, which a parent of -1 finds, are right for "before the first page".

    Attributes:
        leaf: [num_slots] the node that ends the pages of a slot; -1 for a slot that holds none.
        parent: [2 * num_slots] over nodes; -1 at the top.
        end_column: [2 * num_slots] pages of this run and of all ancestors. In the page tables of
            its holders, the run is in the columns ``end_column[parent]`` up to ``end_column``.
        num_holders: [2 * num_slots] slots with this node or one below it as their leaf. It is 0
            where there is no node; the other columns mean nothing then.
        version: changes whenever one of the above does.

    Args:
        num_slots: slots are numbered 0 .. num_slots - 1.
    """

    def num_shared_pages(self, slots: IndexArray) -> Int32Array:
        """[slots] the number of leading pages of each that other slots hold too."""
        leaf = self.leaf[slots]
        is_shared = self.num_holders[leaf] > 1  # else the pages above the leaf are
        ends: Int32Array = self.end_column[np.where(is_shared, leaf, self.parent[leaf])]
        return ends

    def __init__(self, num_slots: int) -> None:
        size = 2 * num_slots
        self.leaf: Int32Array = np.full(num_slots, _ROOT, np.int32)
        self.parent: Int32Array = np.full(size, _ROOT, np.int32)
        self.end_column: Int32Array = np.zeros(size, np.int32)
        self.num_holders: Int32Array = np.zeros(size, np.int32)
        self.version = 0
        self._free = list(range(size - 2, -1, -1))
        self._runs = [b""] * size  # page numbers, int32
        # By the first page of the child's run.
        self._children: list[dict[bytes, int]] = [{} for _ in range(size)]

    def enter(self, slots: Rows[int], pages: Int32Array) -> None:
        """Adds slots that hold these pages, in the columns of their page tables from 0 on.

        Args:
            slots: distinct; one, or siblings that enter together.
            pages: full ones, which are not written to while a slot is in here; may be none.

        Raises:
            ProtocolError: one of the slots is here already.
        """
        # A single slot is the common case, and numpy is several times faster with a number.
        rows: int | IndexArray
        if len(slots) == 1:
            rows = slots[0]
            is_here = self.leaf.item(rows) != _ROOT
        else:
            rows = np.array(slots, np.intp)
            is_here = (self.leaf[rows] != _ROOT).any()
        if is_here:
            raise ProtocolError(f"one of the slots {slots} entered the shared prefixes twice")
        if len(pages) and len(slots):
            self.leaf[rows] = self._add_holders_of(pages.tobytes(), len(slots))
            self.version += 1

    def leave(self, slots: IndexArray) -> None:
        """Removes these slots, which are distinct; those that hold no pages are passed over."""
        if len(slots) == 1:
            slot = slots.item()
            leaf = self.leaf.item(slot)
            if leaf != _ROOT:
                self.leaf[slot] = _ROOT
                self._remove_holders(leaf, 1)
                self.version += 1
            return
        counts = Counter(self.leaf[slots].tolist())
        counts.pop(_ROOT, None)
        if counts:
            self.leaf[slots] = _ROOT
            for leaf, count in counts.items():
                self._remove_holders(leaf, count)
            self.version += 1

    def _add_holders_of(self, pages: bytes, count: int) -> int:
        """Adds holders of these pages, and nodes as needed; returns the node that ends them."""
        node, at = _ROOT, 0
        while at < len(pages):
            first = pages[at : at + _BYTES_PER_PAGE]
            child = self._children[node].get(first)
            if child is None:
                self._count(node, count)
                return self._append(node, first, pages[at:], count)
            run = self._runs[child]
            if pages.startswith(run, at):
                node = child
            else:
                run = _common_pages(run, pages[at:])
                node = self._cut(child, run)
            at += len(run)
        self._count(node, count)
        return node

    def _append(self, parent: int, first: bytes, run: bytes, num_holders: int) -> int:
        """Adds a node below ``parent``; ``first`` is the run's first page."""
        node = self._free.pop()
        end = len(run) // _BYTES_PER_PAGE
        if parent != _ROOT:
            end += self.end_column.item(parent)
        self.parent[node] = parent
        self.end_column[node] = end
        self.num_holders[node] = num_holders
        self._runs[node] = run
        self._children[parent][first] = node
        return node

    def _cut(self, node: int, run: bytes) -> int:
        """Cuts the first pages off a node; returns the new node that has them.

        ``node`` stays the lower part, so that it stays the leaf of the same slots.
        """
        first, num_holders = run[:_BYTES_PER_PAGE], self.num_holders.item(node)
        upper = self._append(self.parent.item(node), first, run, num_holders)
        self._attach(upper, node, self._runs[node][len(run) :])
        return upper

    def _attach(self, parent: int, node: int, run: bytes) -> None:
        """Gives a node another parent and another run with the same end."""
        self.parent[node] = parent
        self._runs[node] = run
        self._children[parent][run[:_BYTES_PER_PAGE]] = node

    def _count(self, node: int, count: int) -> None:
        """Adds ``count`` to the holders of ``node`` and its ancestors."""
        while node != _ROOT:
            self.num_holders[node] += count
            node = self.parent.item(node)

    def _remove_holders(self, leaf: int, count: int) -> None:
        """Removes ``count`` slots that end at ``leaf``.

        The node may vanish, and then its parent may too; nodes above cannot.
        """
        lowest = leaf
        if self.num_holders.item(leaf) == count:
            lowest = self.parent.item(leaf)
            del self._children[lowest][self._runs[leaf][:_BYTES_PER_PAGE]]
            self._remove(leaf)
        if lowest != _ROOT:
            self._count(lowest, -count)
            if len(self._children[lowest]) == 1:
                self._merge_with_child(lowest)

    def _merge_with_child(self, node: int) -> None:
        """Unless a slot ends at ``node``, its only child takes over its pages."""
        (child,) = self._children[node].values()
        if self.num_holders[child] == self.num_holders[node]:
            self._children[node].clear()
            self._attach(self.parent.item(node), child, self._runs[node] + self._runs[child])
            self._remove(node)

    def _remove(self, node: int) -> None:
        self.num_holders[node] = 0
        self._free.append(node)


def _common_pages(one: bytes, other: bytes) -> bytes:
    """The longest common prefix in whole pages, by bisection: bytes compare faster than arrays."""
    low, high = 0, min(len(one), len(other)) // _BYTES_PER_PAGE
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[: middle * _BYTES_PER_PAGE]):
            low = middle
        else:
            high = middle - 1
    return one[: low * _BYTES_PER_PAGE]
