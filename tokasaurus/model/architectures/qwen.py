"""Qwen2, Qwen2.5 (Llama with biases on queries, keys and values) and Qwen3 (with norms on queries and keys)."""

from __future__ import annotations

from typing import ClassVar

from tokasaurus.model.architectures.llama import LlamaLayer, LlamaModel
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.placement import Placement

__all__ = ["Qwen2Model", "Qwen3Model"]


class Qwen2Model(LlamaModel):
    """Qwen2 and Qwen2.5."""

    def make_layer(self, config: ModelConfig, place: Placement, layer: int) -> LlamaLayer:
        return LlamaLayer(
            config,
            place,
            layer,
            qkv_bias=True,
            output_bias=False,
            mlp_bias=False,
            qk_norm=False,
        )


class Qwen3Model(LlamaModel):
    """Qwen3, dense."""

    WEIGHTS: ClassVar[dict[str, tuple[str, ...]]] = {
        **LlamaModel.WEIGHTS,
        "layers.{}.attention.query_norm": ("model.layers.{}.self_attn.q_norm",),
        "layers.{}.attention.key_norm": ("model.layers.{}.self_attn.k_norm",),
    }

    def make_layer(self, config: ModelConfig, place: Placement, layer: int) -> LlamaLayer:
        return LlamaLayer(
            config,
            place,
            layer,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=False,
            qk_norm=True,
        )
