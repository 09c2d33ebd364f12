"""The last generated tokens of every slot: where a batch's results land, all rows at once.

Each slot has a ring. Token t of a sequence, counted from its first generated one, is in column t %
columns. Whenever a ring is full, its content moves to the sequence as one array. So memory follows
the number of tokens that were really generated, rows stay close together however long sequences
grow, and moving costs a few microseconds per sequence every ``columns`` tokens. With 8 columns::

    sequence.stored            window row          t:  0..15 stored, 16..18 in the ring,
    [t0 .. t7] [t8 .. t15]     t16 t17 t18 . . .   19 is next
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.sequence import GeneratedTokens
from tokasaurus.manager.slots import IndexArray, SlotTable
from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.protocol.messages import ForwardResult

__all__ = ["MIN_COLUMNS", "TokenWindow"]

MIN_COLUMNS = 256


class TokenWindow:
    """Rings of generated tokens over the slots of a table.

    Args:
        slots: the table; its ``known`` counts the tokens of each slot.
        max_undelivered: tokens of one slot that one turn may bring; a ring holds at least this
            number.
    """

    def __init__(self, slots: SlotTable, max_undelivered: int) -> None:
        self._slots = slots
        self._columns = 1 << (max(MIN_COLUMNS, max_undelivered) - 1).bit_length()
        size = slots.num_slots * self._columns
        self._ids: Int32Array = np.zeros(size, np.int32)
        # Allocated when the first sequence asks for logprobs, and widened when one asks for more
        # top ones.
        self._logprobs: Float32Array = np.zeros(0, np.float32)
        self._top_ids: Int32Array = np.zeros((0, 0), np.int32)
        self._top_logprobs: Float32Array = np.zeros((0, 0), np.float32)

    def prepare(self, num_logprobs: int) -> None:
        """Makes room for a sequence that asks for top logprobs; -1 if it asks for none at all."""
        if num_logprobs < 0:
            return
        size = len(self._ids)
        if len(self._logprobs) == 0:
            self._logprobs = np.zeros(size, np.float32)
        old = self._top_ids.shape[1]
        if len(self._top_ids) == 0 or old < num_logprobs:
            top_ids = np.zeros((size, num_logprobs), np.int32)
            top_logprobs = np.zeros((size, num_logprobs), np.float32)
            if old:
                top_ids[:, :old] = self._top_ids
                top_logprobs[:, :old] = self._top_logprobs
            self._top_ids, self._top_logprobs = top_ids, top_logprobs

    def append(
        self, rows: IndexArray, result: ForwardResult, sampling_rows: IndexArray | None = None
    ) -> None:
        """Adds one token to each of ``rows``.

        Args:
            rows: slots.
            result: that brings the tokens.
            sampling_rows: the row of the result for each slot; None where these are all its rows.
        """
        slots = self._slots
        known = slots.known[rows]
        columns = known & (self._columns - 1)
        cells = rows * self._columns + columns
        ids = result.token_ids
        self._ids[cells] = ids if sampling_rows is None else ids.take(sampling_rows)
        if len(self._logprobs):
            self._append_logprobs(rows, cells, result, sampling_rows)
        slots.known[rows] = known + 1
        is_full = columns == self._columns - 1
        if is_full.any():
            self._store(rows[is_full])

    def store(self, slots: Rows[int]) -> None:
        """Moves the tokens in the rings of these slots to their sequences."""
        self._store(np.array(slots, np.intp))

    def unstored_ids(self, rows: IndexArray) -> tuple[Int32Array, Int32Array]:
        """The ids that are not stored yet, row after row; and how many each row has."""
        first = self._slots.stored[rows]
        counts = self._slots.known[rows] - first
        return self._ids[self._cells(rows, first, counts)[1]], counts

    def tokens(self, rows: IndexArray, first: Int32Array) -> GeneratedTokens:
        """The known tokens of these slots, from ``first`` of each on, row after row as one piece.

        Only rows that asked for logprobs have them. Top logprobs are flat: as many of each token as
        its row asked for.
        """
        slots = self._slots
        owners, cells = self._cells(rows, first, slots.known[rows] - first)
        wanted = slots.num_logprobs[owners]
        asked = wanted >= 0
        if not asked.any():
            return GeneratedTokens.without_logprobs(self._ids[cells])
        asked_cells = cells[asked]
        is_wanted = np.arange(self._top_ids.shape[1]) < wanted[asked, None]
        return GeneratedTokens(
            ids=self._ids[cells],
            logprobs=self._logprobs[asked_cells],
            top_ids=self._top_ids[asked_cells][is_wanted],
            top_logprobs=self._top_logprobs[asked_cells][is_wanted],
        )

    def _cells(
        self, rows: IndexArray, first: Int32Array, counts: Int32Array
    ) -> tuple[IndexArray, IndexArray]:
        """The slot and the place of each token: ``counts`` of each row, from ``first`` on."""
        owners = np.repeat(rows, counts)
        skipped = np.repeat(np.cumsum(counts) - counts - first, counts)
        positions = np.arange(len(owners)) - skipped
        return owners, owners * self._columns + (positions & (self._columns - 1))

    def _store(self, rows: IndexArray) -> None:
        """Moves the tokens in the rings of these slots to their sequences."""
        slots = self._slots
        first, known = slots.stored[rows], slots.known[rows]
        slots.stored[rows] = known
        # Rings are stored when they are full, so these tokens never wrap around.
        starts = rows * self._columns + (first & (self._columns - 1))
        for slot, start, count, end, version in zip(
            rows.tolist(),
            starts.tolist(),
            (known - first).tolist(),
            known.tolist(),
            slots.weights_version[rows].tolist(),
            strict=True,
        ):
            if not count:
                continue
            sequence = slots.sequence(slot)
            cells = slice(start, start + count)
            ids = self._ids[cells].copy()
            width = sequence.request.message.num_logprobs
            # A stream's logprobs were sent when they came; only its ids are needed again.
            if width < 0 or sequence.request.incremental:
                piece = GeneratedTokens.without_logprobs(ids, version)
            else:
                piece = GeneratedTokens(
                    ids,
                    self._logprobs[cells].copy(),
                    self._top_ids[cells, :width].flatten(),
                    self._top_logprobs[cells, :width].flatten(),
                    version,
                )
            sequence.stored.append(piece)
            sequence.num_stored = end

    def _append_logprobs(
        self,
        rows: IndexArray,
        cells: IndexArray,
        result: ForwardResult,
        sampling_rows: IndexArray | None,
    ) -> None:
        wanted = self._slots.num_logprobs.take(rows)
        asked = (wanted >= 0).nonzero()[0]
        if not asked.size:
            return
        width = result.top_ids.shape[1]
        wanted = wanted.take(asked)
        most = int(wanted.max())
        if len(result.logprobs) != len(result.token_ids) or width < most:
            raise ProtocolError(f"batch {result.number} was asked for more logprobs than it brings")
        cells = cells.take(asked)
        sources = asked if sampling_rows is None else sampling_rows.take(asked)
        self._logprobs[cells] = result.logprobs.take(sources)
        if most == 0:
            return
        asked = (wanted > 0).nonzero()[0]
        cells, sources = cells.take(asked), sources.take(asked)
        for ring, tops in (
            (self._top_ids, result.top_ids),
            (self._top_logprobs, result.top_logprobs),
        ):
            if width == ring.shape[1]:
                _as_items(ring)[cells] = _as_items(tops).take(sources)
            else:  # slower; what lies beyond either width was not asked for
                common = min(width, ring.shape[1])
                ring[cells, :common] = tops[sources, :common]


def _as_items(table: Int32Array | Float32Array) -> NDArray[np.void]:
    """[rows] a view of a table in which each row is one item: numpy moves those twice as fast."""
    row = np.dtype((np.void, table.shape[1] * table.itemsize))
    items: NDArray[np.void] = np.ascontiguousarray(table).view(row)[:, 0]
    return items
