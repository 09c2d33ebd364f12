"""Answers of several managers as those of one, and rows that a lost replica does not send."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from tokasaurus.protocol.arrays import EMPTY_FLOAT32, EMPTY_INT32, Int32Array
from tokasaurus.protocol.commands import CommandDone, CommandFailed
from tokasaurus.protocol.messages import (
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
)
# What is not summed over the replicas: of the slowest, of the newest, and whether any is paused.
_SHARED_FIELDS = ("step_s", "weights_version", "paused")


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
        )
    first, *others = failed.values()
    if not done and all(each.reason == first.reason for each in others):
        return first
    named = [f"replica {replica}: {each.reason}" for replica, each in failed.items()]
    if done:
        named.append(f"{len(done)} of {len(answers)} replicas have done it")
    return CommandFailed(command_id, "; ".join(named), first.field, bool(done))


def merged_statistics(each: Iterable[Statistics]) -> Statistics:
    """The sums, as if one manager had counted."""
    columns = zip(*(msgspec.structs.astuple(statistics) for statistics in each), strict=True)
    named = zip(Statistics.__struct_fields__, columns, strict=True)
    return Statistics(
        **{name: max(column) if name in _SHARED_FIELDS else sum(column) for name, column in named}
    )


def without_state(statistics: Statistics) -> Statistics:
    """The totals of a replica that is gone, so that sums of totals never fall."""
    return msgspec.structs.replace(statistics, **dict.fromkeys(_STATE_FIELDS, 0))
