"""A worker without tensors: it returns tokens, and the time that a real worker would take.

Of each slot it keeps only what costs and tokens depend on: the length, and which sequence is in it.
It does not look at page tables or prompt ids. Groups say how many pages sequences share.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ProtocolError
from tokasaurus.planner.cost_model import NO_GROUPS, BatchWork, CostModel, GroupWork
from tokasaurus.planner.lengths import CompletionLengths, mix
from tokasaurus.protocol.arrays import (
    EMPTY_FLOAT32,
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
)
from tokasaurus.protocol.commands import Control, ControlDone
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult, SlotParameters

__all__ = ["STOP_ID", "VOCAB_SIZE", "SimulatedDevice", "drawn_ids"]

VOCAB_SIZE = 32000
STOP_ID = 0  # drawn where a completion ends, and nowhere else


def drawn_ids(
    keys: NDArray[np.uint64], positions: Int64Array, vocab_size: int = VOCAB_SIZE
) -> Int32Array:
    """The tokens at generated positions at which their sequences do not end.

    Args:
        keys: [rows], ``mix(seed, sample index)``.
        positions: [rows], from 0.
        vocab_size: ids are below it.
    """
    hashes = mix(keys, positions.astype(np.uint64))
    ids: Int32Array = (hashes % np.uint64(vocab_size - 1)).astype(np.int32) + np.int32(1)
    return ids


class SimulatedDevice:
    """Runs numbered batches and controls in order.

    Args:
        cost: how long batches take.
        lengths: how long completions get.
        num_slots: the number of slots of the manager.
        page_size: tokens of a page of the KV cache, which groups count in.
        vocab_size: the size of the vocabulary of the model that it pretends to run.
    """

    def __init__(
        self,
        cost: CostModel,
        lengths: CompletionLengths,
        num_slots: int,
        page_size: int,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self._cost = cost
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._completions = lengths
        self._next_number = 0
        # By slot.
        self._lengths = np.zeros(num_slots, np.int64)  # positions in the KV cache
        self._keys = np.zeros(num_slots, np.uint64)
        self._num_generated = np.zeros(num_slots, np.int64)
        self._ends = np.zeros(num_slots, np.int64)  # the value of num_generated at which it stops
        self._num_logprobs = np.full(num_slots, -1, np.int32)
        self._draw_s: Float64Array = np.zeros(num_slots)  # see DrawCosts

    def run(self, batch: ForwardBatch) -> ForwardResult:
        """Runs a batch. ``device_s`` of the result is the modelled time, which is not waited for.

        Raises:
            ProtocolError: one of these:

                - the batch is not the next one;
                - it decodes a slot that has no tokens;
                - it leaves a gap in a prompt;
                - it draws before a prompt has ended.
        """
        if batch.number != self._next_number:
            raise ProtocolError(f"batch {batch.number} came, batch {self._next_number} was due")
        self._next_number += 1
        if batch.parameters is not None:
            self._enter(batch.parameters)
        slots = np.concatenate((batch.decode_slots, batch.draw_slots))
        work = self._extend(batch, slots)
        return self._result(batch, slots, self._cost.batch_s(work))

    def carry_out(self, control: Control) -> ControlDone:
        """Does nothing but keep the numbering: it has neither weights nor a KV cache.

        Raises:
            ProtocolError: the control is not the next one.
        """
        if control.number != self._next_number:
            raise ProtocolError(f"control {control.number} came, {self._next_number} was due")
        self._next_number += 1
        return ControlDone(control.number)

    def _enter(self, parameters: SlotParameters) -> None:
        slots = parameters.slots
        self._lengths[slots] = 0
        self._keys[slots] = mix(
            parameters.seed.astype(np.uint64), parameters.sample_index.astype(np.uint64)
        )
        self._num_generated[slots] = parameters.num_generated
        self._ends[slots] = self._completions.lengths(parameters.seed, parameters.sample_index)
        self._num_logprobs[slots] = parameters.num_logprobs
        draws = self._cost.draws
        draw_s = np.array([draws.of(sampling, -1) for sampling in parameters.samplings])
        self._draw_s[slots] = draw_s[parameters.sampling_index] + draws.logprobs_s * (
            parameters.num_logprobs >= 0
        )

    def _extend(self, batch: ForwardBatch, drawing: Int32Array) -> BatchWork:
        """Adds the batch's tokens to the lengths; returns what the batch asks of a device.

        Args:
            batch: the next one.
            drawing: slots that draw a token.
        """
        decodes = batch.decode_slots
        if (self._lengths[decodes] == 0).any():
            raise ProtocolError(f"batch {batch.number} decodes a slot that has no tokens yet")
        self._lengths[decodes] += 1
        self._check_chunks(batch)
        ends = batch.prefill_starts + batch.prefill_lengths
        self._lengths[batch.prefill_slots] = ends
        self._lengths[batch.draw_slots] = ends[batch.draw_chunks]
        num_scored = _num_scored(batch)
        draw_s = float(self._draw_s.take(drawing).sum())
        return BatchWork(
            num_decodes=len(decodes),
            num_decode_positions=int(self._lengths.take(decodes).sum()),
            chunk_lengths=batch.prefill_lengths,
            chunk_ends=ends,
            num_draws=len(drawing) + num_scored,
            draw_s=draw_s + num_scored * self._cost.draws.logprobs_s,
            groups=self._groups(batch),
        )

    def _groups(self, batch: ForwardBatch) -> GroupWork:
        num_decodes = batch.group_num_decodes
        if not len(num_decodes):
            return NO_GROUPS
        first_chunks, num_chunks = batch.group_first_chunks, batch.group_num_chunks
        if first_chunks is None or num_chunks is None:
            first_chunks = num_chunks = np.zeros_like(num_decodes)
        num_tokens = batch.group_num_columns * np.int32(self._page_size)
        return GroupWork(num_decodes, num_tokens, first_chunks, num_chunks)

    def _check_chunks(self, batch: ForwardBatch) -> None:
        before, starts = self._lengths[batch.prefill_slots], batch.prefill_starts
        # In a slot of length 0 a chunk may start anywhere, since it follows cached tokens.
        gaps = np.flatnonzero((before > 0) & (before != starts))
        if gaps.size:
            slot, length = batch.prefill_slots[gaps[0]], before[gaps[0]]
            raise ProtocolError(
                f"slot {slot} has {length} tokens, and a chunk of batch {batch.number}"
                f" starts at {starts[gaps[0]]}"
            )
        if (batch.prefill_next_ids[batch.draw_chunks] >= 0).any():
            raise ProtocolError(
                f"batch {batch.number} draws from a chunk that does not end a prompt"
            )

    def _draw(self, slots: Int32Array) -> Int32Array:
        positions = self._num_generated[slots]
        ids = drawn_ids(self._keys[slots], positions, self._vocab_size)
        positions += 1
        ids[positions == self._ends[slots]] = STOP_ID
        self._num_generated[slots] = positions
        return ids

    def _result(self, batch: ForwardBatch, slots: Int32Array, device_s: float) -> ForwardResult:
        ids = self._draw(slots)
        logprobs, top_ids, top_logprobs = _logprobs(
            ids, self._num_logprobs[slots], self._vocab_size
        )
        # A chunk has one prompt logprob for each of its tokens, less one if it ends the prompt.
        counts = batch.prefill_lengths - (batch.prefill_next_ids < 0)
        widths = np.repeat(batch.prefill_num_logprobs, counts)
        widths = widths[widths >= 0]
        prompt = _logprobs(np.zeros(len(widths), np.int32), widths, self._vocab_size)
        return ForwardResult(
            number=batch.number,
            token_ids=ids,
            logprobs=logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt[0],
            prompt_ranks=np.ones(len(prompt[0]), np.int32),
            prompt_top_ids=prompt[1],
            prompt_top_logprobs=prompt[2],
            device_s=device_s,
            pooled=_pooled(batch),
            num_grouped_tokens=_num_grouped(batch),
            num_grouped_prefill_tokens=_num_grouped_of_prompts(batch),
        )


def _num_scored(batch: ForwardBatch) -> int:
    """Rows of prompts that give logprobs."""
    if not len(batch.prefill_num_logprobs):
        return 0
    is_asked = batch.prefill_num_logprobs >= 0
    return int((batch.prefill_lengths - (batch.prefill_next_ids < 0))[is_asked].sum())


def _num_grouped(batch: ForwardBatch) -> int:
    """Decode rows in a group: this device takes every group. Rows in none come first."""
    firsts = batch.group_first_decodes
    return len(batch.decode_slots) - int(firsts.min()) if len(firsts) else 0


def _num_grouped_of_prompts(batch: ForwardBatch) -> int:
    """Rows of the chunks in a group. Chunks in none come first."""
    if batch.group_first_chunks is None:
        return 0
    return int(batch.prefill_lengths[batch.group_first_chunks.min() :].sum())


def _pooled(batch: ForwardBatch) -> Float32Array | None:
    """A state of one element for each pooled prompt that ends in the batch."""
    if batch.prefill_pooling is None:
        return None
    count = np.count_nonzero((batch.prefill_pooling > 0) & (batch.prefill_next_ids < 0))
    return np.zeros((count, 1), np.float32) if count else None


def _logprobs(
    ids: Int32Array, widths: Int32Array, vocab_size: int
) -> tuple[Float32Array, Int32Array, Float32Array]:
    """Logprobs of the right shapes.

    The chosen token is the most likely one. The ids after it follow, each half as likely as the one
    before.

    Args:
        ids: [rows], the chosen tokens.
        widths: [rows], how many top logprobs a row has; -1 if it has no logprobs at all.
        vocab_size: ids are below it.
    """
    if not (widths >= 0).any():
        return EMPTY_FLOAT32, *_no_tops(len(ids))
    ranks = np.arange(widths.max(), dtype=np.int32)
    is_wanted = ranks < widths[:, None]
    halvings = np.float32(np.log(0.5)) * (1 + ranks).astype(np.float32)
    return (
        np.where(widths >= 0, np.float32(np.log(0.5)), np.float32(np.nan)),
        np.where(is_wanted, (ids[:, None] + ranks) % np.int32(vocab_size), np.int32(-1)),
        np.where(is_wanted, halvings, np.float32(np.nan)),
    )


def _no_tops(num_rows: int) -> tuple[Int32Array, Float32Array]:
    return np.zeros((num_rows, 0), np.int32), np.zeros((num_rows, 0), np.float32)
