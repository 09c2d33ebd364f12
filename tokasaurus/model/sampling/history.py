"""The ids that sequences have generated, for penalties and for bad words.

Memory consists of blocks of a fixed size and number, so its size is known when the worker starts.
Ids are written on the device as they are drawn. The host knows the place of an id without its
value::

    blocks    slot 3   [ 7, 2 ]     length 5, blocks of 4
              slot 5   [ 0 ]        length 1

    memory    0 │ g . . . │   1 │ . . . . │   2 │ g . . . │  ...   7 │ g g g g │
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.upload import upload, upload_indices
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["MAX_GATHERED", "History"]

log = logging.getLogger(__name__)

# Ids in a block.
_BLOCK = 256
# Ids that are gathered at once. The temporary tensors take about 50 bytes for each.
MAX_GATHERED = 1 << 22


class History:
    """The generated ids of the slots that keep a history.

    When memory runs out, a sequence that needs another block is lost: its next token is its last.

    Args:
        num_slots: of the worker.
        max_length: the longest history of one slot.
        num_ids: room for this number of ids in all, besides one block for each slot.
        device: of the ids.
    """

    def __init__(self, num_slots: int, max_length: int, num_ids: int, device: torch.device) -> None:
        num_blocks = num_slots + ceil_div(num_ids, _BLOCK)
        self._memory = torch.zeros(num_blocks, _BLOCK, dtype=torch.int32, device=device)
        self._device = device
        self._free = list(range(num_blocks))
        self._blocks: Int32Array = np.zeros((num_slots, ceil_div(max_length, _BLOCK)), np.int32)
        self.keeps: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self.is_lost: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self.lengths: Int32Array = np.zeros(num_slots, np.int32)

    @property
    def num_bytes(self) -> int:
        """The memory of the ids, on the device."""
        return self._memory.numel() * self._memory.element_size()

    def leave(self, slots: Int32Array) -> None:
        """Forgets the histories of these slots, which keep none from now on."""
        for slot in slots[self.keeps[slots]].tolist():
            self._drop(slot)
        self.keeps[slots] = self.is_lost[slots] = False

    def clear(self) -> None:
        """Forgets all histories. The memory stays where it is."""
        self._free = list(range(len(self._memory)))
        self.keeps[:] = self.is_lost[:] = False
        self.lengths[:] = 0

    def enter(self, slots: Int32Array, ids: Int32Array) -> None:
        """Starts a history with these ids for each slot. The slots have left before."""
        self.keeps[slots] = True
        count = ceil_div(len(ids), _BLOCK)
        padded = np.zeros(count * _BLOCK, np.int32)
        padded[: len(ids)] = ids
        rows = upload(padded, self._device).view(count, _BLOCK)
        for slot in slots.tolist() if count else ():
            blocks = self._take(count)
            if len(blocks) < count:
                self._free += blocks
                self._lose(slot)
                continue
            self._blocks[slot, :count] = blocks
            self.lengths[slot] = len(ids)
            self._memory[upload_indices(self._blocks[slot, :count], self._device)] = rows

    def record(self, slots: Int32Array, drawn: Tensor) -> NDArray[np.bool_]:
        """Appends an id to each slot's history.

        Args:
            slots: [rows], all of which keep a history.
            drawn: [rows], on the device.

        Returns:
            [rows], whether the slot is lost.
        """
        starts_block = self.lengths[slots] % _BLOCK == 0
        for slot in (
            slots[starts_block & ~self.is_lost[slots]].tolist() if starts_block.any() else ()
        ):
            block = self._take(1)
            if block:
                self._blocks[slot, self.lengths[slot] // _BLOCK] = block[0]
            else:
                self._lose(slot)
        is_lost = self.is_lost[slots]
        if is_lost.any():
            rows = np.flatnonzero(~is_lost)
            slots, drawn = slots[rows], drawn[upload_indices(rows, self._device)]
        places = self._places(slots, self.lengths[slots])
        self._memory.view(-1)[upload_indices(places, self._device)] = drawn.to(torch.int32)
        self.lengths[slots] += 1
        return is_lost

    def tails(self, slots: Int32Array, count: int, missing: int) -> Tensor:
        """[slots, count]: the last ids of each, aligned to the right, with ``missing`` before."""
        columns = self.lengths[slots, None] - np.arange(count, 0, -1)
        ids = self._memory.view(-1)[
            upload_indices(self._places(slots[:, None], columns.clip(min=0)), self._device)
        ]
        return ids.where(upload(columns >= 0, self._device), missing)

    def pieces(self, slots: Int32Array) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything that slots hold, some ids of each at a time. Each slot holds at least one id.

        Yields:
            [slots, some] int64 ids, and bool, whether an id exists. Beyond its end a slot repeats
            its first id.
        """
        lengths = upload_indices(self.lengths[slots], self._device)[:, None]
        longest = int(self.lengths[slots].max())
        step = max(MAX_GATHERED // (len(slots) * _BLOCK), 1)
        num_blocks = ceil_div(longest, _BLOCK)
        columns = torch.arange(min(step * _BLOCK, longest), device=self._device)
        firsts = None
        for start in range(0, num_blocks, step):
            blocks = self._blocks[slots, start : min(start + step, num_blocks)]
            found = self._memory.index_select(0, upload_indices(blocks.reshape(-1), self._device))
            ids = found.view(len(slots), -1)[:, : longest - start * _BLOCK].to(torch.int64)
            if firsts is None:
                firsts = ids[:, :1]
            is_there = columns[: ids.shape[1]] < lengths - start * _BLOCK
            yield ids.where(is_there, firsts), is_there

    def _places(self, slots: Int32Array, columns: Int32Array) -> Int32Array:
        """The places in the memory of the ids at these positions."""
        return self._blocks[slots, columns // _BLOCK] * _BLOCK + columns % _BLOCK

    def _take(self, count: int) -> list[int]:
        """``count`` free blocks, or all that are left."""
        return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def _drop(self, slot: int) -> None:
        self._free += self._blocks[slot, : ceil_div(int(self.lengths[slot]), _BLOCK)].tolist()
        self.lengths[slot] = 0

    def _lose(self, slot: int) -> None:
        log.warning("no room to remember the tokens of slot %d: its sequence is cut short", slot)
        self._drop(slot)
        self.is_lost[slot] = True
