"""Llama 3.x, and whatever else has its shape (Llama 2, SmolLM, many fine-tunes)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from tokasaurus.model.backend.base import Attention
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.attention import SelfAttention
from tokasaurus.model.layers.linear import Embedding, Linear
from tokasaurus.model.layers.mlp import GatedMLP
from tokasaurus.model.layers.norm import RMSNorm
from tokasaurus.model.layers.placement import Placement
from tokasaurus.model.layers.rotary import Rotary, Rotation

__all__ = ["LlamaLayer", "LlamaModel"]


class LlamaLayer(nn.Module):
    """Pre-norm attention, then a gated MLP, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        place: Placement,
        layer: int,
        *,
        qkv_bias: bool,
        output_bias: bool,
        mlp_bias: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(place, config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(
            config, place, layer, qkv_bias=qkv_bias, output_bias=output_bias, qk_norm=qk_norm
        )
        self.mlp_norm = RMSNorm(place, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, place, bias=mlp_bias)

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, attention)
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class LlamaModel(nn.Module):
    """Token ids to hidden states; the head turns chosen rows of those into logits.

    Args:
        config: sizes.
        place: dtype and device of the parameters, which the loader fills.
    """

    # Module of ours -> the checkpoint's modules whose rows it holds, in order; {} is the layer's number.
    # Each has a weight, and a bias where ours has one.
    WEIGHTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "embedding": ("model.embed_tokens",),
        "layers.{}.attention_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.attention.qkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "layers.{}.attention.output": ("model.layers.{}.self_attn.o_proj",),
        "layers.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.mlp.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        "layers.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    }

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        self.embedding = Embedding(place, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.make_layer(config, place, layer) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(place, config.hidden_size, config.rms_norm_eps)
        self.head: Embedding | Linear = self.embedding
        if not config.tie_word_embeddings:
            self.head = Linear(place, config.hidden_size, config.vocab_size)
        self._rotary = Rotary(config.rope, config.head_dim, place.device)

    def make_layer(self, config: ModelConfig, place: Placement, layer: int) -> LlamaLayer:
        """What architectures of this shape differ in."""
        return LlamaLayer(
            config,
            place,
            layer,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            qk_norm=False,
        )

    def forward(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """One pass over a flat batch.

        Args:
            ids: [tokens] int64.
            positions: [tokens] int64, of each token within its sequence.
            attention: the batch's; also keeps its keys and values.

        Returns:
            Hidden states after the last norm, [tokens, hidden].
        """
        rotation = self._rotary(positions)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, rotation, attention)
        result: Tensor = self.norm(x)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocabulary], in the model's dtype."""
        return nn.functional.linear(hidden, self.head.weight)
