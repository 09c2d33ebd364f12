"""Matrix products, and the embedding, which may share its weight with the head's product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec, Sharding
from tokasaurus.model.linear_methods.registry import make_linear
from tokasaurus.model.placement import Placement

__all__ = ["Embedding", "Linear"]


class _Weights(nn.Module):
    """Implements ``Fillable`` by a linear method, which owns the tensors.

    Args:
        spec: the shape of the weight.
        method: of this shape.
        is_borrowed: another layer fills, releases and restores the method.
    """

    def __init__(self, spec: LinearSpec, method: LinearMethod, *, is_borrowed: bool) -> None:
        super().__init__()
        self.spec, self.method = spec, method
        self.is_borrowed = is_borrowed
        self.is_vocabulary = spec.sharding is Sharding.VOCABULARY

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Implements ``Fillable``."""
        return {} if self.is_borrowed else self.spec.tensors()

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Implements ``Fillable``."""
        self.method.fill(part, kind, tensor)

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        """Implements ``Fillable``."""
        return self.method.own_part(part, kind, tensor)

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        """Implements ``Fillable``."""
        self.method.fill_own(part, kind, own)

    def finish(self) -> None:
        """Implements ``Fillable``."""
        if not self.is_borrowed:
            self.method.finish()

    def release(self) -> None:
        """Implements ``Fillable``."""
        if not self.is_borrowed:
            self.method.release()

    def restore(self) -> None:
        """Implements ``Fillable``."""
        if not self.is_borrowed:
            self.method.restore()


class Linear(_Weights):
    """Declares one matrix product. Its linear method multiplies.

    Args:
        place: where the tensors live, and which method.
        in_size: columns of the weight.
        parts: rows of each of the checkpoint's products by name, in the order of the outputs.
        sharding: how tensor parallelism deals the product to ranks.
        bias: each part has one.
        unit: numbers that stay together on a rank; see ``LinearSpec``.
        tied: the embedding whose linear method this product uses; None if it has its own.
    """

    def __init__(
        self,
        place: Placement,
        in_size: int,
        parts: Mapping[str, int],
        sharding: Sharding,
        *,
        bias: bool = False,
        unit: int = 1,
        tied: Embedding | None = None,
    ) -> None:
        spec = LinearSpec(in_size, parts, bias, sharding, unit)
        method = make_linear(spec, place) if tied is None else tied.method
        super().__init__(spec, method, is_borrowed=tied is not None)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(x)


class Embedding(_Weights):
    """Maps token ids to vectors.

    Args:
        place: where the tensor lives.
        vocab_size: rows of the weight.
        hidden_size: columns.
        multiplied: a tied head multiplies by the weight too.
    """

    def __init__(
        self, place: Placement, vocab_size: int, hidden_size: int, *, multiplied: bool
    ) -> None:
        spec = LinearSpec(hidden_size, {"": vocab_size}, False, Sharding.VOCABULARY)
        method = make_linear(spec, place if multiplied else replace(place, linear="plain"))
        super().__init__(spec, method, is_borrowed=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.method.rows(ids)
