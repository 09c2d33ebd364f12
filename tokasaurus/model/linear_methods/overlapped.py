"""A rank's part of a product that overlaps with what ranks exchange, in large batches."""

from __future__ import annotations

from torch import Tensor

from tokasaurus.model.linear_methods.base import LinearSpec, Sharding
from tokasaurus.model.linear_methods.plain import PlainLinear
from tokasaurus.model.linear_methods.sharded import ShardedLinear, share_of
from tokasaurus.model.parallel.async_tp import Overlap
from tokasaurus.model.placement import Placement

__all__ = ["OverlappedLinear"]


class OverlappedLinear(ShardedLinear):
    """Does what ``ShardedLinear`` does, and overlaps while ``Overlap.is_on``.

    Then a rank's rows come in with OUTPUTS, and go out with INPUTS.

    Args:
        spec: the whole product, not of a vocabulary.
        place: of this rank's part.
        overlap: of the ranks.
    """

    def __init__(self, spec: LinearSpec, place: Placement, overlap: Overlap) -> None:
        share = share_of(spec, place.parallel.rank, place.parallel.size)
        self._plain = PlainLinear(share.spec, place)
        super().__init__(share, self._plain, place.parallel)
        self._overlap, self._memory = overlap, place.memory
        # Each rank adds the bias to its own rows.
        has_bias = spec.bias and spec.sharding is Sharding.INPUTS
        self._bias = place.empty(spec.out_size) if has_bias else None

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        is_whole = kind == "bias" and self._bias is not None
        return tensor if is_whole else super().own_part(part, kind, tensor)

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        if kind == "bias" and self._bias is not None:
            self._bias.copy_(own)
            if not self.spec.bias:  # the rank that adds it while nothing overlaps is another one
                return
        super().fill_own(part, kind, own)

    def release(self) -> None:
        super().release()
        if self._bias is not None:
            self._memory.release(self._bias)

    def restore(self) -> None:
        super().restore()
        if self._bias is not None:
            self._memory.restore(self._bias)

    def apply(self, x: Tensor) -> Tensor:
        if not self._overlap.is_on:
            return super().apply(x)
        weight = self._plain.weight
        if self.spec.sharding is Sharding.INPUTS:
            product, bias = self._overlap.multiply_scatter(x, weight), self._bias
        else:
            product, bias = self._overlap.gather_multiply(x, weight), self._plain.bias
        return product if bias is None else product + bias
