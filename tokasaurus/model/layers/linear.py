"""Matrix products, and the embedding, which may share its weight with the head's product."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tokasaurus.model.layers.placement import Placement

__all__ = ["Embedding", "Linear"]


class Linear(nn.Module):
    """One matrix product for one or more of the checkpoint's products that share their input.

    Args:
        in_size: columns of the weight.
        *parts: rows of each of the checkpoint's products, in the order of the outputs.
    """

    def __init__(self, place: Placement, in_size: int, *parts: int, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.weight = place.empty(sum(parts), in_size)
        self.bias = place.empty(sum(parts)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Maps token ids to vectors. A tied head uses the same weight."""

    def __init__(self, place: Placement, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.parts = (vocab_size,)
        self.weight = place.empty(vocab_size, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
