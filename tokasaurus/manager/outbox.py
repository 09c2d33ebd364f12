"""What the server is told in one step: refusals, prompt logprobs, then all updates in one message."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.manager.sequence import GeneratedTokens, Sequence
from tokasaurus.manager.slots import SlotTable
from tokasaurus.manager.token_window import TokenWindow
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    FinishReason,
    PromptLogprobs,
    RequestRejected,
    SequenceUpdates,
    ToServer,
)

__all__ = ["Outbox"]


@dataclass(frozen=True, eq=False, slots=True)
class _FinalRow:
    sequence: Sequence
    reason: FinishReason
    tokens: GeneratedTokens


class Outbox:
    """Collects messages until the end of a step."""

    def __init__(self) -> None:
        self._messages: list[RequestRejected | PromptLogprobs] = []
        self._final_rows: list[_FinalRow] = []

    def add(self, message: RequestRejected | PromptLogprobs) -> None:
        """These go out before the step's updates."""
        self._messages.append(message)

    def add_final(self, sequence: Sequence, reason: FinishReason, tokens: GeneratedTokens) -> None:
        """The last row of a sequence, with the tokens that were not delivered before."""
        self._final_rows.append(_FinalRow(sequence, reason, tokens))

    def collect(self, slots: SlotTable, window: TokenWindow) -> list[ToServer]:
        """Returns all messages; streams are up to date with what is known then."""
        messages: list[ToServer] = [*self._messages]
        self._messages = []
        updates = [*self._final_updates(), *_stream_updates(slots, window)]
        self._final_rows = []
        if updates:
            messages.append(_joined(updates))
        return messages

    def _final_updates(self) -> list[SequenceUpdates]:
        rows = self._final_rows
        if not rows:
            return []
        messages = [row.sequence.request.message for row in rows]
        return [
            SequenceUpdates(
                request_ids=np.array([message.request_id for message in messages], np.int64),
                sample_indices=_int32([row.sequence.sample_index for row in rows]),
                num_tokens=_int32([len(row.tokens.ids) for row in rows]),
                finish_reasons=_int32([row.reason for row in rows]),
                num_cached_tokens=_int32([row.sequence.num_cached_tokens for row in rows]),
                num_logprobs=_int32([message.num_logprobs for message in messages]),
                token_ids=np.concatenate([row.tokens.ids for row in rows]),
                logprobs=np.concatenate([row.tokens.logprobs for row in rows]),
                top_ids=np.concatenate([row.tokens.top_ids.ravel() for row in rows]),
                top_logprobs=np.concatenate([row.tokens.top_logprobs.ravel() for row in rows]),
            )
        ]


def _stream_updates(slots: SlotTable, window: TokenWindow) -> list[SequenceUpdates]:
    rows = np.flatnonzero(slots.incremental & (slots.known > slots.delivered))
    if not rows.size:
        return []
    tokens = window.undelivered_rows(rows)
    known = slots.known[rows]
    num_tokens = known - slots.delivered[rows]
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
            top_ids=tokens.top_ids.ravel(),
            top_logprobs=tokens.top_logprobs.ravel(),
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
