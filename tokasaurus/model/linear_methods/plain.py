"""Weights in the checkpoint's layout, multiplied by torch."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model import storage
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
        self._is_tied = tied is not None
        self.weight = place.empty(spec.out_size, spec.in_size) if tied is None else tied
        self.bias = place.empty(spec.out_size) if spec.bias else None

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        whole = self.weight if kind == "weight" else self.bias
        assert whole is not None
        whole[self._spec.rows(part)].copy_(tensor)

    def finish(self) -> None:
        """Does nothing: each tensor is in its place."""

    def release(self) -> None:
        storage.release(*self._own_tensors())

    def restore(self) -> None:
        storage.restore(*self._own_tensors())

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _own_tensors(self) -> list[Tensor]:
        weights = [] if self._is_tied else [self.weight]
        return weights if self.bias is None else [*weights, self.bias]
