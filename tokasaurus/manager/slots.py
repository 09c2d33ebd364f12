"""The slot table: every running sequence as one row of numpy arrays.

Owns the rows, and knows which sequence has which. An update of all rows is a few operations on
whole columns. A row that is free, or that must not be planned, drops out because its columns
compare unequal, so no list of rows is kept.

Positions of one row, with a prompt of 6 tokens and max_tokens 5 (pages of 4)::

    position       0 1 2 3   4 5 6 7   8 9 10
    token          p p p p   p p g g   g g g      the last g is never fed: its KV is never written
                                 │       │
    known = 2 ───────────────────┘       │        generated ids that came back
    length = 9 ──────────────────────────┘        positions fed in batches sent so far, so that
                                                   length - prompt_length + 1 = 4 tokens are planned
    capacity = 12                                  pages held: 3
    final_length = 10                              prompt_length + max_tokens - 1

A row decodes while ``length < decode_limit``. That limit is the final length, or less where the
server must acknowledge tokens first. It is 0 while the prompt is being fed, and where there is
nothing to plan.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.sequence import Sequence, SequenceState
from tokasaurus.protocol.arrays import BoolArray, Int32Array, Int64Array

__all__ = ["NO_SLOTS", "IndexArray", "SlotTable"]

IndexArray: TypeAlias = NDArray[np.intp]

NO_SLOTS: IndexArray = np.empty(0, np.intp)

_NUM_COLUMNS = 22
_INT32 = (1 << 31) - 1


class SlotTable:
    """Columns over slots.

    Args:
        num_slots: rows.
        max_pages: the most pages one sequence may hold.
        page_size: tokens.
    """

    def __init__(self, num_slots: int, max_pages: int, page_size: int) -> None:
        self.num_slots = num_slots
        self.page_size = page_size
        self.sequences: list[Sequence | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        # One row of memory for each column of the table; in the order of the tuples in `enter`.
        columns: Int32Array = np.zeros((_NUM_COLUMNS, num_slots), np.int32)
        self._columns = columns
        # Progress: see the picture above.
        self.length = columns[0]
        self.capacity = columns[1]
        self.decode_limit = columns[2]
        self.final_length = columns[3]
        self.prompt_length = columns[4]  # of the request, whatever was generated since
        self.prompt_end = columns[5]  # where decoding starts in this run
        self.acked = columns[6]  # generated tokens that the server has searched for stop strings
        self.known = columns[7]  # generated ids, counted from the sequence's first
        self.stored = columns[8]  # of the known ones, those that left the token window
        self.delivered = columns[9]  # of the known ones, those that were sent to the server
        self.max_tokens = columns[10]
        self.published = columns[11]  # leading pages that are in the prefix cache
        self.sample_index = columns[12]
        self.num_cached_tokens = columns[13]
        self.num_logprobs = columns[14]
        self.length_group = columns[15]  # a handle of the predictor of lengths
        self.weights_version = columns[16]  # with which it entered: the namespace of its pages
        self.num_pseudo = columns[17]  # leading positions of a cartridge, part of prompt_length
        self._num_stop_ids = columns[18]
        self.arrival = columns[19]  # the low bits
        self.client = columns[20]
        self.num_predicted = columns[21]  # tokens
        self.page_table: Int32Array = np.zeros((num_slots, max_pages), np.int32)
        self.order: Int64Array = np.full(num_slots, -1, np.int64)  # -1 if not running
        # The number of the last batch that has a row for the slot.
        self.last_batch: Int64Array = np.full(num_slots, -1, np.int64)
        # The step of the forecast in which the slot's pages come free.
        self.predicted_end: Int64Array = np.zeros(num_slots, np.int64)
        # Results: whether they still count, and how they are reported.
        self.absorbing: BoolArray = np.zeros(num_slots, np.bool_)
        self.incremental: BoolArray = np.zeros(num_slots, np.bool_)
        self.holding: BoolArray = np.zeros(num_slots, np.bool_)  # for acknowledgements
        self.request_id: Int64Array = np.zeros(num_slots, np.int64)
        # [most stop ids of any sequence so far][num_slots], -1 where a sequence has fewer.
        self._stop_ids: list[Int32Array] = []

    @property
    def num_free(self) -> int:
        """Slots without an owner."""
        return len(self._free)

    def sequence(self, slot: int) -> Sequence:
        """The owner of a slot.

        Raises:
            ProtocolError: it has none.
        """
        owner = self.sequences[slot]
        if owner is None:
            raise ProtocolError(f"slot {slot} is free")
        return owner

    def pages(self, slot: int) -> Int32Array:
        """The pages that a slot holds, in order of position; a view."""
        return self.page_table[slot, : self.capacity[slot] // self.page_size]

    def enter(
        self,
        sequences: Rows[Sequence],
        lengths: Rows[int],
        num_pages: Rows[int],
        weights_version: int,
    ) -> IndexArray:
        """Gives sequences free slots; their page tables are still to be written.

        Args:
            sequences: one or more.
            lengths: the positions that the pages of each hold already.
            num_pages: the pages that each gets.
            weights_version: the present one.

        Returns:
            The slots.
        """
        rows: list[int] = []
        values: list[tuple[int, ...]] = []
        for sequence, length, count in zip(sequences, lengths, num_pages, strict=True):
            slot = self._free.pop()
            rows.append(slot)
            sequence.slot = slot
            sequence.state = SequenceState.RUNNING
            self.sequences[slot] = sequence
            request = sequence.request
            message = request.message
            num_stored = sequence.num_stored
            values.append(
                (
                    length,
                    count * self.page_size,
                    0,
                    request.final_length,
                    len(request.prompt_ids),
                    len(sequence.prompt_ids),
                    sequence.num_acked,
                    num_stored,
                    num_stored,
                    num_stored,
                    message.max_tokens,
                    length // self.page_size,
                    sequence.sample_index,
                    sequence.num_cached_tokens,
                    message.num_logprobs,
                    request.length_group,
                    weights_version,
                    request.num_pseudo,
                    len(message.stop_token_ids),
                    sequence.arrival & _INT32,
                    request.client,
                    min(sequence.num_predicted, _INT32),
                )
            )
        slots = np.array(rows, np.intp)
        self._columns[:, slots] = np.array(values, np.int32).T
        requests = [sequence.request for sequence in sequences]
        self.order[slots] = [sequence.order for sequence in sequences]
        self.request_id[slots] = [request.message.request_id for request in requests]
        self.absorbing[slots] = True
        self.incremental[slots] = [request.incremental for request in requests]
        self.holding[slots] = [request.message.hold_for_acks for request in requests]
        self._set_stop_ids(rows, [request.message.stop_token_ids for request in requests])
        return slots

    def stop_planning(self, slots: IndexArray) -> None:
        """Takes the slots out of planning: they have no pages, and enter no further batch."""
        self.decode_limit[slots] = 0
        self.final_length[slots] = 0
        self.length[slots] = 0
        self.capacity[slots] = 0
        self.order[slots] = -1

    def stop_absorbing(self, slot: int) -> None:
        """Drops the results that are still in flight for the slot."""
        self.absorbing[slot] = self.incremental[slot] = self.holding[slot] = False
        self._num_stop_ids[slot] = 0

    def leave(self, slots: Rows[int]) -> None:
        """Frees the slots for other sequences."""
        rows = np.array(slots, np.intp)
        for slot, num_acked in zip(slots, self.acked[rows].tolist(), strict=True):
            sequence = self.sequence(slot)
            sequence.slot = -1
            sequence.num_acked = num_acked
            self.sequences[slot] = None
        self.absorbing[rows] = self.incremental[rows] = self.holding[rows] = False
        self._num_stop_ids[rows] = 0
        self._free.extend(slots)

    def update_decode_limits(self, rows: IndexArray, stop_lag: int) -> None:
        """Sets how far these running slots decode, after a prompt or an acknowledgement."""
        final_length = self.final_length[rows]
        acked_length = self.prompt_length[rows] + self.acked[rows] + (stop_lag - 1)
        limit = np.where(self.holding[rows], np.minimum(final_length, acked_length), final_length)
        is_fed = self.length[rows] >= self.prompt_end[rows]
        self.decode_limit[rows] = np.where(is_fed, limit, 0)

    def num_known_pages(self, slots: IndexArray) -> Int32Array:
        """[slots] leading pages that batches sent so far fill, and of which all ids are known."""
        known_lengths = self.prompt_length[slots] + self.known[slots]
        num_pages: Int32Array = np.minimum(self.length[slots], known_lengths) // self.page_size
        return num_pages

    def fully_planned(self) -> IndexArray:
        """Running slots without a token to plan: no batch to come needs their pages."""
        slots: IndexArray = ((self.length == self.final_length) & (self.order >= 0)).nonzero()[0]
        return slots

    def is_stop(self, rows: IndexArray, token_ids: Int32Array) -> BoolArray:
        """[rows] whether the token of each row is among its stop ids."""
        found: BoolArray = np.zeros(len(rows), np.bool_)
        for column in self._stop_ids[: self._num_stop_ids.max()]:
            found |= column[rows] == token_ids
        return found

    def _set_stop_ids(self, slots: Rows[int], stop_ids: Rows[tuple[int, ...]]) -> None:
        same: dict[tuple[int, ...], list[int]] = {}  # most requests have those of the model
        for slot, ids in zip(slots, stop_ids, strict=True):
            same.setdefault(ids, []).append(slot)
        for ids, rows in same.items():
            while len(self._stop_ids) < len(ids):
                self._stop_ids.append(np.full(self.num_slots, -1, np.int32))
            for index, column in enumerate(self._stop_ids):
                column[rows] = ids[index] if index < len(ids) else -1
