"""The pages that calls read, gathered on the device from the page table.

FlashInfer reads a list of pages: those of the first request, those of the second, and so on. The
page table is on the device already, and what says where the pages lie is much shorter than they::

    page table            calls' requests               list of pages
    slot 0   a b . .      slot 0, columns 0 to 1        a b │ d e │ c
    slot 1   c d e .      slot 1, columns 1 to 2
                          slot 1, column 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.backend.flashinfer.planning import BatchPlan, Call
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import EMPTY_INT32, Int64Array

__all__ = ["SentPlan", "send"]


@dataclass(frozen=True)
class SentPlan:
    """What the device gets of a batch's plan, in one copy.

    Attributes:
        own_pages: [pages] int32, of the requests of all own calls.
        own_page_starts: [requests + 1] int32, of these requests.
        own_last_page_lengths: [requests] int32.
        row_requests: [rows] int32, the one of these requests that each row is of.
        row_positions: [rows] int32, within the pages of this request.
        pages: for each own call, then for each level, [pages] int32.
        rows: for each of these calls, its rows as ``Call.rows`` has them; arrays are int64.
    """

    own_pages: Tensor
    own_page_starts: Tensor
    own_last_page_lengths: Tensor
    row_requests: Tensor
    row_positions: Tensor
    pages: tuple[Tensor, ...]
    rows: tuple[slice | Tensor, ...]


def send(plan: BatchPlan, page_table: Tensor) -> SentPlan:
    """Copies what the device needs, and gathers the pages. Nothing waits for the device.

    Args:
        plan: of the batch.
        page_table: [slots, columns] int32, contiguous, on the device.
    """
    calls = (*plan.own, *plan.levels)
    num_own = sum(call.num_requests for call in plan.own)
    counts = _joined(call.num_pages for call in calls)
    starts = np.cumsum(counts, dtype=np.int64) - counts
    # Added to the place in the list, it is the place in the page table.
    offsets = _joined(_places(call, page_table.shape[1]) for call in calls) - starts
    own_page_starts = np.append(starts[:num_own], counts[:num_own].sum())
    staging = Staging(page_table.device)
    sent_offsets, sent_counts = staging.add_indices(offsets), staging.add_indices(counts)
    page_starts = staging.add(own_page_starts, np.int32)
    last_page_lengths = staging.add(_joined(call.last_page_lengths for call in plan.own))
    row_requests, row_positions = staging.add(plan.row_requests), staging.add(plan.row_positions)
    rows = [
        call.rows if isinstance(call.rows, slice) else staging.add_indices(call.rows)
        for call in calls
    ]
    staging.send()
    total = int(counts.sum())
    # Without the size, the host would wait for the device to know it.
    places = torch.repeat_interleave(sent_offsets.tensor, sent_counts.tensor, output_size=total)
    places += torch.arange(total, device=page_table.device)
    pages = page_table.view(-1).index_select(0, places)
    return SentPlan(
        own_pages=pages[: own_page_starts[-1]],
        own_page_starts=page_starts.tensor,
        own_last_page_lengths=last_page_lengths.tensor,
        row_requests=row_requests.tensor,
        row_positions=row_positions.tensor,
        pages=pages.split_with_sizes([int(call.num_pages.sum()) for call in calls]),
        rows=tuple(each if isinstance(each, slice) else each.tensor for each in rows),
    )


def _joined(arrays: Iterable[NDArray[np.integer[Any]]]) -> NDArray[np.integer[Any]]:
    return np.concatenate((EMPTY_INT32, *arrays))


def _places(call: Call, num_columns: int) -> Int64Array:
    """[requests], where in the page table the pages of each begin."""
    return call.slots.astype(np.int64) * num_columns + call.first_columns
