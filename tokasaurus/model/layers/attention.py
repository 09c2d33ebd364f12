"""Self-attention of a decoder layer; a backend does the attending.

Shapes: T tokens of a batch, H query heads, K key/value heads, D head size. A batch is flat: it
holds the tokens of all its sequences, one sequence after the other. Only the backend knows where
one ends.
"""

from __future__ import annotations

from torch import Tensor, nn

from tokasaurus.model.backend.base import Attention, HeadNorms, Rotation
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.linear import Linear
from tokasaurus.model.layers.norm import RMSNorm
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
            unit=config.head_dim,
        )
        self.output = Linear(
            place,
            size,
            {"": config.hidden_size},
            Sharding.INPUTS,
            bias=config.output_bias,
            unit=config.head_dim,
        )
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = RMSNorm(place, config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(place, config.head_dim, config.rms_norm_eps)
        self._layer = layer
        self._head_dim = config.head_dim

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """Maps [T, hidden] to the same shape."""
        #   one row of the product:  │ q heads (H) │ k heads (K) │ v heads (K) │
        # With several ranks these are the heads of this one.
        product = self.qkv(x)
        heads = product.view(len(product), product.shape[1] // self._head_dim, self._head_dim)
        mixed = attention.attend(self._layer, heads, rotation, self._norms())
        result: Tensor = self.output(mixed)
        return result

    def _norms(self) -> HeadNorms | None:
        if self.query_norm is None or self.key_norm is None:
            return None
        return HeadNorms(self.query_norm.weight, self.key_norm.weight, self.query_norm.eps)
