"""One rank's part of a product that several ranks share: tensor parallelism, outside the layers.

Shoeybi et al. 2019, Megatron-LM, https://arxiv.org/abs/1909.08053::

    OUTPUTS       each rank has some rows of each part      its results are columns of the whole
    INPUTS        each rank has some columns                the results of all ranks are added up
    VOCABULARY    each rank has a range of ids              rank 0 gets the columns of all

What OUTPUTS gives to a rank are the columns that the next product's INPUTS takes there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokasaurus.model.linear_methods.base import (
    LinearMethod,
    LinearSpec,
    Sharding,
    WrappedLinear,
)
from tokasaurus.model.parallel.tensor_parallel import TensorParallel, dealt, ranges

__all__ = ["ShardedLinear", "Share", "share_of"]


@dataclass(frozen=True)
class Share:
    """One rank's part of a product.

    Attributes:
        spec: of the part, as a product of its own.
        rows: of each part's weight.
        columns: of the weight.
        ids: of a vocabulary, those of each rank; else empty.
    """

    spec: LinearSpec
    rows: dict[str, slice]
    columns: slice
    ids: tuple[range, ...] = ()


def share_of(spec: LinearSpec, rank: int, size: int) -> Share:
    """The part of a rank among ``size``.

    Raises:
        ValueError: the units of a part cannot be dealt to these ranks.
    """
    whole = slice(None)
    if spec.sharding is Sharding.VOCABULARY:
        (part, count), *others = spec.parts.items()
        assert not others
        ids = ranges(count, size)
        own = ids[rank]
        local = replace(spec, parts={part: len(own)})
        return Share(local, {part: slice(own.start, own.stop)}, whole, tuple(ids))
    if spec.sharding is Sharding.INPUTS:
        columns = _numbers(spec.in_size, spec.unit, rank, size)
        # The bias is added once.
        local = replace(spec, in_size=columns.stop - columns.start, bias=spec.bias and rank == 0)
        return Share(local, dict.fromkeys(spec.parts, whole), columns)
    rows = {part: _numbers(count, spec.unit, rank, size) for part, count in spec.parts.items()}
    sizes = {part: own.stop - own.start for part, own in rows.items()}
    return Share(replace(spec, parts=sizes), rows, whole)


def _numbers(count: int, unit: int, rank: int, size: int) -> slice:
    units = dealt(count // unit, rank, size)
    return slice(units.start * unit, units.stop * unit)


class ShardedLinear(WrappedLinear):
    """A rank's part of a product, and what ranks exchange for the whole.

    Args:
        share: the part.
        method: of ``share.spec``.
        parallel: the ranks.

    Attributes:
        spec: of the method, which may be replaced by another one of this spec.
    """

    def __init__(self, share: Share, method: LinearMethod, parallel: TensorParallel) -> None:
        super().__init__(method)
        self.spec = share.spec
        self._share, self._parallel = share, parallel
        self._sizes = [len(ids) for ids in share.ids]

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        # A view: of a tensor in a file, only this part is read.
        own = self.own_part(part, kind, tensor)
        if own is not None:
            self.fill_own(part, kind, own)

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        if kind == "bias" and not self.spec.bias:
            return None
        own = tensor[self._share.rows[part]]
        return own if kind == "bias" else own[:, self._share.columns]

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        self.method.fill(part, kind, own)

    def apply(self, x: Tensor) -> Tensor:
        """The columns of this rank, or [rows, out]; of a vocabulary [0, out] if not at rank 0."""
        own = self.method.apply(x)
        if self.spec.sharding is Sharding.INPUTS:
            return self._parallel.all_reduce(own)
        if self.spec.sharding is Sharding.VOCABULARY:
            return self._parallel.gather(own, self._sizes)
        return own

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a vocabulary, [ids, in], at every rank."""
        own = self._share.ids[self._parallel.rank]
        is_elsewhere = (ids < own.start) | (ids >= own.stop)
        found = self.method.rows((ids - own.start).masked_fill(is_elsewhere, 0))
        return self._parallel.all_reduce(found.masked_fill_(is_elsewhere[:, None], 0))
