"""One vector for a prompt, from the hidden states of its tokens after the model's last norm.

A prompt may come in chunks, over several batches: what they add up to is kept here, by slot. Knows
nothing of logits.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.upload import upload, upload_indices
from tokasaurus.protocol.messages import ForwardBatch, Pooling

__all__ = ["Pooler"]

IndexArray: TypeAlias = NDArray[np.intp]


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
        chunks = np.flatnonzero(batch.prefill_pooling)
        is_mean = batch.prefill_pooling[chunks] == Pooling.MEAN
        ends_prompt = batch.prefill_next_ids[chunks] < 0
        last_rows = (len(batch.decode_slots) + np.cumsum(batch.prefill_lengths) - 1)[chunks]
        states = hidden[upload_indices(last_rows[ends_prompt], hidden.device)].to(torch.float32)
        if is_mean.any():
            means = self._means(batch, chunks[is_mean], last_rows[is_mean], hidden)
            targets = np.flatnonzero(is_mean[ends_prompt])
            states[upload_indices(targets, hidden.device)] = means[
                upload(ends_prompt[is_mean], hidden.device)
            ]
        return states

    def _means(
        self, batch: ForwardBatch, chunks: IndexArray, last_rows: IndexArray, hidden: Tensor
    ) -> Tensor:
        """[chunks, hidden]: of each prompt up to the chunk's end; keeps the sums of those that go on."""
        lengths, starts = batch.prefill_lengths[chunks], batch.prefill_starts[chunks]
        # Row by row, chunk after chunk: the last row of each, less how many come after it.
        after = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(lengths.sum())
        rows = np.repeat(last_rows, lengths) - after
        sums: Tensor = torch.segment_reduce(
            hidden[upload_indices(rows, hidden.device)].to(torch.float32),
            "sum",
            lengths=upload_indices(lengths, hidden.device),
        )
        slots = batch.prefill_slots[chunks].tolist()
        for index in np.flatnonzero(starts > 0).tolist():
            sums[index] += self._sums.pop(slots[index])
        for index in np.flatnonzero(batch.prefill_next_ids[chunks] >= 0).tolist():
            self._sums[slots[index]] = sums[index].clone()
        return sums / upload_indices(starts + lengths, hidden.device)[:, None]
