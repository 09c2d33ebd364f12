"""Groups for Hydragen, under the name that users know; they are in ``tokasaurus.manager.kv``."""

from tokasaurus.manager.kv.prefix_groups import GroupFinder, Groups

__all__ = ["GroupFinder", "Groups"]
