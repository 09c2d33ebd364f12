"""The prefix cache: radix trees from token ids to the pages that hold their KV.

There is one tree for each *namespace*. KV that was computed in one namespace is found only there:
a namespace stands for the weights that computed it.

A node is a *run* of pages, so a prompt of a thousand pages is one object. Children are found by the
bytes of their first page's ids. With pages of two tokens::

    root ── [a b|c d|e f]  pages 7 3 9
                 ├── [g h]      page 4
                 └── [g x|y z]  pages 1 8

A holder of a page holds all pages above it too. So reference counts never grow from root to leaf,
unreferenced pages are the tails of leaves and whole subtrees, and each of them can be evicted.

Eviction takes the least recently used leaf, last page first. Knows nothing of slots or of time:
"used" means inserted again, in the order of calls. It is one order over all namespaces.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator

import numpy as np

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.kv.page_pool import PagePool
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array

__all__ = ["PrefixCache", "PrefixNode"]

_BYTES_PER_ID = 4


class PrefixNode:
    """A run of pages and the ids they hold; only this module changes one."""

    __slots__ = ("children", "ids", "last_used", "pages", "parent", "queued", "serial")

    def __init__(
        self, parent: PrefixNode | None, ids: bytes, pages: Int32Array, serial: int
    ) -> None:
        self.parent = parent
        self.ids = ids  # int32, page after page
        self.pages = pages
        self.children: dict[bytes, PrefixNode] = {}
        self.last_used = 0
        self.serial = serial  # breaks ties in the heap
        self.queued = False  # has an entry in the eviction heap


class PrefixCache:
    """Finds, inserts and evicts runs of full pages, in namespaces that are opened and closed.

    Attributes:
        roots: by open namespace.
        num_evicted: pages that left the trees.

    Args:
        pool: it is told which pages left the tree, and asked which are referenced.
        page_size: tokens.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_bytes = page_size * _BYTES_PER_ID
        self._num_nodes = 0
        self._clock = 0
        # (last_used, serial, node) of every leaf that may have an unreferenced tail. An entry goes
        # stale when its leaf is used again, gets children or is referenced; that is noticed when it
        # is popped.
        self._heap: list[tuple[int, int, PrefixNode]] = []
        self.roots: dict[int, PrefixNode] = {}
        self.num_evicted = 0

    def open(self, namespace: int) -> None:
        """Opens a namespace, which is empty."""
        self.roots[namespace] = self._new_node(None, b"", EMPTY_INT32)

    def close(self, namespace: int) -> int:
        """Forgets a namespace: frees the pages that have no holder, and returns their number.

        The others become private pages of their holders, which give them back as such.
        """
        return self._forget(list(_below(self.roots.pop(namespace))))

    def drop(self, first_id: int) -> int:
        """Like ``close``, for all prefixes that begin with this id, in every namespace."""
        start = first_id.to_bytes(_BYTES_PER_ID, sys.byteorder, signed=True)
        dropped: list[PrefixNode] = []
        for root in self.roots.values():
            for key in [key for key in root.children if key.startswith(start)]:
                top = root.children.pop(key)
                dropped += [top, *_below(top)]
        return self._forget(dropped)

    def lookup(self, namespace: int, ids: Int32Array, max_pages: int) -> Int32Array:
        """Returns the pages of the longest cached prefix of ``ids``, at most ``max_pages``."""
        data = ids[: max_pages * self._page_bytes // _BYTES_PER_ID].tobytes()
        size = self._page_bytes
        node, at = self.roots[namespace], 0
        runs: list[Int32Array] = []
        while (child := node.children.get(data[at : at + size])) is not None:
            if not data.startswith(child.ids, at):
                runs.append(child.pages[: self._num_common_pages(child.ids, data, at)])
                break
            runs.append(child.pages)
            node = child
            at += len(child.ids)
        if not runs:
            return EMPTY_INT32
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    def insert(self, namespace: int, ids: Int32Array, pages: Int32Array) -> tuple[int, PrefixNode]:
        """Makes a prefix findable, and counts as a use of it.

        The caller must tell the pool of the pages that are new in the tree.

        Args:
            namespace: an open one.
            ids: of ``len(pages)`` full pages, from position 0.
            pages: where their KV is; those that are not in the tree yet must be private.

        Returns:
            The number of leading pages with ids that were in the tree before, under these pages or
            others; and the node that ends the prefix.
        """
        data = ids.tobytes()
        size = self._page_bytes
        node, at = self.roots[namespace], 0
        while (child := node.children.get(data[at : at + size])) is not None:
            if not data.startswith(child.ids, at):
                count = self._num_common_pages(child.ids, data, at)
                node = self._split(child, count)
                at += count * size
                break
            node = child
            at += len(child.ids)
        num_found = at // size
        if num_found < len(pages):
            node = self._append(node, data[at:], pages[num_found:])
        self._touch(node)
        return num_found, node

    def offer(self, node: PrefixNode) -> None:
        """Must be called when a holder of the prefix that ends with ``node`` has released it."""
        if not (node.queued or node.children or node.parent is None):
            node.queued = True
            heapq.heappush(self._heap, (node.last_used, node.serial, node))

    @property
    def clock(self) -> int:
        """The time of the latest use: uses are numbered."""
        return self._clock

    def evict(self, count: int) -> None:
        """Frees ``count`` pages.

        Raises:
            ProtocolError: fewer are unreferenced.
        """
        num_missing = count - self.evict_used_until(self._clock, count)
        if num_missing:
            raise ProtocolError(f"{num_missing} pages to evict, but no leaf is unreferenced")

    def evict_used_until(self, time: int, count: int) -> int:
        """Frees up to ``count`` pages, of leaves that were not used after this time.

        Returns:
            The number of pages that this frees.
        """
        evicted: list[Int32Array] = []
        wanted = count
        # The time of an entry is never later than that of its leaf.
        while count > 0 and self._heap and self._heap[0][0] <= time:
            last_used, _, node = heapq.heappop(self._heap)
            node.queued = False
            if last_used != node.last_used:
                self.offer(node)
            elif not node.children:
                tail = self._cut_tail(node, count)
                count -= len(tail)
                evicted.append(tail)
        if evicted:
            pages = np.concatenate(evicted)
            self._pool.evict(pages)
            self.num_evicted += len(pages)
        return wanted - count

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node but the roots, parents first."""
        for root in self.roots.values():
            yield from _below(root)

    def _forget(self, nodes: list[PrefixNode]) -> int:
        """Frees the pages, as far as they have no holder, of nodes that cannot be reached."""
        for node in nodes:
            node.parent = None
        self._heap = [entry for entry in self._heap if entry[2].parent is not None]
        heapq.heapify(self._heap)
        num_freed = self._pool.uncache(np.concatenate([EMPTY_INT32, *[n.pages for n in nodes]]))
        self.num_evicted += num_freed
        return num_freed

    def _num_common_pages(self, run: bytes, data: bytes, at: int) -> int:
        length = min(len(run), len(data) - at)
        one = np.frombuffer(run, np.int32, length // _BYTES_PER_ID)
        other = np.frombuffer(data, np.int32, length // _BYTES_PER_ID, offset=at)
        differs = one != other
        first = int(differs.argmax()) if differs.any() else len(differs)
        return first * _BYTES_PER_ID // self._page_bytes

    def _split(self, node: PrefixNode, count: int) -> PrefixNode:
        """Cuts a run in two; returns the new upper part.

        ``node`` stays the lower part, so that its entry in the eviction heap stays right.
        """
        parent = node.parent
        if parent is None:
            raise ProtocolError("a root of the prefix cache has no pages to split")
        cut = count * self._page_bytes
        upper = self._new_node(parent, node.ids[:cut], node.pages[:count])
        upper.last_used = node.last_used
        parent.children[upper.ids[: self._page_bytes]] = upper
        node.parent, node.ids, node.pages = upper, node.ids[cut:], node.pages[count:]
        upper.children[node.ids[: self._page_bytes]] = node
        return upper

    def _append(self, node: PrefixNode, ids: bytes, pages: Int32Array) -> PrefixNode:
        """Adds pages below ``node``; a leaf just grows."""
        if node.parent is not None and not node.children:
            node.ids += ids
            node.pages = np.concatenate([node.pages, pages])
            return node
        child = self._new_node(node, ids, pages.copy())
        node.children[ids[: self._page_bytes]] = child
        return child

    def _touch(self, node: PrefixNode | None) -> None:
        self._clock += 1
        while node is not None:
            node.last_used = self._clock
            node = node.parent

    def _cut_tail(self, node: PrefixNode, limit: int) -> Int32Array:
        """Takes up to ``limit`` unreferenced pages off a leaf's end; returns them."""
        pages = node.pages
        # A holder of a page holds those before it: if the first has none, no page has one.
        if len(pages) > limit or self._pool.is_referenced(pages.item(0)):
            count = min(limit, self._pool.num_unreferenced(pages))
            if count == 0:
                return EMPTY_INT32
            left = len(pages) - count
            node.pages, node.ids = pages[:left], node.ids[: left * self._page_bytes]
            self.offer(node)
            return pages[left:]
        if node.parent is not None:
            del node.parent.children[node.ids[: self._page_bytes]]
            self.offer(node.parent)
            node.parent = None
        return pages

    def _new_node(self, parent: PrefixNode | None, ids: bytes, pages: Int32Array) -> PrefixNode:
        self._num_nodes += 1
        return PrefixNode(parent, ids, pages, self._num_nodes)


def _below(root: PrefixNode) -> Iterator[PrefixNode]:
    """All nodes below this one, parents first."""
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
