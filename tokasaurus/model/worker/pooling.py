"""Pools the hidden states of a prompt's tokens, after the model's last norm, into one vector.

A prompt may come in chunks over several batches; this module keeps each slot's sum between them. It
knows nothing of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.upload import Staged, Staging
from tokasaurus.protocol.messages import ForwardBatch, Pooling

__all__ = ["PlannedPooling", "Pooler"]

IndexArray: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class _PlannedMeans:
    """Chunks that are averaged. Indices count these chunks.

    Attributes:
        rows: of all chunks, int64, chunk by chunk, among the rows of the batch.
        places: of these rows, int64, among the numbers that are summed up. The sum of a chunk that
            goes on from an earlier batch has a place before the chunk's rows.
        lengths: [chunks] int64, of the numbers that are summed up.
        num_tokens: [chunks, 1] int64, of the prompt up to the chunk's end.
        continued: the place of the sum, and the slot, of each chunk that goes on from an earlier
            batch.
        unfinished: the index and slot of each chunk that does not end its prompt.
        sources: the chunks that end their prompts, int64.
        targets: where their means go among the pooled prompts, int64.
    """

    rows: Staged
    places: Staged
    lengths: Staged
    num_tokens: Staged
    continued: list[tuple[int, int]]
    unfinished: list[tuple[int, int]]
    sources: Staged
    targets: Staged


@dataclass(frozen=True, eq=False)
class PlannedPooling:
    """The pooling of a batch.

    Attributes:
        last_rows: of the pooled prompts that end in this batch, int64.
        means: None if no chunk is averaged.
    """

    last_rows: Staged
    means: _PlannedMeans | None


class Pooler:
    """Keeps the fp32 sums of prompts that will be averaged and have not ended yet."""

    def __init__(self) -> None:
        # [hidden] of each slot.
        self._sums: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forgets all slots."""
        self._sums.clear()

    def plan(self, batch: ForwardBatch, staging: Staging) -> PlannedPooling | None:
        """Plans the pooling of the batch's chunks. Former sequences of its slots are forgotten.

        Args:
            batch: a prompt's chunks come in the order of their positions. A chunk at position 0
                starts a new sum.
            staging: sends what pooling needs.

        Returns:
            None if the batch pools no chunk.
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
        means = None
        if is_mean.any():
            sources = np.flatnonzero(ends_prompt[is_mean])
            targets = np.flatnonzero(is_mean[ends_prompt])
            means = _plan_means(
                batch, chunks[is_mean], last_rows[is_mean], sources, targets, staging
            )
        return PlannedPooling(staging.add_indices(last_rows[ends_prompt]), means)

    def pool(self, plan: PlannedPooling, hidden: Tensor) -> Tensor:
        """Adds the batch's chunks.

        Args:
            plan: of the batch.
            hidden: [rows of the batch, hidden].

        Returns:
            [pooled prompts that end in this batch, hidden] in fp32, in row order.
        """
        states = hidden[plan.last_rows.tensor].to(torch.float32)
        if plan.means is not None:
            means = self._means(plan.means, hidden)
            states[plan.means.targets.tensor] = means[plan.means.sources.tensor]
        return states

    def _means(self, plan: _PlannedMeans, hidden: Tensor) -> Tensor:
        """[chunks, hidden]: each prompt's mean up to the chunk's end. Keeps unfinished sums.

        A prompt's rows are added one by one in the order of positions. So its sum does not depend
        on how it is cut into chunks.
        """
        rows = plan.rows.tensor
        numbers = torch.empty(
            len(rows) + len(plan.continued),
            hidden.shape[1],
            dtype=torch.float32,
            device=hidden.device,
        )
        numbers[plan.places.tensor] = hidden[rows].to(torch.float32)
        for place, slot in plan.continued:
            numbers[place] = self._sums.pop(slot)
        sums: Tensor = torch.segment_reduce(
            numbers,
            "sum",
            lengths=plan.lengths.tensor,
            # To check the lengths, which are right, it would wait for the device.
            unsafe=True,
        )
        for index, slot in plan.unfinished:
            self._sums[slot] = sums[index].clone()
        return sums / plan.num_tokens.tensor


def _plan_means(
    batch: ForwardBatch,
    chunks: IndexArray,
    last_rows: IndexArray,
    sources: IndexArray,
    targets: IndexArray,
    staging: Staging,
) -> _PlannedMeans:
    lengths, starts = batch.prefill_lengths[chunks], batch.prefill_starts[chunks]
    # Chunk by chunk, each row is the chunk's last row minus the number of rows after it.
    after = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(lengths.sum())
    rows = np.repeat(last_rows, lengths) - after
    slots = batch.prefill_slots[chunks].tolist()
    is_unfinished = batch.prefill_next_ids[chunks] >= 0
    is_continued = starts > 0
    num_sums = np.cumsum(is_continued)  # up to each chunk
    places = np.arange(lengths.sum()) + np.repeat(num_sums, lengths)
    sum_places = np.cumsum(lengths) - lengths + num_sums - 1
    return _PlannedMeans(
        rows=staging.add_indices(rows),
        places=staging.add_indices(places),
        lengths=staging.add_indices(lengths + is_continued),
        num_tokens=staging.add_indices((starts + lengths)[:, None]),
        continued=[
            (int(sum_places[index]), slots[index])
            for index in np.flatnonzero(is_continued).tolist()
        ],
        unfinished=[(index, slots[index]) for index in np.flatnonzero(is_unfinished).tolist()],
        sources=staging.add_indices(sources),
        targets=staging.add_indices(targets),
    )
