"""Gives out KV pages: free ones first, then the least recently used of the prefix cache.

Joins the page pool and the prefix cache. What ``num_available`` promises, ``allocate`` delivers.
"""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.page_pool import PagePool
from tokasaurus.manager.prefix_cache import PrefixCache
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["PageAllocator"]


class PageAllocator:
    """The KV pages of one replica.

    Args:
        num_pages: pages are numbered 0 .. num_pages - 1.
        page_size: tokens.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool, page_size)

    @property
    def num_available(self) -> int:
        """Pages that an allocation can have: free or evictable."""
        return self.pool.num_free + self.pool.num_evictable

    def lookup(self, prompt_ids: Int32Array) -> Int32Array:
        """Returns the cached pages of a prompt, never all of it: its last token is always computed."""
        return self.cache.lookup(prompt_ids, (len(prompt_ids) - 1) // self.page_size)

    def num_needed(self, cached_pages: Int32Array, num_new: int) -> int:
        """By how much ``num_available`` shrinks if these cached and new pages get a holder."""
        return num_new + self.pool.num_unreferenced(cached_pages)

    def acquire(self, cached_pages: Int32Array, num_new: int) -> Int32Array:
        """Gives one holder cached pages and as many new ones; returns them in this order."""
        self.pool.retain(cached_pages)  # first: or making room for the new ones may evict them
        return np.concatenate([cached_pages, self.allocate(num_new)])

    def allocate(self, count: int) -> Int32Array:
        """Returns private pages.

        Raises:
            ProtocolError: ``num_available`` is smaller.
        """
        shortfall = count - self.pool.num_free
        if shortfall > 0:
            self.cache.evict(shortfall)
        return self.pool.take(count)

    def publish(self, ids: Int32Array, pages: Int32Array) -> Int32Array:
        """Makes a holder's full pages findable, from position 0 on.

        Returns:
            The pages that the holder has from now on. Where the same ids were cached already it gives
            its duplicate back and shares the cached page.
        """
        shared, _ = self.cache.insert(ids, pages)
        self._swap(pages, shared)
        return shared

    def release(self, ids: Int32Array, pages: Int32Array) -> None:
        """Ends one holder's claim to all its pages.

        Args:
            ids: of the full pages whose ids are all known, from position 0; these become findable.
            pages: all of the holder's.
        """
        num_full = len(ids) // self.page_size
        shared, node = self.cache.insert(ids, pages[:num_full])
        self._swap(pages[:num_full], shared)
        self.pool.release(np.concatenate([shared, pages[num_full:]]))
        self.cache.offer(node)

    def _swap(self, pages: Int32Array, shared: Int32Array) -> None:
        changed = pages != shared
        if changed.any():
            self.pool.retain(shared[changed])
            self.pool.release(pages[changed])
