"""The messages to the server of one turn: refusals, outputs of prompts, then all updates in one."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

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

    def collect(
        self, slots: SlotTable, window: TokenWindow, weights_version: int
    ) -> list[ToServer]:
        """Returns all messages. Streams get all tokens that are known by now.

        Args:
            slots: the table.
            window: the latest tokens of its slots.
            weights_version: the present one, for sequences that end without a token to deliver.
        """
        messages, self._messages = self._messages, []
        ended, self._ended = self._ended, []
        streams = (slots.incremental & (slots.known > slots.delivered)).nonzero()[0]
        finished = [end for end in ended if end[1] is not FinishReason.ABORT]
        updates = _updates(finished, streams, slots, window, weights_version)
        if len(finished) < len(ended):  # cancelled samples come after those that were enough
            cancelled = [end for end in ended if end[1] is FinishReason.ABORT]
            updates += _updates(cancelled, NO_SLOTS, slots, window, weights_version)
        if updates:
            messages.append(_joined(updates))
        return messages


def _updates(
    ended: list[tuple[Sequence, FinishReason]],
    streams: IndexArray,
    slots: SlotTable,
    window: TokenWindow,
    weights_version: int,
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
        updates.append(_stored_updates(others, window, weights_version))
    return updates


def _ring_updates(
    rows: IndexArray, reasons: list[FinishReason], slots: SlotTable, window: TokenWindow
) -> SequenceUpdates:
    """The update of slots whose undelivered tokens are all in their rings; the first have ended.

    Weights of one version drew them: a slot is left before the weights change.
    """
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
        weights_versions=slots.weights_version[rows],
        token_ids=tokens.ids,
        logprobs=tokens.logprobs,
        top_ids=tokens.top_ids,
        top_logprobs=tokens.top_logprobs,
    )


class _StoredRow(NamedTuple):
    """Tokens of one sequence that weights of one version drew."""

    sequence: Sequence
    pieces: list[GeneratedTokens]
    weights_version: int
    finish_reason: FinishReason


def _stored_updates(
    ended: list[tuple[Sequence, FinishReason]], window: TokenWindow, weights_version: int
) -> SequenceUpdates:
    """The update of ended sequences with tokens outside the rings, or without a slot."""
    window.store([sequence.slot for sequence, _ in ended if sequence.slot >= 0])
    rows: list[_StoredRow] = []
    for sequence, reason in ended:
        rows += _stored_rows(sequence, reason, weights_version)
    tokens = GeneratedTokens.joined([piece for row in rows for piece in row.pieces])
    messages = [row.sequence.request.message for row in rows]
    return SequenceUpdates(
        request_ids=np.array([message.request_id for message in messages], np.int64),
        sample_indices=_int32([row.sequence.sample_index for row in rows]),
        num_tokens=_int32([sum(len(piece.ids) for piece in row.pieces) for row in rows]),
        finish_reasons=_int32([row.finish_reason for row in rows]),
        num_cached_tokens=_int32([row.sequence.num_cached_tokens for row in rows]),
        num_logprobs=_int32([message.num_logprobs for message in messages]),
        weights_versions=_int32([row.weights_version for row in rows]),
        token_ids=tokens.ids,
        logprobs=tokens.logprobs,
        top_ids=tokens.top_ids,
        top_logprobs=tokens.top_logprobs,
    )


def _stored_rows(
    sequence: Sequence, reason: FinishReason, weights_version: int
) -> list[_StoredRow]:
    """A row for each version among the stored tokens; the last one says that it has ended."""
    stored = sequence.undelivered
    latest = stored[-1].weights_version if stored else weights_version
    if not stored or stored[0].weights_version == latest:  # versions never decrease
        return [_StoredRow(sequence, stored, latest, reason)]
    versions = groupby(stored, key=lambda piece: piece.weights_version)
    rows = [
        _StoredRow(sequence, list(pieces), version, FinishReason.RUNNING)
        for version, pieces in versions
    ]
    rows[-1] = rows[-1]._replace(finish_reason=reason)
    return rows


def _joined(updates: list[SequenceUpdates]) -> SequenceUpdates:
    if len(updates) == 1:
        return updates[0]
    fields = SequenceUpdates.__struct_fields__
    return SequenceUpdates(
        **{name: np.concatenate([getattr(update, name) for update in updates]) for name in fields}
    )


def _int32(values: list[int]) -> Int32Array:
    return np.array(values, np.int32)
