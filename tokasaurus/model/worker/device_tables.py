"""What the device knows of each slot: from it come the rows of a batch, and it goes on with them.

The host sends what has changed: new pages, sequences that enter, chunks of prompts, and the slots
that decode, if they are not those of the batch before. From one step of the same sequences to the
next it sends new pages alone, however many sequences there are::

    host      new pages ──┐
    device    lengths, last tokens, draws of all slots ── rows of the batch ── one token further
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.backend.base import DRAW
from tokasaurus.model.sampling.kinds import draw_rows
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.upload import Later, OnDevice, Staged, Staging
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["DeviceRows", "DeviceTables", "TableChanges"]

_WORD = np.dtype(np.int32)
_DRAW_WORDS = DRAW.itemsize // _WORD.itemsize
assert DRAW.fields is not None
# The position of a token in its sequence, among the words of a draw.
_POSITION: int = DRAW.fields["position"][1] // _WORD.itemsize


@dataclass(frozen=True, eq=False)
class DeviceRows:
    """The rows of a batch: decode rows, then prefill rows.

    Attributes:
        inputs: ids, [rows] int64.
        positions: [rows] int64.
        decode_slots: [decodes] int32.
        decode_lengths: [decodes] int32, with the positions of this batch.
    """

    inputs: Tensor
    positions: Tensor
    decode_slots: Tensor
    decode_lengths: Tensor


class DeviceTables:
    """The tables over slots. Their tensors stay where they are.

    Args:
        num_slots: rows of each table.
        num_columns: of the page table.
        device: of the tables.
        has_draws: a kernel draws tokens, and reads what it needs for this from here.

    Attributes:
        page_table: [slots, columns] int32.
        last_tokens: [slots] int64.
        lengths: [slots] int32, with the positions of the last batch.
    """

    def __init__(
        self, num_slots: int, num_columns: int, device: torch.device, *, has_draws: bool
    ) -> None:
        self._device = device
        self.page_table = torch.zeros(num_slots, num_columns, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        # [slots, words], a ``DRAW`` of each slot, at the position of its next token.
        self._draws: Tensor | None = None
        if has_draws:
            neutral = torch.from_numpy(_words_of(SamplingParameters.neutral(1)))
            self._draws = neutral.repeat(num_slots, 1).to(device)
        self._decodes: _Decodes | None = None

    def clear(self) -> None:
        """Forgets all slots."""
        for table in (self.page_table, self.last_tokens, self.lengths):
            table.zero_()
        if self._draws is not None:
            neutral = torch.from_numpy(_words_of(SamplingParameters.neutral(1)))
            self._draws.copy_(neutral.expand_as(self._draws))

    def plan(
        self,
        batch: ForwardBatch,
        positions: Int32Array,
        row_ends: Int32Array,
        chunk_ends: Int32Array,
        parameters: SamplingParameters,
        staging: Staging,
    ) -> TableChanges:
        """Plans the changes that a batch makes.

        Args:
            batch: a message that was checked.
            positions: [rows].
            row_ends: [chunks], the row behind the last one of each.
            chunk_ends: [chunks], the length of each chunk's sequence after it.
            parameters: of all slots, with those of sequences that enter.
            staging: sends what the device does not know.
        """
        entering = None
        if self._draws is not None and batch.parameters is not None:
            slots = batch.parameters.slots
            words = _words_of(parameters.take(slots))
            entering = (staging.add_indices(slots), staging.add(words))
        decodes = self._decodes
        if decodes is None or not np.array_equal(batch.decode_slots, decodes.slots):
            decodes = _Decodes.of(batch.decode_slots.copy(), staging, self._device)
        chunks = None
        if len(chunk_ends):
            positions = positions[len(batch.decode_slots) :]
            chunks = _Chunks.of(batch, positions, row_ends, chunk_ends, staging)
        # Most batches change few tables.
        entries = None
        if len(batch.table_slots):
            entries = (
                staging.add_indices(batch.table_slots),
                staging.add_indices(batch.table_columns),
                staging.add(batch.table_pages),
            )
        return TableChanges(self, self._draws, decodes, chunks, entering, entries)

    def keep(self, decodes: _Decodes) -> None:
        """Keeps what was sent, for as long as batches decode the same slots."""
        self._decodes = decodes


def _words_of(parameters: SamplingParameters) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """[rows, words], a ``DRAW`` for each row."""
    return draw_rows(parameters).view(_WORD).reshape(-1, _DRAW_WORDS)


@dataclass(frozen=True, eq=False)
class _Decodes:
    """The slots that decode, which are kept while batches have the same ones.

    Attributes:
        slots: [decodes], on the host.
        indices: the same in int64.
        words: the same in int32.
        rows: [decodes] int64, their rows.
    """

    slots: Int32Array
    indices: OnDevice
    words: OnDevice
    rows: OnDevice

    @classmethod
    def of(cls, slots: Int32Array, staging: Staging, device: torch.device) -> _Decodes:
        staged = staging.add(slots)
        # A copy, so that nothing keeps the staging buffer, and kernels read whole words of memory.
        words = Later(lambda: staged.tensor.clone())
        indices = Later(lambda: words.tensor.to(torch.int64))
        return cls(slots, indices, words, Later(lambda: torch.arange(len(slots), device=device)))


@dataclass(frozen=True, eq=False)
class _Chunks:
    """The chunks of prompts, and the slots that draw from them.

    Attributes:
        ids: [prefill rows] int64.
        positions: [prefill rows] int64.
        drawing: [draws] int64, the slots that draw.
        drawn_rows: [draws] int64, the rows that they draw from.
        grown: int64, the slots whose lengths the chunks decide.
        ends: int32, these lengths.
    """

    ids: Staged
    positions: Staged
    drawing: Staged
    drawn_rows: Staged
    grown: Staged
    ends: Staged

    @classmethod
    def of(
        cls,
        batch: ForwardBatch,
        positions: Int32Array,
        row_ends: Int32Array,
        ends: Int32Array,
        staging: Staging,
    ) -> _Chunks:
        # A slot that draws from the chunk of another one has the same length from then on.
        grown = np.concatenate((batch.prefill_slots, batch.draw_slots))
        return cls(
            staging.add_indices(batch.prefill_ids),
            staging.add_indices(positions),
            staging.add_indices(batch.draw_slots),
            staging.add_indices(row_ends[batch.draw_chunks] - 1),
            staging.add_indices(grown),
            staging.add(np.concatenate((ends, ends[batch.draw_chunks]))),
        )


class TableChanges:
    """The changes of one batch; ``DeviceTables.plan`` makes them.

    Attributes:
        sampled_slots: [sampling rows] int64: those that decode, then those that draw from chunks.
        sampled_rows: [sampling rows] int64, among those of the batch; None if they are all rows.
        draws: [sampling rows, bytes] uint8, a ``DRAW`` for each. None if no kernel draws tokens.
    """

    def __init__(
        self,
        tables: DeviceTables,
        draws: Tensor | None,
        decodes: _Decodes,
        chunks: _Chunks | None,
        entering: tuple[Staged, Staged] | None,
        entries: tuple[Staged, Staged, Staged] | None,
    ) -> None:
        self._tables, self._draws, self._decodes, self._chunks = tables, draws, decodes, chunks
        self._entering, self._entries = entering, entries
        self.sampled_slots: OnDevice = decodes.indices
        self.sampled_rows: OnDevice | None = None
        if chunks is not None:
            self.sampled_slots = _joined(decodes.indices, chunks.drawing)
            self.sampled_rows = _joined(decodes.rows, chunks.drawn_rows)
        self.draws: OnDevice | None = None if draws is None else Later(self._take_draws)

    def apply(self) -> DeviceRows:
        """Changes the tables. Called once, when the staging buffer is sent."""
        tables, slots, chunks = self._tables, self._decodes.indices.tensor, self._chunks
        tables.keep(self._decodes)
        if self._entries is not None:
            entry_slots, columns, pages = (each.tensor for each in self._entries)
            tables.page_table.index_put_((entry_slots, columns), pages)
        if self._draws is not None and self._entering is not None:
            entering, words = self._entering
            self._draws.index_copy_(0, entering.tensor, words.tensor)
        if self.draws is not None:
            _ = self.draws.tensor  # before the next batch goes on with them
        ids = tables.last_tokens.index_select(0, slots)
        positions = tables.lengths.index_select(0, slots)
        lengths = positions + 1
        tables.lengths.index_copy_(0, slots, lengths)
        positions = positions.to(torch.int64)
        if chunks is not None:
            tables.lengths.index_copy_(0, chunks.grown.tensor, chunks.ends.tensor)
            ids = torch.cat((ids, chunks.ids.tensor))
            positions = torch.cat((positions, chunks.positions.tensor))
        return DeviceRows(ids, positions, self._decodes.words.tensor, lengths)

    def _take_draws(self) -> Tensor:
        """Copies the draws of this batch, and moves them to the next positions."""
        assert self._draws is not None
        slots = self.sampled_slots.tensor
        taken = self._draws.index_select(0, slots)
        # A slot draws once in a batch.
        self._draws.select(1, _POSITION).index_copy_(0, slots, taken.select(1, _POSITION) + 1)
        return taken.view(torch.uint8)


def _joined(first: OnDevice, second: OnDevice) -> OnDevice:
    return Later(lambda: torch.cat((first.tensor, second.tensor)))
