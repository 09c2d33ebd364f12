"""Offers ``EngineConfig``, which is defined in ``tokasaurus.config``, under its public name."""

from tokasaurus.config.engine import EngineConfig

__all__ = ["EngineConfig"]
