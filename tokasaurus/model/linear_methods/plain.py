"""Weights in the checkpoint's layout, multiplied by torch."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.placement import Placement

__all__ = ["PlainLinear"]


class PlainLinear(LinearMethod):
    """``F.linear``. Runs on every device; the other methods are compared with it.

    Args:
        spec: the product.
        place: dtype and device of the tensors.
        tied: [out, in], the weight of another module, which fills it; None if it has its own.
    """

    def __init__(self, spec: LinearSpec, place: Placement, tied: Tensor | None = None) -> None:
        self._spec = spec
        self.weight = place.empty(spec.out_size, spec.in_size) if tied is None else tied
        self.bias = place.empty(spec.out_size) if spec.bias else None

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        whole = self.weight if kind == "weight" else self.bias
        assert whole is not None
        whole[self._spec.rows(part)].copy_(tensor)

    def finish(self) -> None:
        """Does nothing: each tensor is in its place."""

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
