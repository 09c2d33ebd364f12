"""Where users of the Python interface look for ``EngineConfig``; it lives in ``tokasaurus.config``."""

from tokasaurus.config.engine import EngineConfig

__all__ = ["EngineConfig"]
