"""How ranks that share each layer deal it, and what they exchange.

Owns the contract, and the rank that is alone. All ranks make the same calls in the same order:
whatever decides about a call is part of the batch, or was agreed upon.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["ALONE", "TensorParallel", "dealt", "ranges"]


class TensorParallel(Protocol):
    """One of several ranks that share each layer.

    Sums are in the order of the ranks on a CPU, so they depend on nothing but the numbers.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, [rows, size]. It may be x itself, with other numbers."""
        ...

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Puts the columns of all ranks side by side, at rank 0.

        Args:
            x: [rows, this rank's number of columns].
            sizes: [ranks], the number of columns of each.

        Returns:
            At rank 0 [rows, all columns], elsewhere [0, all columns].
        """
        ...


class _Alone:
    """Implements ``TensorParallel``: one rank has every layer whole."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return x


ALONE = _Alone()


def dealt(count: int, rank: int, size: int) -> range:
    """The heads, or other units, that a rank gets of this number.

    Each rank gets as many as the others, next to each other. If there are fewer than ranks,
    neighbours share one::

        8 units, 4 ranks    0 1 │ 2 3 │ 4 5 │ 6 7
        2 units, 4 ranks     0  │  0  │  1  │  1

    So a rank has the key and value heads that its query heads read.

    Raises:
        ValueError: neither number divides the other.
    """
    if count % size == 0:
        each = count // size
        return range(rank * each, (rank + 1) * each)
    if size % count:
        raise ValueError(f"{count} units cannot be dealt to {size} ranks")
    unit = rank * count // size
    return range(unit, unit + 1)


def ranges(count: int, size: int) -> list[range]:
    """Divides ids below ``count`` into a range for each rank. Lengths differ by at most one."""
    ends = [count * rank // size for rank in range(size + 1)]
    return [range(first, end) for first, end in itertools.pairwise(ends)]
