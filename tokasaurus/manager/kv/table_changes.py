"""Page-table entries that the worker does not know yet."""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.sequence import Sequence, SequenceState
from tokasaurus.manager.slots import IndexArray, SlotTable
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array

__all__ = ["TableChanges"]


class TableChanges:
    """Collects changed entries; their values are read from the table when the next batch is built.

    Args:
        slots: with the page table that changes.
    """

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._entries: list[tuple[IndexArray, IndexArray]] = []
        self._patches: list[tuple[Sequence, IndexArray]] = []

    def add(self, slots: IndexArray, columns: IndexArray) -> None:
        """Adds entries of slots that are in the batch being planned."""
        self._entries.append((slots, columns))

    def patch(self, sequence: Sequence, columns: IndexArray) -> None:
        """Adds entries of a running sequence, for the batch after the one just planned.

        They are dropped if the sequence has left its slot by then.
        """
        self._patches.append((sequence, columns))

    def flush(self) -> tuple[Int32Array, Int32Array, Int32Array]:
        """Returns slots, columns and pages of all changes, and forgets them."""
        for sequence, columns in self._patches:
            if sequence.state is SequenceState.RUNNING:
                self._entries.append((np.full(len(columns), sequence.slot), columns))
        entries, self._entries, self._patches = self._entries, [], []
        if not entries:
            return EMPTY_INT32, EMPTY_INT32, EMPTY_INT32
        slots = np.concatenate([slots for slots, _ in entries])
        columns = np.concatenate([columns for _, columns in entries])
        pages = self._slots.page_table[slots, columns]
        return slots.astype(np.int32), columns.astype(np.int32), pages
