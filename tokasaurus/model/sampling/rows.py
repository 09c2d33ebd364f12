"""The rows of a batch that need logits: those that draw, and prompt rows that are scored.

All that they need is planned before the batch runs, and goes to the device with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.model.backend.base import SamplingKernels
from tokasaurus.model.sampling.adjustments import PlannedAdjustments, Recording
from tokasaurus.model.sampling.draws import Draws
from tokasaurus.model.sampling.logprobs import RowsOfMode
from tokasaurus.model.upload import OnDevice, Staged
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["DrawingPart", "PromptRows", "SamplingRows", "ScoringPart"]


@dataclass(frozen=True, eq=False)
class DrawingPart:
    """Some sampling rows, which draw together.

    Attributes:
        rows: which they are.
        draws: of these rows.
        logprobs: for the rows that ask.
        adjustments: of their logits, if any row asks.
    """

    rows: slice
    draws: Draws
    logprobs: list[RowsOfMode]
    adjustments: PlannedAdjustments | None


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """The rows to draw from, in the order of the results: decode rows, then draws of prompts.

    Attributes:
        rows: [sampling rows] int64. The row of a prompt that forks occurs once for each draw. None
            if they are all rows of the batch, in order.
        slots: [sampling rows], the slot that draws.
        device_slots: the same in int64, on the device.
        parts: all rows, a part of bounded size at a time.
        num_top: the largest number of top logprobs that a row asks for; None if no row asks for
            logprobs.
        recording: remembers the tokens of the rows that need it, if any does.
        kernels: of masks; None if torch applies them.
    """

    rows: OnDevice | None
    slots: Int32Array
    device_slots: OnDevice
    parts: list[DrawingPart]
    num_top: int | None
    recording: Recording | None
    kernels: SamplingKernels | None


@dataclass(frozen=True, eq=False)
class ScoringPart:
    """Some prompt rows, which are scored together.

    Attributes:
        rows: which they are.
        logprobs: for all of them.
    """

    rows: slice
    logprobs: list[RowsOfMode]


@dataclass(frozen=True, eq=False)
class PromptRows:
    """The rows of chunks that asked for prompt logprobs, except a prompt's last row.

    Attributes:
        rows: [prompt tokens] int64.
        next_ids: [prompt tokens] int64: the token after each row, which is scored.
        parts: all rows, a part of bounded size at a time.
        num_top: the largest number of top logprobs that a row asks for.
    """

    rows: Staged
    next_ids: Staged
    parts: list[ScoringPart]
    num_top: int
