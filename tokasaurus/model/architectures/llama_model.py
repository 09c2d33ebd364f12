"""Llama's modules, and those of all architectures that differ in biases and norms only."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from tokasaurus.model.backend.base import Attention, Rotation
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.attention import SelfAttention
from tokasaurus.model.layers.linear import Embedding, Linear
from tokasaurus.model.layers.mlp import GatedMLP
from tokasaurus.model.layers.norm import RMSNorm
from tokasaurus.model.layers.rotary import Rotary
from tokasaurus.model.linear_methods.base import Sharding
from tokasaurus.model.placement import Placement

__all__ = ["LlamaLayer", "LlamaModel"]


class LlamaLayer(nn.Module):
    """Pre-norm attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, place: Placement, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(place, config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, place, layer)
        self.mlp_norm = RMSNorm(place, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, place)

    def forward(
        self, stream: Tensor, update: Tensor | None, rotation: Rotation, attention: Attention
    ) -> Tensor:
        """Runs the layer.

        Args:
            stream: the residual stream, [tokens, hidden]; it is changed.
            update: of the layer before, which is not yet added to the stream. None if there is
                none.
            rotation: of this batch.
            attention: of this batch.

        Returns:
            The layer's own update, which is not yet added to the stream.
        """
        norm = self.attention_norm
        normed = norm(stream) if update is None else norm.of_sum(stream, update)
        mixed = self.attention(normed, rotation, attention)
        result: Tensor = self.mlp(self.mlp_norm.of_sum(stream, mixed))
        return result


class LlamaModel(nn.Module):
    """Turns token ids into hidden states, and chosen rows of those into logits.

    A *stage* is a model with a range of the layers. The first stage has the embedding, the last one
    the last norm and the head, and the hidden states of each are the input of the next.

    Args:
        config: the shape of the whole model.
        place: dtype and device of the parameters, which the loader fills.
        stage: the numbers of its layers, at least one; None is the whole model.
    """

    # Our layer -> the checkpoint's layer that fills it, or one for each of our layer's parts. {} is
    # the layer's number. Each has a weight, and a bias where ours has one. A model skips what it
    # lacks.
    WEIGHTS: ClassVar[dict[str, str | dict[str, str]]] = {
        "embedding": "model.embed_tokens",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.attention.qkv": {
            "query": "model.layers.{}.self_attn.q_proj",
            "key": "model.layers.{}.self_attn.k_proj",
            "value": "model.layers.{}.self_attn.v_proj",
        },
        "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
        "layers.{}.attention.output": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.gate_up": {
            "gate": "model.layers.{}.mlp.gate_proj",
            "up": "model.layers.{}.mlp.up_proj",
        },
        "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    }

    def __init__(self, config: ModelConfig, place: Placement, stage: range | None = None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        stage = range(config.num_layers) if stage is None else stage
        self.is_first = stage.start == 0
        self.is_last = stage.stop == config.num_layers
        self.has_tied_head = config.tie_word_embeddings
        is_tied = self.is_last and self.has_tied_head
        if self.is_first or is_tied:
            self.embedding = Embedding(
                place, config.vocab_size, config.hidden_size, multiplied=is_tied
            )
        # By the layer's number in the checkpoint; in the KV cache, the stage's first is number 0.
        self.layers = nn.ModuleDict(
            {str(number): LlamaLayer(config, place, index) for index, number in enumerate(stage)}
        )
        if self.is_last:
            self.norm = RMSNorm(place, config.hidden_size, config.rms_norm_eps)
            self.head = Linear(
                place,
                config.hidden_size,
                {"": config.vocab_size},
                Sharding.VOCABULARY,
                tied=self.embedding if is_tied else None,
            )
        self.rotary = Rotary(config.rope, config.head_dim, place.device)

    def forward(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Runs one pass over a flat batch.

        Args:
            x: ids, [tokens] int64; of a stage but the first, hidden states, [tokens, hidden],
                which are changed.
            positions: [tokens] int64, the position of each token in its sequence.
            attention: of this batch; it also stores the batch's keys and values.

        Returns:
            Hidden states, [tokens, hidden]; of the last stage, after the last norm.
        """
        stream, rotation = self.enter(x, positions)
        update = self.run_layers(stream, rotation, attention)
        return self.leave(stream, update)

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """The residual stream before the layers, and the angles; see ``forward``."""
        return self.embedding(x) if self.is_first else x, self.rotary(positions)

    def run_layers(self, stream: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """Changes the stream. Returns the last layer's update, which is not yet added to it."""
        update: Tensor | None = None
        for layer in self.layers.values():
            update = layer(stream, update, rotation, attention)
        assert update is not None  # a stage has a layer
        return update

    def leave(self, stream: Tensor, update: Tensor) -> Tensor:
        """The hidden states; see ``forward``."""
        if not self.is_last:
            return stream + update
        hidden: Tensor = self.norm.of_sum(stream, update)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Turns [rows, hidden] of the last stage into [rows, vocabulary], in the model's dtype."""
        result: Tensor = self.head(hidden)
        return result
