"""Answers of several managers as those of one, and rows that a lost replica does not send."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from tokasaurus.protocol.arrays import EMPTY_FLOAT32, EMPTY_INT32, Int32Array
from tokasaurus.protocol.commands import CommandDone, CommandFailed
from tokasaurus.protocol.messages import (
    CartridgeState,
    FinishReason,
    GenerateRequest,
    SequenceUpdates,
    Statistics,
)

__all__ = ["Endings", "merged_answers", "merged_statistics", "without_state"]

_STATE_FIELDS = (
    "num_waiting",
    "num_running",
    "num_pages",
    "num_free_pages",
    "num_evictable_pages",
    "step_s",
    "weights_version",
    "paused",
    "num_cartridge_pages",
    "num_in_flight",
    "num_seats",
    "page_size",
    "num_replicas",
)
# What is not summed over the replicas: of the slowest, of the newest, whether any is paused, and
# what is the same in all.
_SHARED_FIELDS = ("step_s", "weights_version", "paused", "page_size")


class Endings:
    """Last rows without tokens, in the place of a replica that does not send them any more."""

    def __init__(self) -> None:
        # Request id, sample index, finish reason, cached tokens, logprobs of a token.
        self.rows: list[tuple[int, int, int, int, int]] = []

    def add(
        self, request: GenerateRequest, num_cached: int, sample_index: int, reason: FinishReason
    ) -> None:
        self.rows.append(
            (request.request_id, sample_index, reason, num_cached, request.num_logprobs)
        )

    def messages(self) -> list[SequenceUpdates]:
        """One message, or none if there are no rows."""
        if not self.rows:
            return []
        request_ids, sample_indices, reasons, num_cached, num_logprobs = zip(
            *self.rows, strict=True
        )
        nothing: Int32Array = np.zeros(len(self.rows), np.int32)
        return [
            SequenceUpdates(
                request_ids=np.array(request_ids, np.int64),
                sample_indices=np.array(sample_indices, np.int32),
                num_tokens=nothing,
                finish_reasons=np.array(reasons, np.int32),
                num_cached_tokens=np.array(num_cached, np.int32),
                num_logprobs=np.array(num_logprobs, np.int32),
                weights_versions=nothing,
                token_ids=EMPTY_INT32,
                logprobs=EMPTY_FLOAT32,
                top_ids=EMPTY_INT32,
                top_logprobs=EMPTY_FLOAT32,
            )
        ]


def merged_answers(
    command_id: int, answers: Mapping[int, CommandDone | CommandFailed]
) -> CommandDone | CommandFailed:
    """What several replicas have made of one command.

    Args:
        command_id: of the command.
        answers: by replica, at least one.
    """
    done = [answer for answer in answers.values() if isinstance(answer, CommandDone)]
    failed = {
        replica: answer for replica, answer in answers.items() if isinstance(answer, CommandFailed)
    }
    if not failed:
        return CommandDone(
            command_id,
            num_pages=sum(each.num_pages for each in done),
            num_tokens=sum(each.num_tokens for each in done),
            num_sequences=sum(each.num_sequences for each in done),
            weights_version=max(each.weights_version for each in done),
            lacks_weights=any(each.lacks_weights for each in done),
            has_all_tensors=all(each.has_all_tensors for each in done),
        )
    first, *others = failed.values()
    if not done and all(each.reason == first.reason for each in others):
        return first
    named = [f"replica {replica}: {each.reason}" for replica, each in failed.items()]
    if done:
        named.append(f"{len(done)} of {len(answers)} replicas have done it")
    # A field only if it is wrong in each: otherwise the state of a replica forbids the command.
    field = first.field if all(each.field == first.field for each in others) else None
    return CommandFailed(command_id, "; ".join(named), field, bool(done))


def merged_statistics(each: Iterable[Statistics]) -> Statistics:
    """The sums, as if one manager had counted."""
    each = list(each)
    values: dict[str, Any] = {
        name: (max if name in _SHARED_FIELDS else sum)(getattr(one, name) for one in each)
        for name in Statistics.__struct_fields__
        if name != "cartridges"
    }
    return Statistics(**values, cartridges=_merged_cartridges(one.cartridges for one in each))


def _merged_cartridges(
    each: Iterable[tuple[CartridgeState, ...]],
) -> tuple[CartridgeState, ...]:
    """Every cartridge with the sums over the replicas, and the time since its last use at any."""
    merged: dict[str, CartridgeState] = {}
    for state in chain.from_iterable(each):
        before = merged.setdefault(state.name, state)
        if before is state:
            continue
        merged[state.name] = CartridgeState(
            name=state.name,
            num_tokens=state.num_tokens,
            num_copies=before.num_copies + state.num_copies,
            num_pages=before.num_pages + state.num_pages,
            num_users=before.num_users + state.num_users,
            num_requests=before.num_requests + state.num_requests,
            num_hits=before.num_hits + state.num_hits,
            num_loads=before.num_loads + state.num_loads,
            num_evictions=before.num_evictions + state.num_evictions,
            idle_s=min(before.idle_s, state.idle_s),
        )
    return tuple(merged.values())


def without_state(statistics: Statistics) -> Statistics:
    """The totals of a replica that is gone, so that sums of totals never fall."""
    return msgspec.structs.replace(statistics, cartridges=(), **dict.fromkeys(_STATE_FIELDS, 0))
