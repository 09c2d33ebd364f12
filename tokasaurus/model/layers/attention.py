"""Self-attention of a decoder layer; a backend does the attending.

Shapes: T tokens of a batch, H query heads, K key/value heads, D head size. A batch is flat: it
holds the tokens of all its sequences, one sequence after the other. Only the backend knows where
one ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokasaurus.model.backend.base import Attention
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.linear import Linear
from tokasaurus.model.layers.norm import RMSNorm
from tokasaurus.model.layers.rotary import Rotation, rotate
from tokasaurus.model.linear_methods.base import Sharding
from tokasaurus.model.placement import Placement

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; one product makes queries, keys and values.

    Args:
        layer: the layer's index, which selects its part of the KV cache.
    """

    def __init__(self, config: ModelConfig, place: Placement, layer: int) -> None:
        super().__init__()
        size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            place,
            config.hidden_size,
            {"query": size, "key": kv_size, "value": kv_size},
            Sharding.OUTPUTS,
            bias=config.qkv_bias,
        )
        self.output = Linear(
            place, size, {"": config.hidden_size}, Sharding.INPUTS, bias=config.output_bias
        )
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = RMSNorm(place, config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(place, config.head_dim, config.rms_norm_eps)
        self._layer = layer
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._head_dim = config.head_dim

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """Maps [T, hidden] to the same shape."""
        #   one row of the product:  │ q heads (H) │ k heads (K) │ v heads (K) │
        num_rotated = self._num_heads + self._num_kv_heads
        heads = self.qkv(x).view(len(x), num_rotated + self._num_kv_heads, self._head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(rotated[:, : self._num_heads])
            key = self.key_norm(rotated[:, self._num_heads :])
            rotated = torch.cat((query, key), dim=1)
        rotated = rotate(rotated, rotation)
        query, key = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
        mixed = attention.attend(self._layer, query, key, value)
        result: Tensor = self.output(mixed.view(len(x), -1))
        return result
