"""Qwen2 and Qwen2.5 (Llama with biases on queries, keys and values), and dense Qwen3 (with norms
on queries and keys). Loads no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from tokasaurus.model.architectures.llama import Llama
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.json_fields import JsonFields

__all__ = ["Qwen2", "Qwen3"]


class Qwen2(Llama):
    """Implements ``Architecture``. Biases are part of the architecture; no field asks for them."""

    model_type: ClassVar[str] = "qwen2"
    default_positions: ClassVar[int] = 32768

    def parse(self, fields: JsonFields, rope_scaling: JsonFields | None) -> ModelConfig:
        config = super().parse(fields, rope_scaling)
        return replace(config, qkv_bias=True, output_bias=False, mlp_bias=False)


class Qwen3(Llama):
    """Implements ``Architecture``."""

    model_type: ClassVar[str] = "qwen3"
    default_positions: ClassVar[int] = 32768
    default_head_dim: ClassVar[int | None] = 128

    def parse(self, fields: JsonFields, rope_scaling: JsonFields | None) -> ModelConfig:
        return replace(super().parse(fields, rope_scaling), mlp_bias=False, qk_norm=True)
