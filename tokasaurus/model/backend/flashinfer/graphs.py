"""Attention that a CUDA graph can contain: a wrapper for each graph, whose tensors stay in place.

Such a wrapper copies each plan to the same tensors, and the grids of its kernels follow from the
number of rows alone. It is planned anew before each replay.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.backend.base import Attention, SequenceRows
from tokasaurus.model.backend.flashinfer.page_lists import PageLists
from tokasaurus.model.backend.flashinfer.planning import Call
from tokasaurus.model.backend.triton.shapes import ALIGNMENT
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import round_up

__all__ = ["FlashInferGraphPlan"]


class FlashInferGraphPlan:
    """Implements ``GraphPlan``.

    Args:
        num_rows: of the graph.
        page_size: in tokens.
        page_table: [slots, columns] int32, on the device.
        takes: whether a batch may run as a graph; it counts the rows of groups.
        plan: plans the graph's wrapper for a call whose pages are given.
        attention: makes the attention of rows with these slots and positions, [rows] int32 each.
            A row at position -1 has no sequence.
    """

    def __init__(
        self,
        num_rows: int,
        page_size: int,
        page_table: Tensor,
        takes: Callable[[SequenceRows], bool],
        plan: Callable[[Call, Tensor], object],
        attention: Callable[[Tensor, Tensor], Attention],
    ) -> None:
        self._num_rows, self._page_size, self._page_table = num_rows, page_size, page_table
        self._takes, self._plan, self._attention = takes, plan, attention
        shape = 2, round_up(num_rows, ALIGNMENT)
        self._rows = torch.zeros(shape, dtype=torch.int32, device=page_table.device)

    def attention(self) -> Attention:
        slots, positions = self._rows[:, : self._num_rows]
        return self._attention(slots, positions)

    def fill(self, rows: SequenceRows | None) -> bool:
        if rows is not None and not self._takes(rows):
            return False
        slots, lengths = np.zeros(self._rows.shape, np.int32)
        if rows is not None:
            slots[: len(rows.slots)], lengths[: len(rows.slots)] = rows.slots, rows.kv_lengths
        call = self._call(slots[: self._num_rows], lengths[: self._num_rows])
        staging = Staging(self._rows.device)
        lists = PageLists((call,), self._page_table, staging)
        sent = staging.add(np.stack((slots, lengths - 1)))
        staging.send()
        self._rows.copy_(sent.tensor)
        pages, _ = lists.gather()
        self._plan(call, pages)
        return True

    def _call(self, slots: Int32Array, lengths: Int32Array) -> Call:
        """A row without a sequence is a request without pages."""
        return Call(
            rows=slice(0, self._num_rows),
            query_starts=np.arange(self._num_rows + 1, dtype=np.int32),
            slots=slots,
            first_columns=np.zeros_like(slots),
            lengths=lengths,
            page_size=self._page_size,
        )
