"""Where a model's tensors live, in which dtype, and which kernels work on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokasaurus.model.backend.base import Operators
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS
from tokasaurus.model.parallel.tensor_parallel import ALONE, TensorParallel
from tokasaurus.model.storage import Region

if TYPE_CHECKING:
    from tokasaurus.model.parallel.async_tp import Overlap

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """The device, dtype and kernels of a model.

    Attributes:
        dtype: of weights, activations and KV.
        device: of all of these.
        linear: the name of the linear method, see ``linear_methods.registry``.
        operators: the element-wise kernels.
        quantization: of the products' weights: "int8" or "fp8", or None for the dtype.
        is_traced: torch.compile traces the layers, so kernels of ours become operators.
        instruction_set: that kernels of the CPU are compiled for; "auto" for the best one.
        parallel: the ranks that share each layer.
        overlap: of these ranks' products with what they exchange, if large batches overlap.
        memory: of the weights.
    """

    dtype: torch.dtype
    device: torch.device
    linear: str = "plain"
    operators: Operators = REFERENCE_OPERATORS
    instruction_set: str = "auto"
    is_traced: bool = False
    quantization: str | None = None
    parallel: TensorParallel = field(default=ALONE, compare=False)
    overlap: Overlap | None = field(default=None, compare=False)
    memory: Region = field(default_factory=Region, compare=False)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor, which lives as long as the model."""
        return self.memory.empty(shape, self.dtype, self.device)
