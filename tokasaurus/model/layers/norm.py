"""Normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokasaurus.model.layers.placement import Placement

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, with the mean in fp32."""

    def __init__(self, place: Placement, size: int, eps: float) -> None:
        super().__init__()
        self.parts = (size,)
        self.weight = place.empty(size)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)
