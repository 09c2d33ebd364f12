"""Llama's model under its name in older notes on the architecture."""

from tokasaurus.model.architectures.llama_model import LlamaModel

__all__ = ["LlamaModel"]
