"""The page allocator, where the architecture notes say; it is in ``tokasaurus.manager.kv``."""

from tokasaurus.manager.kv.allocator import PageAllocator

__all__ = ["PageAllocator"]
