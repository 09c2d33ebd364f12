"""Qwen, where the architecture notes say; it is in ``tokasaurus.model.architectures``."""

from tokasaurus.model.architectures.qwen import Qwen2Model, Qwen3Model

__all__ = ["Qwen2Model", "Qwen3Model"]
