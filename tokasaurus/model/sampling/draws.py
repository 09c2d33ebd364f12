"""Plans how the rows of a batch draw: by the device's own kernel, or by torch, kind by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.backend.base import DRAW, SamplingKernels
from tokasaurus.model.sampling.kinds import RowsOfKind, draw_rows, plan_rows
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.sampler import draw
from tokasaurus.model.upload import OnDevice, Staging

__all__ = ["Draws", "KernelDraws", "plan_row_draws"]


class Draws(Protocol):
    """The draws of some rows, which are planned and sent."""

    def draw(self, logits: Tensor) -> Tensor:
        """Draws one token for each row.

        Args:
            logits: [rows, vocabulary] fp32, bf16 or fp16. Never changed.

        Returns:
            [rows] int64.
        """
        ...


@dataclass(frozen=True, eq=False)
class _TorchDraws:
    """Implements ``Draws`` in torch, which is the definition."""

    rows: list[RowsOfKind]

    def draw(self, logits: Tensor) -> Tensor:
        return draw(logits.to(torch.float32), self.rows)


@dataclass(frozen=True, eq=False)
class KernelDraws:
    """Implements ``Draws`` by a kernel.

    Attributes:
        kernels: of the device.
        rows: [all rows, bytes] uint8, a ``DRAW`` for each.
        part: those that draw.
    """

    kernels: SamplingKernels
    rows: OnDevice
    part: slice

    def draw(self, logits: Tensor) -> Tensor:
        return self.kernels.draw(logits, self.rows.tensor[self.part])


def plan_row_draws(
    parameters: SamplingParameters,
    vocab_size: int,
    staging: Staging,
    kernels: SamplingKernels | None,
) -> Draws:
    """Plans the draws of some rows.

    Args:
        parameters: of the rows.
        vocab_size: of the logits.
        staging: sends what the rows need.
        kernels: of the device; None if it has none of its own.
    """
    if kernels is None:
        return _TorchDraws(plan_rows(parameters, vocab_size, staging, draws=True))
    rows = draw_rows(parameters)
    staged = staging.add(rows.view(np.uint8).reshape(-1, DRAW.itemsize))
    return KernelDraws(kernels, staged, slice(None))
