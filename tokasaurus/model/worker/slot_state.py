"""The worker's memory of each slot between batches.

The device holds what it writes or reads itself (``device_tables``). The host holds lengths, counts
and sampling parameters, too, in numpy arrays: with these it checks batches and plans what some of
them ask for. They depend on the batches alone, never on the sampled tokens, so the host prepares a
batch without waiting for the previous one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.errors import ProtocolError
from tokasaurus.model.backend.base import NO_GROUPS, PrefixGroups, SamplingKernels, SequenceRows
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.drawing import plan_draws, plan_scores
from tokasaurus.model.sampling.history import History
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.rows import PromptRows, SamplingRows
from tokasaurus.model.sampling.slot_names import SlotNames
from tokasaurus.model.upload import Staged, Staging
from tokasaurus.model.worker.device_tables import DeviceTables
from tokasaurus.model.worker.pooling import PlannedPooling, Pooler
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array
from tokasaurus.protocol.messages import ForwardBatch, SlotParameters
from tokasaurus.rounding import ceil_div

__all__ = ["HISTORY_BYTES", "PlannedBatch", "SlotState"]

# Generated ids that fit in the history, for each position of the KV cache.
_HISTORY_SHARE = 2

HISTORY_BYTES = _HISTORY_SHARE * 4
"""Of the history, for each position of the KV cache."""

_NO_ROWS: NDArray[np.intp] = np.empty(0, np.intp)


@dataclass(frozen=True)
class PageCopies:
    """Pages to copy. Both are [copies] int64."""

    sources: Staged
    targets: Staged


@dataclass(frozen=True)
class PlannedBatch:
    """The rows of one batch: decode rows, then prefill rows.

    Attributes:
        inputs: ids, [rows] int64, on the device. A later stage of a pipeline replaces them by
            hidden states, [rows, hidden].
        positions: [rows] int64, on the device.
        sequences: the rows of each sequence.
        sampling: the rows to draw a token from.
        prompt: the rows that give prompt logprobs. None if no chunk asked.
        pooling: of the chunks that asked.
        early_copies: to make before the layers run. None if no prompt begins inside a page.
        copies: to make after the layers have run. None if no prompt forks inside a page.
    """

    inputs: Tensor
    positions: Tensor
    sequences: SequenceRows
    sampling: SamplingRows
    prompt: PromptRows | None
    pooling: PlannedPooling | None
    early_copies: PageCopies | None
    copies: PageCopies | None

    @property
    def num_rows(self) -> int:
        return len(self.positions)


class SlotState:
    """The tables over slots.

    Args:
        num_slots: rows of each table.
        num_pages: of the KV cache; the page table's ids are below it.
        page_size: in tokens.
        max_request_tokens: the length of the longest possible sequence.
        vocab_size: ids are below it.
        device: of the page table and the last tokens.
        kernels: of sampling; None if the device has none of its own.
        names: of the slots' requests, which are kept up here.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_request_tokens: int,
        vocab_size: int,
        device: torch.device,
        kernels: SamplingKernels | None = None,
        names: SlotNames | None = None,
    ) -> None:
        self._names = SlotNames() if names is None else names
        self._kernels = kernels
        self._num_slots, self._num_pages, self._page_size = num_slots, num_pages, page_size
        self._vocab_size = vocab_size
        self._num_columns = ceil_div(max_request_tokens, page_size)
        self._device = device
        self._tables = DeviceTables(
            num_slots, self._num_columns, device, has_draws=kernels is not None
        )
        self.lengths: Int32Array = np.zeros(num_slots, np.int32)
        # Columns of the page table in use.
        self.pages_held: Int32Array = np.zeros(num_slots, np.int32)
        self.sampling = SamplingParameters.neutral(num_slots)
        # Running sequences have generated at most as many ids as the KV cache has positions, unless
        # sequences share pages. Sequences whose pages were already given back, while their last
        # batches are in flight, may hold as many again.
        self._history = History(
            num_slots, max_request_tokens, self._num_remembered, device, self._names
        )
        self.adjustments = AdjustmentTable(num_slots, vocab_size, self._history, device)
        self.pooler = Pooler()

    @property
    def page_table(self) -> Tensor:
        """[slots, columns] int32, on the device; always the same tensor."""
        return self._tables.page_table

    @property
    def last_tokens(self) -> Tensor:
        """[slots] int64, on the device; always the same tensor."""
        return self._tables.last_tokens

    @property
    def _num_remembered(self) -> int:
        return _HISTORY_SHARE * self._num_pages * self._page_size

    def set_num_pages(self, num_pages: int) -> None:
        """The KV cache has another number of pages than it had before. No slot is in use."""
        self._num_pages = num_pages
        self._history.resize(self._num_remembered)

    def clear(self) -> None:
        """Forgets all slots in place: tensors stay where they are."""
        self._tables.clear()
        self.lengths[:] = self.pages_held[:] = 0
        self.sampling.clear()
        self.adjustments.clear()
        self.pooler.clear()

    def apply(self, batch: ForwardBatch) -> PlannedBatch:
        """Applies the batch's changes to the tables, lays out its rows, and plans its sampling.

        Everything that the device needs of it is sent at once. Afterwards ``lengths`` include the
        batch's own tokens, and numbers of generated tokens those that it draws.

        Raises:
            ProtocolError: the batch names slots, pages, ids or positions that cannot exist.
        """
        staging = Staging(self._device)
        if batch.left_slots is not None:
            self._check_range("slots that were left", batch.left_slots, self._num_slots)
            self.adjustments.leave(batch.left_slots)
        if batch.parameters is not None:
            self._enter(batch.parameters, staging)
        self._hold_pages(batch)
        self._check_slots(batch)
        num_decodes = len(batch.decode_slots)
        slots = np.concatenate((batch.decode_slots, batch.prefill_slots))
        counts = np.concatenate((np.ones(num_decodes, np.int32), batch.prefill_lengths))
        firsts = np.concatenate((self.lengths[batch.decode_slots], batch.prefill_starts))
        ends = np.cumsum(counts, dtype=np.int32)
        lengths = firsts + counts
        self._check_lengths(slots, firsts, lengths)
        self.lengths[slots] = lengths
        query_starts = np.concatenate((np.zeros(1, np.int32), ends))
        num_rows = int(query_starts[-1])
        positions = np.arange(num_rows, dtype=np.int32) + np.repeat(firsts - ends + counts, counts)
        sampled_slots = np.concatenate((batch.decode_slots, batch.draw_slots))
        self._fork(batch, lengths[num_decodes:])
        scored_rows, next_ids = self._scored(batch)
        groups = self._groups(batch, firsts)
        changes = self._tables.plan(
            batch, positions, ends[num_decodes:], lengths[num_decodes:], self.sampling, staging
        )
        sampling = plan_draws(
            changes.sampled_rows,
            sampled_slots,
            changes.sampled_slots,
            self.sampling,
            self.adjustments,
            self._vocab_size,
            staging,
            self._kernels,
            changes.draws,
        )
        self.sampling["num_generated"][sampled_slots] += 1
        prompt = None
        if len(scored_rows):
            parameters = self._scoring(batch, scored_rows)
            rows = scored_rows + num_decodes
            prompt = plan_scores(
                rows, next_ids, parameters, self._vocab_size, staging, self._kernels
            )
        early_copies = _staged_copies(batch.early_copy_sources, batch.early_copy_targets, staging)
        pooling = self.pooler.plan(batch, staging)
        copies = _staged_copies(batch.copy_sources, batch.copy_targets, staging)
        staging.send()
        device_rows = changes.apply()
        self.adjustments.write_entries()
        return PlannedBatch(
            inputs=device_rows.inputs,
            positions=device_rows.positions,
            sequences=SequenceRows(
                slots=slots,
                query_starts=query_starts,
                kv_lengths=lengths,
                positions=positions,
                page_table=self.page_table,
                num_decodes=num_decodes,
                groups=groups,
                decode_slots=device_rows.decode_slots,
                decode_lengths=device_rows.decode_lengths,
            ),
            sampling=sampling,
            prompt=prompt,
            pooling=pooling,
            early_copies=early_copies,
            copies=copies,
        )

    def _groups(self, batch: ForwardBatch, firsts: Int32Array) -> PrefixGroups:
        """The groups of the batch, checked: all rows come behind the pages of their groups.

        Args:
            batch: the message.
            firsts: [sequences], the position of the first row of each.
        """
        num_groups, num_decodes = len(batch.group_first_decodes), len(batch.decode_slots)
        if not num_groups:
            return NO_GROUPS
        first_chunks = num_chunks = np.zeros(num_groups, np.int32)
        if batch.group_first_chunks is not None and batch.group_num_chunks is not None:
            first_chunks, num_chunks = batch.group_first_chunks, batch.group_num_chunks
        columns = (
            batch.group_first_decodes,
            batch.group_num_decodes,
            first_chunks,
            num_chunks,
            batch.group_first_columns,
            batch.group_num_columns,
        )
        if any(len(column) != num_groups or column.min() < 0 for column in columns):
            raise ProtocolError("the columns of its groups disagree")
        groups = PrefixGroups(*columns)
        groups = replace(groups, first_chunks=first_chunks + np.int32(num_decodes))
        ends = (groups.first_columns + groups.num_columns) * self._page_size
        beyond = groups.first_decodes + groups.num_decodes > num_decodes
        beyond |= groups.first_chunks + groups.num_chunks > len(firsts)
        beyond |= groups.num_decodes + groups.num_chunks == 0
        beyond |= groups.num_columns == 0
        if not beyond.any():
            beyond = ends > np.minimum(
                _lowest(firsts, groups.first_decodes, groups.num_decodes),
                _lowest(firsts, groups.first_chunks, groups.num_chunks),
            )
        if beyond.any():
            decode, decodes, chunk, chunks, column, width = (
                int(each[beyond][0]) for each in columns
            )
            raise ProtocolError(
                f"it has a group of {decodes} rows from {decode} on and {chunks} chunks from"
                f" {chunk} on, with pages {column} to {column + width}, which these do not fill"
            )
        return groups

    def record(self, rows: SamplingRows, token_ids: Tensor) -> None:
        """Remembers the drawn tokens, which are the input of the slots' next decode rows.

        Args:
            rows: that drew.
            token_ids: [rows] int64, on the device.
        """
        self._tables.last_tokens.index_copy_(0, rows.device_slots.tensor, token_ids)
        if rows.recording is not None:
            rows.recording.record(token_ids)

    def _scored(self, batch: ForwardBatch) -> tuple[NDArray[np.intp], Int32Array]:
        """The prefill rows that give prompt logprobs, and the token after each."""
        #   ids        a b c | d e        two chunks; the second ends its prompt
        #   next_ids   b c d | e -1       d comes from the first chunk's prefill_next_ids
        if not (batch.prefill_num_logprobs >= 0).any():
            return _NO_ROWS, EMPTY_INT32
        ends = np.cumsum(batch.prefill_lengths)
        next_ids = np.empty(len(batch.prefill_ids), np.int32)
        next_ids[:-1] = batch.prefill_ids[1:]
        next_ids[ends - 1] = batch.prefill_next_ids
        asks = np.repeat(batch.prefill_num_logprobs >= 0, batch.prefill_lengths)
        rows = np.flatnonzero(asks & (next_ids >= 0))
        self._check_range("prompt ids", next_ids[rows], self._vocab_size)
        return rows, next_ids[rows]

    def _scoring(self, batch: ForwardBatch, rows: NDArray[np.intp]) -> SamplingParameters:
        """The parameters of each prefill row's slot, with the chunk's number of logprobs."""
        chunks = np.searchsorted(np.cumsum(batch.prefill_lengths), rows, side="right")
        parameters = self.sampling.take(batch.prefill_slots[chunks])
        parameters["num_logprobs"][:] = batch.prefill_num_logprobs[chunks]
        return parameters

    def _fork(self, batch: ForwardBatch, chunk_ends: Int32Array) -> None:
        """Gives each slot that draws from a chunk the length of the chunk's sequence."""
        slots, ends = batch.draw_slots, chunk_ends[batch.draw_chunks]
        self._check_lengths(slots, ends, ends)
        self.lengths[slots] = ends

    def _enter(self, parameters: SlotParameters, staging: Staging) -> None:
        slots = parameters.slots
        self._check_range("slots of parameters", slots, self._num_slots)
        self._names.enter(parameters)
        self.lengths[slots] = 0
        self.pages_held[slots] = 0
        self.sampling.assign(parameters)
        self.adjustments.enter(parameters, staging)

    def _hold_pages(self, batch: ForwardBatch) -> None:
        """Counts the pages that slots get, and checks the pages of the batch."""
        slots, columns, pages = batch.table_slots, batch.table_columns, batch.table_pages
        if len(slots):
            self._check_range("slots of the page table", slots, self._num_slots)
            self._check_range("columns of the page table", columns, self._num_columns)
            self._check_range("pages", pages, self._num_pages)
            np.maximum.at(self.pages_held, slots, columns + 1)
        self._check_range("pages to copy", batch.copy_sources, self._num_pages)
        self._check_range("pages to copy to", batch.copy_targets, self._num_pages)
        if batch.early_copy_sources is not None and batch.early_copy_targets is not None:
            self._check_range("pages to copy early", batch.early_copy_sources, self._num_pages)
            self._check_range("pages to copy early to", batch.early_copy_targets, self._num_pages)

    def _check_slots(self, batch: ForwardBatch) -> None:
        slots = np.concatenate((batch.decode_slots, batch.prefill_slots))
        self._check_range("slots", slots, self._num_slots)
        named = np.zeros(self._num_slots, np.bool_)
        named[slots] = True
        if np.count_nonzero(named) != len(slots):
            raise ProtocolError("it names a slot twice")
        self._check_draws(batch)
        if (self.lengths[batch.decode_slots] == 0).any():
            raise ProtocolError("it decodes a slot that has no tokens yet")
        self._check_range("prompt ids", batch.prefill_ids, self._vocab_size)
        if int(batch.prefill_lengths.sum()) != len(batch.prefill_ids) or (
            len(batch.prefill_lengths) and batch.prefill_lengths.min() < 1
        ):
            raise ProtocolError("lengths and ids of its prompts disagree")

    def _check_draws(self, batch: ForwardBatch) -> None:
        chunks, slots = batch.draw_chunks, batch.draw_slots
        self._check_range("chunks to draw from", chunks, len(batch.prefill_slots))
        self._check_range("slots that draw", slots, self._num_slots)
        # A slot that draws either feeds that same chunk or has no row in this batch.
        draws_from = np.full(self._num_slots, -1, np.int32)
        draws_from[slots] = chunks
        chunk_of = np.full(self._num_slots, -1, np.int32)
        chunk_of[batch.prefill_slots] = np.arange(len(batch.prefill_slots))
        own = chunk_of[slots]
        if (
            np.count_nonzero(draws_from >= 0) != len(slots)
            or (draws_from[batch.decode_slots] >= 0).any()
            or ((own >= 0) & (own != chunks)).any()
        ):
            raise ProtocolError("it draws for a slot twice")

    def _check_lengths(self, slots: Int32Array, firsts: Int32Array, lengths: Int32Array) -> None:
        beyond = (firsts < 0) | (lengths > self.pages_held[slots] * self._page_size)
        if beyond.any():
            slot, length = slots[beyond][0], lengths[beyond][0]
            raise ProtocolError(
                f"slot {slot} would hold {length} tokens in {self.pages_held[slot]} pages"
            )

    def _check_range(self, what: str, values: NDArray[np.integer[Any]], limit: int) -> None:
        if len(values) and (values.min() < 0 or values.max() >= limit):
            raise ProtocolError(
                f"{what} range from {values.min()} to {values.max()}, the limit is {limit}"
            )


def _lowest(values: Int32Array, starts: Int32Array, counts: Int32Array) -> Int32Array:
    """[ranges] the lowest of ``values[start : start + count]``; the largest int32 if it is empty.

    Args:
        values: [values].
        starts: [ranges], at most the number of values.
        counts: [ranges].
    """
    highest = np.iinfo(np.int32).max
    bounds = np.stack((starts, starts + counts), axis=1).ravel()
    padded = np.append(values, np.int32(highest))
    lowest = np.minimum.reduceat(padded, bounds)[::2]
    return np.where(counts > 0, lowest, np.int32(highest))


def _staged_copies(
    sources: Int32Array | None, targets: Int32Array | None, staging: Staging
) -> PageCopies | None:
    """The pages to copy; None if there are none."""
    if sources is None or targets is None or not len(sources):
        return None
    return PageCopies(staging.add_indices(sources), staging.add_indices(targets))
