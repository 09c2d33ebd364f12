"""The pages that calls read, gathered on the device from the page table.

FlashInfer reads a list of pages: those of the first request, those of the second, and so on. The
page table is on the device already, and what says where the pages lie is much shorter than they::

    page table            calls' requests               list of pages
    slot 0   a b . .      slot 0, columns 0 to 1        a b │ d e │ c
    slot 1   c d e .      slot 1, columns 1 to 2
                          slot 1, column 0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.backend.flashinfer.planning import Call
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import EMPTY_INT32, Int64Array

__all__ = ["PageLists", "joined"]


class PageLists:
    """The lists of pages of some calls, which travel in a staging buffer that has not been sent.

    Args:
        calls: of a batch.
        page_table: [slots, columns] int32, contiguous, on the device.
        staging: that sends where the pages lie.
    """

    def __init__(self, calls: Sequence[Call], page_table: Tensor, staging: Staging) -> None:
        self._page_table = page_table
        counts = joined(call.num_pages for call in calls)
        starts = np.cumsum(counts, dtype=np.int64) - counts
        # Added to a place in the list, it is the place in the page table.
        offsets = joined(_places(call, page_table.shape[1]) for call in calls) - starts
        self._offsets, self._counts = staging.add_indices(offsets), staging.add_indices(counts)
        self._sizes = [int(call.page_starts[-1]) for call in calls]

    def gather(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[pages] int32, of all requests one after the other, and the part of each call.

        Nothing waits for the device.
        """
        total = sum(self._sizes)
        # Without the size, the host would wait for the device to know it.
        places = torch.repeat_interleave(
            self._offsets.tensor, self._counts.tensor, output_size=total
        )
        places += torch.arange(total, device=places.device)
        pages = self._page_table.view(-1).index_select(0, places)
        return pages, pages.split_with_sizes(self._sizes)


def joined(arrays: Iterable[NDArray[np.integer[Any]]]) -> NDArray[np.integer[Any]]:
    """The arrays one after the other, of which there may be none."""
    return np.concatenate((EMPTY_INT32, *arrays))


def _places(call: Call, num_columns: int) -> Int64Array:
    """[requests], where in the page table the pages of each begin."""
    return call.slots.astype(np.int64) * num_columns + call.first_columns
