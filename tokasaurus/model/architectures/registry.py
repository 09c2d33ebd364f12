"""The table of architectures that can be served. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokasaurus.errors import ModelError
from tokasaurus.model.architectures.base import Architecture
from tokasaurus.model.architectures.llama import Llama
from tokasaurus.model.architectures.qwen import Qwen2, Qwen3

if TYPE_CHECKING:
    from tokasaurus.model.architectures.llama_model import LlamaModel

__all__ = ["ARCHITECTURES", "get_model_cls"]

# By the name in config.json's "architectures".
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Llama(),
    "Qwen2ForCausalLM": Qwen2(),
    "Qwen3ForCausalLM": Qwen3(),
}


def get_model_cls(architecture: str) -> type[LlamaModel]:
    """The class that implements an architecture. Loads torch.

    Raises:
        ModelError: the architecture is not supported.
    """
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture].model_class()
