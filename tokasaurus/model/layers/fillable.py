"""The seam between layers and the weights of a checkpoint."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Fillable"]


@runtime_checkable
class Fillable(Protocol):
    """A layer whose tensors come from a checkpoint.

    A tensor is named by its part and its kind. A part is one of the checkpoint's products where
    the layer joins several, else "". A kind is "weight" or "bias".
    """

    @property
    def is_vocabulary(self) -> bool:
        """Each tensor has one row per token id. A checkpoint may have padding rows behind them."""
        ...

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """The shape of each tensor, by part and kind. Empty if another layer owns them."""
        ...

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Takes one tensor, of that shape; it may have another dtype or device."""
        ...

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        """What ``fill`` takes of a tensor: a view, for ``fill_own``; None if it takes nothing."""
        ...

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        """Does what ``fill`` does, with an ``own_part``."""
        ...

    def finish(self) -> None:
        """Every tensor has been filled."""
        ...

    def release(self) -> None:
        """Frees the memory of its tensors; see ``LinearMethod``."""
        ...

    def restore(self) -> None:
        """Allocates what was released, before it is filled."""
        ...
