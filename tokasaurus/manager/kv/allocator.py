"""Gives out KV pages: free ones first, then the least recently used of those without a user.

Joins the page pool, the prefix cache, and pins. A *pin* holds pages without being a sequence. While
it is in use its pages stay. When it is idle it may be evicted, always as a whole, and with it what
the prefix cache has behind it. Leaves of the prefix cache and idle pins go in one order, the least
recently used first. What ``num_available`` promises, ``allocate`` delivers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tokasaurus.manager.kv.page_pool import PagePool
from tokasaurus.manager.kv.prefix_cache import PrefixCache
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array

__all__ = ["PageAllocator", "Pin"]


@dataclass(eq=False, slots=True, kw_only=True)
class Pin:
    """A holder of pages that is not a sequence.

    Attributes:
        first_id: that no prefix but those behind these pages begins with.
        pages: that it holds; none if it was not given any, or has been evicted.
        last_used: the clock of the prefix cache when it became idle.
    """

    first_id: int
    pages: Int32Array = field(default_factory=lambda: EMPTY_INT32)
    last_used: int = 0

    def evicted(self) -> None:
        """It has lost its pages."""
        self.pages = EMPTY_INT32


class PageAllocator:
    """The KV pages of one replica.

    Pages are looked up, published and released in a namespace, which stands for the weights that
    computed them. What is published or released in a closed namespace is not found any more.

    Attributes:
        num_pinned: pages of pins in use.
        num_idle: pages of idle pins.

    Args:
        num_pages: pages are numbered 0 .. num_pages - 1.
        page_size: tokens.
        namespace: the first one that is open.
    """

    def __init__(self, num_pages: int, page_size: int, namespace: int = 0) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool, page_size)
        self.num_pinned = 0
        self.num_idle = 0
        self._idle: dict[Pin, None] = {}  # the least recently used first
        self.cache.open(namespace)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free, or without a user."""
        return self.pool.num_free + self.pool.num_evictable + self.num_idle

    @property
    def num_held(self) -> int:
        """Pages that sequences hold, without those that are pinned anyway."""
        return self.pool.num_pages - self.num_available - self.num_pinned

    def lookup(self, namespace: int, prompt_ids: Int32Array) -> Int32Array:
        """Returns the cached pages of a prompt; its last token is always computed."""
        return self.cache.lookup(namespace, prompt_ids, (len(prompt_ids) - 1) // self.page_size)

    def lookup_whole(self, namespace: int, prompt_ids: Int32Array) -> Int32Array:
        """Returns the pages of a prompt that ends with a page, if all are cached; else none."""
        num_pages, rest = divmod(len(prompt_ids), self.page_size)
        if rest:
            return EMPTY_INT32
        pages = self.cache.lookup(namespace, prompt_ids, num_pages)
        return pages if len(pages) == num_pages else EMPTY_INT32

    def num_needed(self, cached_pages: Int32Array, num_new: int) -> int:
        """By how much ``num_available`` shrinks if these cached and new pages get a holder."""
        return num_new + (self.pool.num_unreferenced(cached_pages) if len(cached_pages) else 0)

    def retain(self, pages: Int32Array, num_holders: int = 1) -> None:
        """Adds holders to each of these pages, which are cached or have one already."""
        if len(pages):
            self.pool.retain(pages, num_holders)

    def allocate(self, count: int) -> Int32Array:
        """Returns private pages.

        Raises:
            ProtocolError: ``num_available`` is smaller.
        """
        shortfall = count - self.pool.num_free
        if shortfall > 0:
            self._evict(shortfall)
        return self.pool.take(count)

    def _evict(self, count: int) -> None:
        """Frees at least ``count`` pages."""
        while self._idle:
            pin = next(iter(self._idle))
            count -= self.cache.evict_used_until(pin.last_used, count)
            if count <= 0:
                return
            count -= self.unpin(pin)
            if count <= 0:
                return
        self.cache.evict(count)

    def flush(self) -> int:
        """Frees every cached page that has no holder; returns their number. Pins stay."""
        num_pages = self.pool.num_evictable
        self.cache.evict(num_pages)
        return num_pages

    # --- pins -------------------------------------------------------------------------------------

    def pin(self, pin: Pin, count: int) -> None:
        """Gives private pages to a pin that has none; it is in use.

        Raises:
            ProtocolError: ``num_available`` is smaller.
        """
        pin.pages = self.allocate(count)
        self.num_pinned += count

    def keep(self, pin: Pin) -> None:
        """An idle pin is in use again."""
        del self._idle[pin]
        self.num_idle -= len(pin.pages)
        self.num_pinned += len(pin.pages)

    def let_go(self, pin: Pin) -> None:
        """A pin in use is idle from now on: nothing else holds its pages."""
        self._idle[pin] = None
        pin.last_used = self.cache.clock
        self.num_pinned -= len(pin.pages)
        self.num_idle += len(pin.pages)

    def unpin(self, pin: Pin) -> int:
        """Takes the pages of an idle pin, and forgets all prefixes that begin with its id.

        Returns:
            The number of pages that this frees.
        """
        del self._idle[pin]
        self.num_idle -= len(pin.pages)
        num_free = self.pool.num_free
        self.pool.release(pin.pages)
        self.cache.drop(pin.first_id)
        pin.evicted()
        return self.pool.num_free - num_free

    # --- namespaces -------------------------------------------------------------------------------

    def replace_namespace(self, old: int, new: int) -> int:
        """Closes a namespace and opens another; returns the number of pages that this frees."""
        num_freed = self.cache.close(old)
        self.cache.open(new)
        return num_freed

    def publish(
        self,
        namespace: int,
        ids: Int32Array,
        pages: Int32Array,
        num_published: int,
        num_holders: int = 1,
    ) -> Int32Array | None:
        """Makes full pages findable, from position 0 on.

        Args:
            namespace: where they are found.
            ids: of ``len(pages)`` full pages.
            pages: where their KV is.
            num_published: leading pages that were published, or found in the cache, before.
            num_holders: of the other pages.

        Returns:
            The pages that the holders have from now on, if the same ids were cached in the
            meantime: the duplicates are given back, and the cached ones shared. None if all stay as
            they are.
        """
        if namespace not in self.cache.roots:
            return None
        num_found, _ = self.cache.insert(namespace, ids, pages)
        if num_found < len(pages):
            self.pool.mark_cached(pages[num_found:])
        if num_found == num_published:
            return None
        shared = self.cache.lookup(namespace, ids, len(pages))
        changed = pages != shared
        self.pool.retain(shared[changed], num_holders)
        self.pool.release(np.repeat(pages[changed], num_holders))
        return shared

    def release(self, holders: Iterable[tuple[int, Int32Array, Int32Array]]) -> None:
        """Gives back all pages of these holders; full pages of known ids become findable.

        Args:
            holders: for each, its namespace, the ids of its leading full pages of known ids, and
                all its pages.
        """
        tables, nodes, new = [], [], []
        roots = self.cache.roots
        for namespace, ids, pages in holders:
            tables.append(pages)
            if namespace not in roots:
                continue
            known = pages[: len(ids) // self.page_size]
            num_found, node = self.cache.insert(namespace, ids, known)
            if num_found < len(known):
                new.append(known[num_found:])
            nodes.append(node)
        if new:
            self.pool.mark_cached(np.concatenate(new))
        self.pool.release(np.concatenate(tables))
        for node in nodes:
            self.cache.offer(node)
