"""Normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from tokasaurus.model.placement import Placement

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """The weight of ``Operators.rms_norm``."""

    is_vocabulary = False

    def __init__(self, place: Placement, size: int, eps: float) -> None:
        super().__init__()
        self._memory = place.memory
        self.weight = place.empty(size)
        self.eps = eps
        self._operators = place.operators

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Implements ``Fillable``."""
        return {("", "weight"): tuple(self.weight.shape)}

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Implements ``Fillable``."""
        self.weight.copy_(tensor)

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        """Implements ``Fillable``."""
        return tensor

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        """Implements ``Fillable``."""
        self.weight.copy_(own)

    def finish(self) -> None:
        """Implements ``Fillable``."""

    def release(self) -> None:
        """Implements ``Fillable``."""
        self._memory.release(self.weight)

    def restore(self) -> None:
        """Implements ``Fillable``."""
        self._memory.restore(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._operators.rms_norm(x, self.weight, self.eps)

    def of_sum(self, stream: Tensor, added: Tensor) -> Tensor:
        """Adds to the residual stream in place, and returns the norm of the sum."""
        return self._operators.add_rms_norm(stream, added, self.weight, self.eps)
