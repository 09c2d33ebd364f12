"""Normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokasaurus.model import storage
from tokasaurus.model.placement import Placement

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, with the mean in fp32."""

    is_vocabulary = False

    def __init__(self, place: Placement, size: int, eps: float) -> None:
        super().__init__()
        self.weight = place.empty(size)
        self._eps = eps

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Implements ``Fillable``."""
        return {("", "weight"): tuple(self.weight.shape)}

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Implements ``Fillable``."""
        self.weight.copy_(tensor)

    def finish(self) -> None:
        """Implements ``Fillable``."""

    def release(self) -> None:
        """Implements ``Fillable``."""
        storage.release(self.weight)

    def restore(self) -> None:
        """Implements ``Fillable``."""
        storage.restore(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)
