"""The rows of a batch that need logits: those that draw, and prompt rows that are scored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["PromptRows", "SamplingRows"]


@dataclass(frozen=True)
class SamplingRows:
    """The rows to draw from, in the order of the results: decode rows, then draws of prompts.

    Attributes:
        rows: [sampling rows] int64, on the device. The row of a prompt that forks occurs once for
            each draw.
        slots: [sampling rows], the slot that draws.
        device_slots: the same in int64, on the device.
        parameters: of each slot.
    """

    rows: Tensor
    slots: Int32Array
    device_slots: Tensor
    parameters: SamplingParameters


@dataclass(frozen=True)
class PromptRows:
    """The rows of chunks that asked for prompt logprobs, except a prompt's last row.

    Attributes:
        rows: [prompt tokens] int64, on the device.
        next_ids: [prompt tokens] int64, on the device: the token after each row, which is scored.
        parameters: of each row's slot, with the chunk's number of logprobs.
    """

    rows: Tensor
    next_ids: Tensor
    parameters: SamplingParameters
