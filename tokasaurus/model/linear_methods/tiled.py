"""A linear method on fixed numbers of rows, for kernels whose results depend on that number.

F.linear, for example, multiplies a row that is alone by another kernel than two rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.linear_methods.base import LinearMethod, WrappedLinear
from tokasaurus.rounding import round_up

__all__ = ["TiledLinear"]


class TiledLinear(WrappedLinear):
    """Does what another method does, in calls of certain numbers of rows.

    Args:
        method: owns the tensors.
        least_rows: of a call. Rows of zeros make up the number.
        tile_rows: of every call: a larger batch takes several calls, and rows of zeros fill the
            last one. None for calls of any number from the least on.
    """

    def __init__(self, method: LinearMethod, least_rows: int, tile_rows: int | None) -> None:
        super().__init__(method)
        self._least_rows, self._tile_rows = least_rows, tile_rows

    def apply(self, x: Tensor) -> Tensor:
        num_rows, tile = len(x), self._tile_rows
        wanted = max(num_rows, self._least_rows)
        if tile is not None:
            wanted = round_up(wanted, tile)
        padded = F.pad(x, (0, 0, 0, wanted - num_rows)) if wanted > num_rows else x.contiguous()
        if tile is None or wanted == tile:
            return self.method.apply(padded)[:num_rows]
        return torch.cat([self.method.apply(part) for part in torch.split(padded, tile)])[:num_rows]
