"""Pools the hidden states of a prompt's tokens, after the model's last norm, into one vector.

A prompt may come in chunks over several batches; this module keeps each slot's sum between them. It
knows nothing of logits.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.upload import upload_indices
from tokasaurus.protocol.messages import ForwardBatch, Pooling

__all__ = ["Pooler"]

IndexArray: TypeAlias = NDArray[np.intp]


class Pooler:
    """Keeps the fp32 sums of prompts that will be averaged and have not ended yet."""

    def __init__(self) -> None:
        # [hidden] of each slot.
        self._sums: dict[int, Tensor] = {}

    def pool(self, batch: ForwardBatch, hidden: Tensor) -> Tensor | None:
        """Adds the batch's chunks.

        Args:
            batch: a prompt's chunks come in the order of their positions. A chunk at position 0
                starts a new sum.
            hidden: [rows of the batch, hidden].

        Returns:
            [pooled prompts that end in this batch, hidden] in fp32, in row order. None if the batch
            pools no chunk.
        """
        if batch.parameters is not None and self._sums:
            # New sequences enter these slots.
            for slot in batch.parameters.slots.tolist():
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
            sources = np.flatnonzero(ends_prompt[is_mean])
            states[upload_indices(targets, hidden.device)] = means[
                upload_indices(sources, hidden.device)
            ]
        return states

    def _means(
        self, batch: ForwardBatch, chunks: IndexArray, last_rows: IndexArray, hidden: Tensor
    ) -> Tensor:
        """[chunks, hidden]: each prompt's mean up to the chunk's end. Keeps unfinished sums."""
        lengths, starts = batch.prefill_lengths[chunks], batch.prefill_starts[chunks]
        # Chunk by chunk, each row is the chunk's last row minus the number of rows after it.
        after = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(lengths.sum())
        rows = np.repeat(last_rows, lengths) - after
        sums: Tensor = torch.segment_reduce(
            hidden[upload_indices(rows, hidden.device)].to(torch.float32),
            "sum",
            lengths=upload_indices(lengths, hidden.device),
            # To check the lengths, which are right, it would wait for the device.
            unsafe=True,
        )
        slots = batch.prefill_slots[chunks].tolist()
        for index in np.flatnonzero(starts > 0).tolist():
            sums[index] += self._sums.pop(slots[index])
        for index in np.flatnonzero(batch.prefill_next_ids[chunks] >= 0).tolist():
            self._sums[slots[index]] = sums[index].clone()
        return sums / upload_indices(starts + lengths, hidden.device)[:, None]
