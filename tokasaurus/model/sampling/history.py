"""The ids that sequences have generated, for penalties and for bad words.

Memory consists of blocks of a fixed size and number, so its size is known when the worker starts.
Ids are written on the device as they are drawn. The host knows the place of an id without its
value, so it plans all reads and writes of a batch before the batch runs::

    blocks    slot 3   [ 7, 2 ]     length 5, blocks of 4
              slot 5   [ 0 ]        length 1

    memory    0 │ g . . . │   1 │ . . . . │   2 │ g . . . │  ...   7 │ g g g g │
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.sampling.slot_names import SlotNames
from tokasaurus.model.upload import Staged, Staging
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["MAX_GATHERED", "Appends", "History", "Pieces", "Tails"]

log = logging.getLogger(__name__)

# Ids in a block.
_BLOCK = 256
# Ids that are gathered at once. The temporary tensors take about 50 bytes for each.
MAX_GATHERED = 1 << 22


@dataclass(frozen=True)
class Tails:
    """Where the last ids of some slots lie.

    Attributes:
        places: [slots, count] int64, in the memory; any place where there is no id.
        is_there: [slots, count] bool.
    """

    places: Staged
    is_there: Staged


@dataclass(frozen=True)
class Pieces:
    """Where everything that some slots hold lies, in pieces of some blocks of each slot.

    Attributes:
        lengths: [slots] int64.
        longest: of these lengths.
        blocks: of each piece, [slots, blocks of the piece] int64.
    """

    lengths: Staged
    longest: int
    blocks: list[Staged]


@dataclass(frozen=True)
class Appends:
    """Where the next ids of some slots go.

    Attributes:
        is_lost: [slots], whether the slot has no room for its id.
        rows: the others, int64; None if all slots have room.
        places: of these rows, int64, in the memory.
    """

    is_lost: NDArray[np.bool_]
    rows: Staged | None
    places: Staged


class History:
    """The generated ids of the slots that keep a history.

    When memory runs out, a sequence that needs another block is lost: its next token is its last.

    Args:
        num_slots: of the worker.
        max_length: the longest history of one slot.
        num_ids: room for this number of ids in all, besides one block for each slot.
        device: of the ids.
        names: of the slots' requests, for the log.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        num_ids: int,
        device: torch.device,
        names: SlotNames | None = None,
    ) -> None:
        self._names = SlotNames() if names is None else names
        self._device = device
        self._blocks: Int32Array = np.zeros((num_slots, ceil_div(max_length, _BLOCK)), np.int32)
        self.resize(num_ids)
        self.keeps: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self.is_lost: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self.lengths: Int32Array = np.zeros(num_slots, np.int32)
        # Blocks, and the ids to write into each, of slots that entered and were not written yet.
        self._entries: list[tuple[Staged, Staged]] = []

    @property
    def num_bytes(self) -> int:
        """The memory of the ids, on the device."""
        return self._memory.numel() * self._memory.element_size()

    def resize(self, num_ids: int) -> None:
        """Makes room for another number of ids. No slot keeps a history yet."""
        num_blocks = len(self._blocks) + ceil_div(num_ids, _BLOCK)
        self._memory = torch.zeros(num_blocks, _BLOCK, dtype=torch.int32, device=self._device)
        self._free = list(range(num_blocks))
        self._blocks[:] = 0  # places without an id lie in the memory, too

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
        self._entries.clear()

    def enter(self, slots: Int32Array, ids: Int32Array, staging: Staging) -> None:
        """Starts a history with these ids for each slot. The slots have left before.

        ``write_entries`` writes the ids, once they are sent.
        """
        self.keeps[slots] = True
        count = ceil_div(len(ids), _BLOCK)
        if not count:
            return
        padded = np.zeros((count, _BLOCK), np.int32)
        padded.reshape(-1)[: len(ids)] = ids
        entered = []
        for slot in slots.tolist():
            blocks = self._take(count)
            if len(blocks) < count:
                self._free += blocks
                self._lose(slot)
                continue
            self._blocks[slot, :count] = blocks
            self.lengths[slot] = len(ids)
            entered.append(blocks)
        if entered:
            blocks_of_all = np.array(entered, np.int64)
            self._entries.append((staging.add(blocks_of_all), staging.add(padded)))

    def write_entries(self) -> None:
        """Writes the ids of the slots that have entered since the last call."""
        for blocks, ids in self._entries:
            self._memory[blocks.tensor] = ids.tensor
        self._entries.clear()

    def plan_appends(self, slots: Int32Array, staging: Staging) -> Appends:
        """Makes room for one more id of each slot. All slots keep a history."""
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
        rows = None
        if is_lost.any():
            kept = np.flatnonzero(~is_lost)
            slots, rows = slots[kept], staging.add_indices(kept)
        places = staging.add_indices(self._places(slots, self.lengths[slots]))
        self.lengths[slots] += 1
        return Appends(is_lost, rows, places)

    def append(self, plan: Appends, drawn: Tensor) -> None:
        """Writes an id of each slot, [slots], on the device."""
        if plan.rows is not None:
            drawn = drawn[plan.rows.tensor]
        self._memory.view(-1)[plan.places.tensor] = drawn.to(torch.int32)

    def plan_tails(self, slots: Int32Array, count: int, staging: Staging) -> Tails:
        """Finds the last ``count`` ids of each slot."""
        columns = self.lengths[slots, None] - np.arange(count, 0, -1)
        places = self._places(slots[:, None], columns.clip(min=0))
        return Tails(staging.add_indices(places), staging.add(columns >= 0))

    def tails(self, plan: Tails, missing: int) -> Tensor:
        """[slots, count]: the last ids of each, aligned to the right, with ``missing`` before."""
        ids = self._memory.view(-1)[plan.places.tensor]
        return ids.where(plan.is_there.tensor, missing)

    def plan_pieces(self, slots: Int32Array, staging: Staging) -> Pieces:
        """Finds everything that slots hold. Each slot holds at least one id."""
        lengths = self.lengths[slots]
        longest = int(lengths.max())
        num_blocks = ceil_div(longest, _BLOCK)
        step = max(MAX_GATHERED // (len(slots) * _BLOCK), 1)
        blocks = [
            staging.add_indices(self._blocks[slots, start : min(start + step, num_blocks)])
            for start in range(0, num_blocks, step)
        ]
        return Pieces(staging.add_indices(lengths), longest, blocks)

    def pieces(self, plan: Pieces) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything that slots hold, some ids of each at a time.

        Yields:
            [slots, some] int64 ids, and bool, whether an id exists. Beyond its end a slot repeats
            its first id.
        """
        lengths = plan.lengths.tensor[:, None]
        columns = torch.arange(plan.longest, device=self._device)
        firsts, start = None, 0
        for staged in plan.blocks:
            blocks = staged.tensor
            found = self._memory.index_select(0, blocks.view(-1))
            ids = found.view(len(blocks), -1)[:, : plan.longest - start].to(torch.int64)
            if firsts is None:
                firsts = ids[:, :1]
            is_there = columns[: ids.shape[1]] < lengths - start
            yield ids.where(is_there, firsts), is_there
            start += blocks.shape[1] * _BLOCK

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
        log.warning(
            "no room to remember the tokens of slot %d: its sequence is cut short",
            slot,
            extra=self._names.extra(slot),
        )
        self._drop(slot)
        self.is_lost[slot] = True
