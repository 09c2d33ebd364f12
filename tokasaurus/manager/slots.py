"""The slot table: every running sequence as one row of numpy arrays.

Owns the rows and who has them. A step over all rows is a few operations on whole columns; a row that
nobody owns, or that must not be planned, drops out by comparing unequal, so no list of rows is kept.

Positions of one row, with a prompt of 6 tokens and max_tokens 5 (pages of 4)::

    position       0 1 2 3   4 5 6 7   8 9 10
    token          p p p p   p p g g   g g g      the last g is never fed: its KV is never written
                                 │       │
    known = 2 ───────────────────┘       │        generated ids that came back
    length = 9 ──────────────────────────┘        positions fed in batches sent so far, so that
                                                   length - prompt_length + 1 = 4 tokens are planned
    capacity = 12                                  pages held: 3
    final_length = 10                              prompt_length + max_tokens - 1

A row decodes while ``length < decode_limit``: the final length, or less where the server must acknowledge
first; 0 while the prompt is being fed and where there is nothing to plan.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.sequence import Sequence, SequenceState
from tokasaurus.protocol.arrays import BoolArray, Int32Array, Int64Array

__all__ = ["NO_PAGES", "IndexArray", "SlotTable"]

IndexArray: TypeAlias = NDArray[np.intp]

NO_PAGES: Int32Array = np.empty(0, np.int32)


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
        # Progress: see the picture above.
        self.length = _column(num_slots)
        self.capacity = _column(num_slots)
        self.decode_limit = _column(num_slots)
        self.final_length = _column(num_slots)
        self.prompt_length = _column(num_slots)  # of the request, whatever was generated since
        self.prompt_end = _column(num_slots)  # where decoding starts in this run
        self.acked = _column(num_slots)  # generated tokens that the server has searched
        self.known = _column(num_slots)  # generated ids, counted from the sequence's first
        self.max_tokens = _column(num_slots)
        self.delivered = _column(num_slots)  # of the known ones, those that the server was sent
        self.published = _column(num_slots)  # leading pages that are in the prefix cache
        self.page_table: Int32Array = np.zeros((num_slots, max_pages), np.int32)
        self.order: Int64Array = np.full(num_slots, -1, np.int64)  # of arrival; -1 if not running
        # The number of the last batch that names the slot.
        self.last_batch: Int64Array = np.full(num_slots, -1, np.int64)
        # Results: whether they still count, and how they are reported.
        self.absorbing: BoolArray = np.zeros(num_slots, np.bool_)
        self.incremental: BoolArray = np.zeros(num_slots, np.bool_)
        self.holding: BoolArray = np.zeros(num_slots, np.bool_)  # for acknowledgements
        self.request_id: Int64Array = np.zeros(num_slots, np.int64)
        self.sample_index = _column(num_slots)
        self.num_cached_tokens = _column(num_slots)
        self.num_logprobs = _column(num_slots)
        # [most stop ids of any sequence so far][num_slots], -1 where a sequence has fewer.
        self._stop_ids: list[Int32Array] = []
        self._num_stop_ids = _column(num_slots)

    @property
    def num_free(self) -> int:
        """Slots that nobody owns."""
        return len(self._free)

    def sequence(self, slot: int) -> Sequence:
        """The owner of a slot.

        Raises:
            ProtocolError: nobody owns it.
        """
        owner = self.sequences[slot]
        if owner is None:
            raise ProtocolError(f"slot {slot} is free")
        return owner

    def pages(self, slot: int) -> Int32Array:
        """The pages that a slot holds, in order of position; a view."""
        return self.page_table[slot, : self.capacity[slot] // self.page_size]

    def enter(self, sequence: Sequence, pages: Int32Array, num_cached_pages: int) -> None:
        """Gives a sequence a free slot."""
        slot = self._free.pop()
        message = sequence.request.message
        sequence.slot = slot
        sequence.state = SequenceState.RUNNING
        self.sequences[slot] = sequence
        self.length[slot] = num_cached_pages * self.page_size
        self.capacity[slot] = len(pages) * self.page_size
        self.decode_limit[slot] = 0
        self.final_length[slot] = sequence.final_length
        self.prompt_length[slot] = len(message.prompt_ids)
        self.prompt_end[slot] = len(sequence.prompt_ids)
        self.acked[slot] = sequence.num_acked
        self.known[slot] = self.delivered[slot] = sequence.num_stored
        self.max_tokens[slot] = message.max_tokens
        self.published[slot] = num_cached_pages
        self.page_table[slot, : len(pages)] = pages
        self.order[slot] = sequence.order
        self.absorbing[slot] = True
        self.incremental[slot] = sequence.request.incremental
        self.holding[slot] = message.hold_for_acks
        self.request_id[slot] = message.request_id
        self.sample_index[slot] = sequence.sample_index
        self.num_cached_tokens[slot] = sequence.num_cached_tokens
        self.num_logprobs[slot] = message.num_logprobs
        self._set_stop_ids(slot, message.stop_token_ids)

    def stop_planning(self, slot: int) -> None:
        """The slot has no pages any more and enters no further batch."""
        self.decode_limit[slot] = self.final_length[slot] = 0
        self.length[slot] = self.capacity[slot] = 0
        self.order[slot] = -1

    def stop_absorbing(self, slot: int) -> None:
        """Results that are still in flight for the slot are nobody's."""
        self.absorbing[slot] = self.incremental[slot] = self.holding[slot] = False
        self._num_stop_ids[slot] = 0

    def leave(self, slot: int) -> None:
        """The slot is free for another sequence."""
        sequence = self.sequence(slot)
        sequence.slot = -1
        sequence.num_acked = int(self.acked[slot])
        self.sequences[slot] = None
        self.stop_absorbing(slot)
        self._free.append(slot)

    def update_decode_limits(self, rows: IndexArray, stop_lag: int) -> None:
        """After a prompt was fed or an acknowledgement came: how far these running slots decode."""
        final_length = self.final_length[rows]
        acked_length = self.prompt_length[rows] + self.acked[rows] + (stop_lag - 1)
        limit = np.where(self.holding[rows], np.minimum(final_length, acked_length), final_length)
        is_fed = self.length[rows] >= self.prompt_end[rows]
        self.decode_limit[rows] = np.where(is_fed, limit, 0)

    def num_known_pages(self, slot: int) -> int:
        """Leading pages that batches sent so far fill, and whose ids are all known."""
        known_length = self.prompt_length[slot] + self.known[slot]
        return int(min(self.length[slot], known_length)) // self.page_size

    def is_stop(self, rows: IndexArray, token_ids: Int32Array) -> BoolArray:
        """Which of these tokens, one for each row, is among the stop ids of its row."""
        found: BoolArray = np.zeros(len(rows), np.bool_)
        for column in self._stop_ids[: self._num_stop_ids.max()]:
            found |= column[rows] == token_ids
        return found

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        while len(self._stop_ids) < len(stop_ids):
            self._stop_ids.append(np.full(self.num_slots, -1, np.int32))
        for index, column in enumerate(self._stop_ids):
            column[slot] = stop_ids[index] if index < len(stop_ids) else -1
        self._num_stop_ids[slot] = len(stop_ids)


def _column(num_slots: int) -> Int32Array:
    return np.zeros(num_slots, np.int32)
