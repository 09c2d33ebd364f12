"""The messages to the server of one turn: refusals, outputs of prompts, then all updates in one."""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.sequence import GeneratedTokens, Sequence
from tokasaurus.manager.slots import NO_SLOTS, IndexArray, SlotTable
from tokasaurus.manager.token_window import TokenWindow
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    FinishReason,
    SequenceUpdates,
    ToServer,
)

__all__ = ["Outbox"]


class Outbox:
    """Collects messages until the end of a turn."""

    def __init__(self) -> None:
        self._messages: list[ToServer] = []
        self._ended: list[tuple[Sequence, FinishReason]] = []

    def add(self, message: ToServer) -> None:
        """Adds a message that goes out before the updates of this turn."""
        self._messages.append(message)

    def add_final(self, sequence: Sequence, reason: FinishReason) -> None:
        """Adds the last row of a sequence that has ended, with all its undelivered tokens.

        The sequence must keep its slot, if it has one, until the messages are collected.
        """
        self._ended.append((sequence, reason))

    def collect(self, slots: SlotTable, window: TokenWindow) -> list[ToServer]:
        """Returns all messages. Streams get all tokens that are known by now."""
        messages, self._messages = self._messages, []
        ended, self._ended = self._ended, []
        streams = (slots.incremental & (slots.known > slots.delivered)).nonzero()[0]
        finished = [end for end in ended if end[1] is not FinishReason.ABORT]
        updates = _updates(finished, streams, slots, window)
        if len(finished) < len(ended):  # cancelled samples come after those that were enough
            cancelled = [end for end in ended if end[1] is FinishReason.ABORT]
            updates += _updates(cancelled, NO_SLOTS, slots, window)
        if updates:
            messages.append(_joined(updates))
        return messages


def _updates(
    ended: list[tuple[Sequence, FinishReason]],
    streams: IndexArray,
    slots: SlotTable,
    window: TokenWindow,
) -> list[SequenceUpdates]:
    """The updates of sequences that ended, and of slots that stream."""
    rows: list[int] = []
    reasons: list[FinishReason] = []
    others: list[tuple[Sequence, FinishReason]] = []
    for sequence, reason in ended:
        if sequence.slot >= 0 and (sequence.request.incremental or not sequence.stored):
            rows.append(sequence.slot)
            reasons.append(reason)
        else:
            others.append((sequence, reason))
    updates: list[SequenceUpdates] = []
    if rows or streams.size:
        in_rings = np.concatenate([np.array(rows, np.intp), streams]) if rows else streams
        updates.append(_ring_updates(in_rings, reasons, slots, window))
    if others:
        updates.append(_stored_updates(others, slots, window))
    return updates


def _ring_updates(
    rows: IndexArray, reasons: list[FinishReason], slots: SlotTable, window: TokenWindow
) -> SequenceUpdates:
    """The update of slots whose undelivered tokens are all in their rings; the first have ended."""
    delivered, known = slots.delivered[rows], slots.known[rows]
    tokens = window.tokens(rows, delivered)
    slots.delivered[rows] = known
    finish_reasons: Int32Array = np.zeros(len(rows), np.int32)
    finish_reasons[: len(reasons)] = reasons
    return SequenceUpdates(
        request_ids=slots.request_id[rows],
        sample_indices=slots.sample_index[rows],
        num_tokens=known - delivered,
        finish_reasons=finish_reasons,
        num_cached_tokens=slots.num_cached_tokens[rows],
        num_logprobs=slots.num_logprobs[rows],
        weights_versions=np.zeros(len(rows), np.int32),
        token_ids=tokens.ids,
        logprobs=tokens.logprobs,
        top_ids=tokens.top_ids,
        top_logprobs=tokens.top_logprobs,
    )


def _stored_updates(
    ended: list[tuple[Sequence, FinishReason]], slots: SlotTable, window: TokenWindow
) -> SequenceUpdates:
    """The update of ended sequences with tokens outside the rings, or without a slot."""
    window.store([sequence.slot for sequence, _ in ended if sequence.slot >= 0])
    stored = [sequence.undelivered for sequence, _ in ended]
    tokens = GeneratedTokens.joined([piece for pieces in stored for piece in pieces])
    num_tokens = [sum(len(piece.ids) for piece in pieces) for pieces in stored]
    messages = [sequence.request.message for sequence, _ in ended]
    return SequenceUpdates(
        request_ids=np.array([message.request_id for message in messages], np.int64),
        sample_indices=_int32([sequence.sample_index for sequence, _ in ended]),
        num_tokens=_int32(num_tokens),
        finish_reasons=_int32([reason for _, reason in ended]),
        num_cached_tokens=_int32([sequence.num_cached_tokens for sequence, _ in ended]),
        num_logprobs=_int32([message.num_logprobs for message in messages]),
        weights_versions=np.zeros(len(ended), np.int32),
        token_ids=tokens.ids,
        logprobs=tokens.logprobs,
        top_ids=tokens.top_ids,
        top_logprobs=tokens.top_logprobs,
    )


def _joined(updates: list[SequenceUpdates]) -> SequenceUpdates:
    if len(updates) == 1:
        return updates[0]
    fields = SequenceUpdates.__struct_fields__
    return SequenceUpdates(
        **{name: np.concatenate([getattr(update, name) for update in updates]) for name in fields}
    )


def _int32(values: list[int]) -> Int32Array:
    return np.array(values, np.int32)
