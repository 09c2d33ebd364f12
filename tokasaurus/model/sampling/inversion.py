"""Finds where a cumulative sum of weights reaches a target, without cumulating all weights.

Weights are summed up by blocks in float64. Only the sums of the blocks are cumulated, and the
weights of the one block that the target lies in::

    weights      1 0 2 │ 0 1 0 │ 3 1 1        blocks of 3
    sums           3   │   1   │   5
    cumulative     3   │   4   │   9          the target 6.5 is in the third block,
                                3 4 5         2.5 from its beginning: in the weight 3
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["find", "find_in", "sums_of_blocks"]

_BLOCK = 256


def sums_of_blocks(weights: Tensor) -> Tensor:
    """[rows, blocks] float64. ``weights`` is [rows, some] fp32, and the last block may be short."""
    num_whole, rest = divmod(weights.shape[1], _BLOCK)
    end = num_whole * _BLOCK
    sums = weights.new_empty(len(weights), num_whole + (rest > 0), dtype=torch.float64)
    blocks = weights[:, :end].view(len(weights), num_whole, _BLOCK)
    sums[:, :num_whole] = blocks.sum(dim=-1, dtype=torch.float64)
    if rest:
        sums[:, num_whole] = weights[:, end:].sum(dim=-1, dtype=torch.float64)
    return sums


def find(
    sums: Tensor,
    shares: Tensor,
    size: int,
    weights_of: Callable[[Tensor], Tensor],
    *,
    beyond: bool,
) -> Tensor:
    """The place whose weight lifts the cumulative weight to a share of the total, or beyond it.

    Args:
        sums: of blocks, [rows, blocks] float64.
        shares: [rows, 1] float64, in [0, 1).
        size: the number of weights of a row.
        weights_of: the weights at some places: from [rows, some] int64 to [rows, some] fp32.
        beyond: whether the target has to be exceeded. Then the place has a weight above 0.

    Returns:
        [rows, 1] int64, below ``size`` even where weights are NaN.
    """
    cumulative = sums.cumsum(dim=-1)
    target = _reachable(shares * cumulative[:, -1:], cumulative, beyond)
    block = torch.searchsorted(cumulative, target, right=beyond).clamp_(max=sums.shape[1] - 1)
    before = cumulative.gather(1, (block - 1).clamp_(min=0)).where(block > 0, 0)
    width = min(_BLOCK, size)
    places = block * _BLOCK + torch.arange(width, device=sums.device)
    inside = places.clamp(max=size - 1)
    weights = weights_of(inside).to(torch.float64).where(places == inside, 0)
    cumulative = weights.cumsum(dim=-1)
    target = _reachable(target - before, cumulative, beyond)
    found = torch.searchsorted(cumulative, target, right=beyond).clamp_(max=width - 1)
    return inside.gather(1, found)


def find_in(weights: Tensor, shares: Tensor, *, beyond: bool) -> Tensor:
    """The same places, from a cumulative sum of all weights, which takes fewer steps.

    Args:
        weights: [rows, some] fp32.
        shares: as for ``find``.
        beyond: as for ``find``.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = _reachable(shares * cumulative[:, -1:], cumulative, beyond)
    found = torch.searchsorted(cumulative, target, right=beyond)
    return found.clamp_(max=weights.shape[1] - 1)


def _reachable(target: Tensor, cumulative: Tensor, beyond: bool) -> Tensor:
    """The target, at most the total: rounding may have lifted it there, and nothing is above."""
    most = cumulative[:, -1:]
    if beyond:
        most = torch.nextafter(most, torch.zeros_like(most))
    return torch.minimum(target, most)
