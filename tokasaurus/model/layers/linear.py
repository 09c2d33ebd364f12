"""Matrix products, and the embedding, which may share its weight with the head's product."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tokasaurus.model.linear_methods.base import LinearSpec, Sharding
from tokasaurus.model.linear_methods.plain import PlainLinear
from tokasaurus.model.linear_methods.registry import make_linear
from tokasaurus.model.placement import Placement

__all__ = ["Embedding", "Linear"]


class Linear(nn.Module):
    """Declares one matrix product. Its linear method owns the tensors and multiplies.

    Args:
        place: where the tensors live, and which method.
        in_size: columns of the weight.
        parts: rows of each of the checkpoint's products by name, in the order of the outputs.
        sharding: how tensor parallelism deals the product to ranks.
        bias: each part has one.
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
        tied: Embedding | None = None,
    ) -> None:
        super().__init__()
        self.spec = LinearSpec(in_size, parts, bias, sharding)
        self.is_tied = tied is not None
        self.is_vocabulary = sharding is Sharding.VOCABULARY
        self.method = make_linear(self.spec, place) if tied is None else tied.method

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Implements ``Fillable``."""
        return {} if self.is_tied else self.spec.tensors()

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Implements ``Fillable``."""
        self.method.fill(part, kind, tensor)

    def finish(self) -> None:
        """Implements ``Fillable``."""
        if not self.is_tied:
            self.method.finish()

    def release(self) -> None:
        """Implements ``Fillable``."""
        if not self.is_tied:
            self.method.release()

    def restore(self) -> None:
        """Implements ``Fillable``."""
        if not self.is_tied:
            self.method.restore()

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(x)


class Embedding(nn.Module):
    """Maps token ids to vectors.

    Args:
        place: where the tensor lives.
        vocab_size: rows of the weight.
        hidden_size: columns.
        multiplied: a tied head multiplies by the weight too, so its linear method owns it.
    """

    is_vocabulary = True

    def __init__(
        self, place: Placement, vocab_size: int, hidden_size: int, *, multiplied: bool
    ) -> None:
        super().__init__()
        spec = LinearSpec(hidden_size, {"": vocab_size}, False, Sharding.VOCABULARY)
        self.spec = spec
        self.method = make_linear(spec, place) if multiplied else PlainLinear(spec, place)

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Implements ``Fillable``."""
        return self.spec.tensors()

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Implements ``Fillable``."""
        self.method.fill(part, kind, tensor)

    def finish(self) -> None:
        """Implements ``Fillable``."""
        self.method.finish()

    def release(self) -> None:
        """Implements ``Fillable``."""
        self.method.release()

    def restore(self) -> None:
        """Implements ``Fillable``."""
        self.method.restore()

    def forward(self, ids: Tensor) -> Tensor:
        return self.method.rows(ids)
