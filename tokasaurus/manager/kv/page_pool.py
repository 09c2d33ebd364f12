"""The pool of KV pages: how many holders each has, which are free.

Knows nothing of tokens. A page is in exactly one of these conditions::

                      not cached        cached (in the prefix cache's tree)
    no reference      free              evictable
    references        private (one)     shared by its holders

A page that several share stays shared when its tree is dropped: it is then private to all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ProtocolError
from tokasaurus.protocol.arrays import BoolArray, Int32Array

__all__ = ["PagePool"]


class PagePool:
    """Reference counts over pages and a stack of free ones.

    Args:
        num_pages: pages are numbered 0 .. num_pages - 1.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.num_evictable = 0
        self.references: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self.cached: BoolArray = np.zeros(num_pages, np.bool_)
        # The first num_free entries are the free pages; low numbers are given out first.
        self._free: Int32Array = np.arange(num_pages - 1, -1, -1, dtype=np.int32)

    @property
    def free_pages(self) -> Int32Array:
        """The free pages, the next to be given out last."""
        return self._free[: self.num_free]

    def take(self, count: int) -> Int32Array:
        """Takes free pages; each starts with one holder.

        Raises:
            ProtocolError: fewer are free.
        """
        if count > self.num_free:
            raise ProtocolError(f"{count} pages wanted, {self.num_free} free")
        self.num_free -= count
        pages: Int32Array = self._free[self.num_free : self.num_free + count].copy()
        self.references[pages] = 1
        return pages

    def retain(self, pages: Int32Array, num_holders: int = 1) -> None:
        """Adds holders to each of these pages, which are all different, and cached or held."""
        self.num_evictable -= self.num_unreferenced(pages)
        self.references[pages] += num_holders

    def release(self, pages: Int32Array) -> None:
        """Removes one holder of each page, or as many as the page occurs.

        Without a holder, a private page is free and a cached one evictable.
        """
        references = self.references[pages]
        if references.max(initial=1) == 1:  # one holder each, so each is here once
            self.references[pages] = 0
            left = pages
        else:
            np.subtract.at(self.references, pages, 1)
            left = np.unique(pages[self.references[pages] == 0])
        is_cached = self.cached[left]
        self.num_evictable += int(np.count_nonzero(is_cached))
        self._put_back(left[~is_cached])

    def mark_cached(self, pages: Int32Array) -> None:
        """Notes that these private pages are in the tree from now on."""
        self.cached[pages] = True

    def evict(self, pages: Int32Array) -> None:
        """Frees these cached pages without a holder, which left the tree."""
        self.cached[pages] = False
        self.num_evictable -= len(pages)
        self._put_back(pages)

    def uncache(self, pages: Int32Array) -> int:
        """Notes that these pages left the tree; frees those without a holder, returns how many."""
        unreferenced = pages[self.references[pages] == 0]
        self.evict(unreferenced)
        self.cached[pages] = False
        return len(unreferenced)

    def is_referenced(self, page: int) -> bool:
        """Whether the page has a holder."""
        return self.references.item(page) > 0

    def num_unreferenced(self, pages: Int32Array) -> int:
        """How many of these pages have no holder."""
        return len(pages) - int(np.count_nonzero(self.references[pages]))

    def _put_back(self, pages: Int32Array) -> None:
        self._free[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)
