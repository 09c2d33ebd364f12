"""The page allocator, under the name that users know; it is in ``tokasaurus.manager.kv``."""

from tokasaurus.manager.kv.allocator import PageAllocator

__all__ = ["PageAllocator"]
