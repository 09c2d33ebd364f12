"""Which architectures can be served, and where each is implemented. Loads no torch by itself."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tokasaurus.errors import ModelError

if TYPE_CHECKING:
    from tokasaurus.model.architectures.llama import LlamaModel

__all__ = ["ARCHITECTURES", "get_model_cls"]

# The name in config.json's "architectures" -> module and class.
ARCHITECTURES = {
    "LlamaForCausalLM": ("tokasaurus.model.architectures.llama", "LlamaModel"),
    "Qwen2ForCausalLM": ("tokasaurus.model.architectures.qwen", "Qwen2Model"),
    "Qwen3ForCausalLM": ("tokasaurus.model.architectures.qwen", "Qwen3Model"),
}


def get_model_cls(architecture: str) -> type[LlamaModel]:
    """The class that implements an architecture; imports torch.

    Raises:
        ModelError: for an architecture that is not supported.
    """
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    module, name = ARCHITECTURES[architecture]
    cls: type[LlamaModel] = getattr(importlib.import_module(module), name)
    return cls
