"""Groups for Hydragen, where the architecture notes say; they are in ``tokasaurus.manager.kv``."""

from tokasaurus.manager.kv.prefix_groups import GroupFinder, Groups

__all__ = ["GroupFinder", "Groups"]
