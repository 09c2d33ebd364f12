"""The parts that decoder architectures are put together from.

Shapes: T tokens of a batch, H query heads, K key/value heads, D head size. A batch is flat: the tokens
of all its sequences one after the other; only attention knows where one sequence ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tokasaurus.model.backend.base import Attention
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.rotary import Rotation, rotate

__all__ = ["Embedding", "GatedMLP", "Linear", "Placement", "RMSNorm", "SelfAttention"]


@dataclass(frozen=True)
class Placement:
    """Where parameters live, and in which dtype."""

    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter; the loader fills it."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(tensor, requires_grad=False)


class Linear(nn.Module):
    """One matrix product for one or several layers of the checkpoint that share their input.

    Args:
        in_size: columns of the weight.
        *parts: rows of each checkpoint layer, in the order of the outputs.
    """

    def __init__(self, place: Placement, in_size: int, *parts: int, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.weight = place.empty(sum(parts), in_size)
        self.bias = place.empty(sum(parts)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids to vectors. The same weight may be the head's, see ``Linear``."""

    def __init__(self, place: Placement, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.parts = (vocab_size,)
        self.weight = place.empty(vocab_size, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; the mean is taken in fp32."""

    def __init__(self, place: Placement, size: int, eps: float) -> None:
        super().__init__()
        self.parts = (size,)
        self.weight = place.empty(size)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values from one product.

    Args:
        layer: index of the layer, which names its part of the KV cache.
        qkv_bias: biases on queries, keys and values.
        output_bias: a bias on the output.
        qk_norm: queries and keys are normalised per head before the rotation, as in Qwen3.
    """

    def __init__(
        self,
        config: ModelConfig,
        place: Placement,
        layer: int,
        *,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(place, config.hidden_size, size, kv_size, kv_size, bias=qkv_bias)
        self.output = Linear(place, size, config.hidden_size, bias=output_bias)
        self.query_norm = self.key_norm = None
        if qk_norm:
            self.query_norm = RMSNorm(place, config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(place, config.head_dim, config.rms_norm_eps)
        self._layer = layer
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._head_dim = config.head_dim

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """x: [T, hidden]; returns the same shape."""
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


class GatedMLP(nn.Module):
    """SwiGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202; gate and up from one product."""

    def __init__(self, config: ModelConfig, place: Placement, *, bias: bool) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up = Linear(place, config.hidden_size, inner, inner, bias=bias)
        self.down = Linear(place, inner, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result
