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
    """

    def __init__(self, spec: LinearSpec, place: Placement) -> None:
        self._spec = spec
        self._memory = place.memory
        self.weight = place.empty(spec.out_size, spec.in_size)
        self.bias = place.empty(spec.out_size) if spec.bias else None

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        whole = self.weight if kind == "weight" else self.bias
        assert whole is not None
        whole[self._spec.rows(part)].copy_(tensor)

    def finish(self) -> None:
        """Does nothing: each tensor is in its place."""

    def release(self) -> None:
        self._memory.release(*self._tensors())

    def restore(self) -> None:
        self._memory.restore(*self._tensors())

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def _tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]
