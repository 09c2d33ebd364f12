"""The device and dtype of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """The device and dtype of a model's parameters."""

    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter; the loader fills it."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(tensor, requires_grad=False)
