"""Where a model's tensors live, in which dtype, and how they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """The device and dtype of a model's tensors.

    Attributes:
        dtype: of weights, activations and KV.
        device: of all of these.
        linear: the name of the linear method, see ``linear_methods.registry``.
    """

    dtype: torch.dtype
    device: torch.device
    linear: str = "plain"

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
