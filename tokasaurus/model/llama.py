"""Llama, where the architecture notes say; it is in ``tokasaurus.model.architectures``."""

from tokasaurus.model.architectures.llama import LlamaModel

__all__ = ["LlamaModel"]
