"""The seam between a matrix product that a layer declares and what carries it out.

A layer declares a ``LinearSpec``. A ``LinearMethod`` owns the tensors for it, in whatever layout it
likes: as the checkpoint has them, packed for a library, quantised, or one rank's share of them.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LinearMethod", "LinearSpec", "Sharding", "WrappedLinear"]


class Sharding(enum.Enum):
    """How tensor parallelism deals a product to ranks."""

    OUTPUTS = "outputs"
    """Each part's rows are dealt out. No communication."""
    INPUTS = "inputs"
    """The columns are dealt out, and the results of all ranks are summed."""
    VOCABULARY = "vocabulary"
    """The rows are ids, dealt out in ranges. The results are gathered."""


@dataclass(frozen=True)
class LinearSpec:
    """One matrix product for one or more of the checkpoint's products that share their input.

    Attributes:
        in_size: columns of the weight.
        parts: the rows of each of the checkpoint's products by name, in the order of the outputs.
        bias: every part has a bias.
        sharding: how ranks share the work.
        unit: rows of each part, or columns with INPUTS, that stay together: those of a head.
    """

    in_size: int
    parts: Mapping[str, int]
    bias: bool
    sharding: Sharding
    unit: int = 1

    @property
    def out_size(self) -> int:
        """Rows of the weight."""
        return sum(self.parts.values())

    def rows(self, part: str) -> slice:
        """The rows of one part."""
        names = list(self.parts)
        start = sum(self.parts[name] for name in names[: names.index(part)])
        return slice(start, start + self.parts[part])

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """The shape of each of the checkpoint's tensors, by part and kind ("weight", "bias")."""
        shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for part, size in self.parts.items():
            shapes[part, "weight"] = (size, self.in_size)
            if self.bias:
                shapes[part, "bias"] = (size,)
        return shapes


class LinearMethod(ABC):
    """Owns the tensors of one product.

    Their life: ``fill`` for every part and kind, in any order; ``finish``; then ``apply``. To
    replace the weights: ``fill`` for every part and kind, and ``finish``, once more. The first
    ``fill`` may drop the former weights. After ``release`` comes ``restore``, then the same again.
    """

    @abstractmethod
    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        """Takes one of the checkpoint's tensors, of the shape that the spec says.

        The tensor may have another dtype or device. It is copied or converted, not kept.
        """

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        """What ``fill`` takes of a tensor: a view, for ``fill_own``; None if it takes nothing."""
        return tensor

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        """Does what ``fill`` does, with an ``own_part``."""
        self.fill(part, kind, own)

    @abstractmethod
    def finish(self) -> None:
        """Brings the tensors, which are all filled, into the layout that ``apply`` needs."""

    @abstractmethod
    def release(self) -> None:
        """Frees the memory of the tensors."""

    @abstractmethod
    def restore(self) -> None:
        """Allocates what was released, or leaves it to ``fill``."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Multiplies [rows, in] to [rows, out]."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Chosen rows of the weight, [ids, in]: what an embedding looks up.

        Args:
            ids: [ids] int64, on the device of the weight.
        """


class WrappedLinear(LinearMethod):
    """Another method, which owns the tensors, called in another way.

    Args:
        method: the other one.
    """

    def __init__(self, method: LinearMethod) -> None:
        self.method = method

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        self.method.fill(part, kind, tensor)

    def own_part(self, part: str, kind: str, tensor: Tensor) -> Tensor | None:
        return self.method.own_part(part, kind, tensor)

    def fill_own(self, part: str, kind: str, own: Tensor) -> None:
        self.method.fill_own(part, kind, own)

    def finish(self) -> None:
        self.method.finish()

    def release(self) -> None:
        self.method.release()

    def restore(self) -> None:
        self.method.restore()

    def rows(self, ids: Tensor) -> Tensor:
        return self.method.rows(ids)
