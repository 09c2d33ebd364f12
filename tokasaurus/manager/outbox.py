"""What the server is told in one step: refusals, what prompts brought, then all updates in one message."""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.sequence import GeneratedTokens, Sequence
from tokasaurus.manager.slots import SlotTable
from tokasaurus.manager.token_window import TokenWindow
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    FinishReason,
    SequenceUpdates,
    ToServer,
)

__all__ = ["Outbox"]


class Outbox:
    """Collects messages until the end of a step."""

    def __init__(self) -> None:
        self._messages: list[ToServer] = []
        self._ended: list[tuple[Sequence, FinishReason]] = []

    def add(self, message: ToServer) -> None:
        """These go out before the step's updates."""
        self._messages.append(message)

    def add_final(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence has ended: its last row will bring all tokens that were not delivered before.

        It must keep its slot, if it has one, until the messages are collected.
        """
        self._ended.append((sequence, reason))

    def collect(self, slots: SlotTable, window: TokenWindow) -> list[ToServer]:
        """Returns all messages; streams are up to date with what is known then."""
        messages: list[ToServer] = [*self._messages]
        self._messages = []
        updates = [*_final_updates(self._ended, slots, window), *_stream_updates(slots, window)]
        self._ended = []
        if updates:
            messages.append(_joined(updates))
        return messages


def _final_updates(
    ended: list[tuple[Sequence, FinishReason]], slots: SlotTable, window: TokenWindow
) -> list[SequenceUpdates]:
    if not ended:
        return []
    sequences = [sequence for sequence, _ in ended]
    messages = [sequence.request.message for sequence in sequences]
    widths = [message.num_logprobs for message in messages]
    num_tokens, tokens = _final_tokens(sequences, widths, slots, window)
    return [
        SequenceUpdates(
            request_ids=np.array([message.request_id for message in messages], np.int64),
            sample_indices=_int32([sequence.sample_index for sequence in sequences]),
            num_tokens=_int32(num_tokens),
            finish_reasons=_int32([reason for _, reason in ended]),
            num_cached_tokens=_int32([sequence.num_cached_tokens for sequence in sequences]),
            num_logprobs=_int32(widths),
            token_ids=tokens.ids,
            logprobs=tokens.logprobs,
            top_ids=tokens.top_ids,
            top_logprobs=tokens.top_logprobs,
        )
    ]


def _final_tokens(
    sequences: list[Sequence], widths: list[int], slots: SlotTable, window: TokenWindow
) -> tuple[list[int], GeneratedTokens]:
    """What the server has not been sent of each: how many tokens, and all of them."""
    rows = np.array([sequence.slot for sequence in sequences if sequence.slot >= 0], np.intp)
    streams = [sequence.request.incremental for sequence in sequences if sequence.slot >= 0]
    first = np.where(streams, slots.delivered[rows], slots.stored[rows])
    in_rings = window.tokens(rows, first)
    num_new = (slots.known[rows] - first).tolist()
    # A stream was sent everything before it lost its slot, or before it was stored.
    has_stored = [bool(s.stored) and not s.request.incremental for s in sequences]
    if len(rows) == len(sequences) and not any(has_stored):
        return num_new, in_rings
    counts = iter(num_new)
    pieces: list[GeneratedTokens] = []
    num_tokens: list[int] = []
    token = logprob = top = 0
    for sequence, width, is_stored in zip(sequences, widths, has_stored, strict=True):
        count = 0
        if is_stored:
            pieces += sequence.stored
            count = sequence.num_stored
        if sequence.slot >= 0:
            new = next(counts)
            num_logprobs = new if width >= 0 else 0
            num_tops = num_logprobs * width
            pieces.append(
                GeneratedTokens(
                    in_rings.ids[token : token + new],
                    in_rings.logprobs[logprob : logprob + num_logprobs],
                    in_rings.top_ids[top : top + num_tops],
                    in_rings.top_logprobs[top : top + num_tops],
                )
            )
            token, logprob, top = token + new, logprob + num_logprobs, top + num_tops
            count += new
        num_tokens.append(count)
    return num_tokens, GeneratedTokens.joined(pieces)


def _stream_updates(slots: SlotTable, window: TokenWindow) -> list[SequenceUpdates]:
    rows = np.flatnonzero(slots.incremental & (slots.known > slots.delivered))
    if not rows.size:
        return []
    delivered = slots.delivered[rows]
    tokens = window.tokens(rows, delivered)
    known = slots.known[rows]
    num_tokens = known - delivered
    slots.delivered[rows] = known
    return [
        SequenceUpdates(
            request_ids=slots.request_id[rows],
            sample_indices=slots.sample_index[rows],
            num_tokens=num_tokens,
            finish_reasons=np.zeros(len(rows), np.int32),
            num_cached_tokens=slots.num_cached_tokens[rows],
            num_logprobs=slots.num_logprobs[rows],
            token_ids=tokens.ids,
            logprobs=tokens.logprobs,
            top_ids=tokens.top_ids,
            top_logprobs=tokens.top_logprobs,
        )
    ]


def _joined(updates: list[SequenceUpdates]) -> SequenceUpdates:
    if len(updates) == 1:
        return updates[0]
    fields = SequenceUpdates.__struct_fields__
    return SequenceUpdates(
        **{name: np.concatenate([getattr(update, name) for update in updates]) for name in fields}
    )


def _int32(values: list[int]) -> Int32Array:
    return np.array(values, np.int32)
