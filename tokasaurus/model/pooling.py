"""One vector for a prompt, from the hidden states of its tokens after the model's last norm.

A prompt may come in chunks, over several batches: what they add up to is kept here, by slot. Knows
nothing of logits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokasaurus.protocol.messages import ForwardBatch, Pooling

__all__ = ["Pooler"]


class Pooler:
    """Sums over the prompts that are being fed and are to be averaged, in fp32."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by slot: [hidden]

    def pool(self, batch: ForwardBatch, hidden: Tensor) -> Tensor | None:
        """Takes the batch's chunks.

        Args:
            batch: its chunks come in the order of their positions; a prompt that starts at position 0
                starts anew.
            hidden: [rows of the batch, hidden].

        Returns:
            [pooled prompts that end in this batch, hidden] in fp32, in row order; None if no chunk is
            pooled.
        """
        if batch.parameters is not None and self._sums:
            for slot in batch.parameters.slots.tolist():  # whoever had the slot is gone
                self._sums.pop(slot, None)
        if batch.prefill_pooling is None:
            return None
        states = [torch.empty(0, hidden.shape[1], device=hidden.device)]
        ends = len(batch.decode_slots) + np.cumsum(batch.prefill_lengths)
        for chunk in np.flatnonzero(batch.prefill_pooling).tolist():
            last = int(ends[chunk])
            rows = hidden[last - int(batch.prefill_lengths[chunk]) : last].to(torch.float32)
            ends_prompt = int(batch.prefill_next_ids[chunk]) < 0
            if batch.prefill_pooling[chunk] == Pooling.MEAN:
                state = self._mean(batch, chunk, rows, ends_prompt=ends_prompt)
            else:
                state = rows[-1]
            if ends_prompt:
                states.append(state[None])
        return torch.cat(states)

    def _mean(self, batch: ForwardBatch, chunk: int, rows: Tensor, *, ends_prompt: bool) -> Tensor:
        """The mean over the prompt up to the chunk's end."""
        slot, start = int(batch.prefill_slots[chunk]), int(batch.prefill_starts[chunk])
        total = rows.sum(0)
        if start > 0:
            total += self._sums.pop(slot)
        if not ends_prompt:
            self._sums[slot] = total
        return total / (start + len(rows))
