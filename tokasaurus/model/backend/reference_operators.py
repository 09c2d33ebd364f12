"""The element-wise work of a layer in plain torch: the definition of each operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.backend.base import HeadNorms, Rotation

__all__ = ["REFERENCE_OPERATORS", "ReferenceOperators", "norm_and_rotate"]


class ReferenceOperators:
    """Implements ``Operators``."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)

    def add_rms_norm(self, stream: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(stream.add_(added), weight, eps)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


REFERENCE_OPERATORS = ReferenceOperators()


def norm_and_rotate(
    heads: Tensor, num_heads: int, num_kv_heads: int, rotation: Rotation, norms: HeadNorms | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prepares one layer's heads for attention.

    Args:
        heads: as for ``Attention.attend``.
        num_heads: query heads.
        num_kv_heads: key heads, and as many value heads.
        rotation: of these rows.
        norms: of queries and keys.

    Returns:
        Query, key and value, each [rows, its heads, head_dim].
    """
    num_rotated = num_heads + num_kv_heads
    rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
    if norms is not None:
        query = REFERENCE_OPERATORS.rms_norm(rotated[:, :num_heads], norms.query, norms.eps)
        key = REFERENCE_OPERATORS.rms_norm(rotated[:, num_heads:], norms.key, norms.eps)
        rotated = torch.cat((query, key), dim=1)
    rotated = _rotate(rotated, rotation)
    return rotated[:, :num_heads], rotated[:, num_heads:], value


def _rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotates [rows, heads, head_dim], pairing component i with i + head_dim / 2.

    The product is in fp32, whatever the dtype of the heads.
    """
    left, right = heads.chunk(2, dim=-1)
    cos, sin = rotation
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return rotated.to(heads.dtype)
