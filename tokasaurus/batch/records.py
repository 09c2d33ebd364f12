"""Files and batches as clients see them: OpenAI's objects, which are stored in the same form."""

from __future__ import annotations

import secrets
from typing import Literal, TypeAlias

import msgspec

__all__ = [
    "FINAL_STATUSES",
    "Batch",
    "BatchError",
    "BatchErrors",
    "RequestCounts",
    "Status",
    "StoredFile",
    "Usage",
    "new_id",
]

Status: TypeAlias = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
FINAL_STATUSES = frozenset({"completed", "failed", "expired", "cancelled"})


def new_id(prefix: str) -> str:
    """A new, random id."""
    return f"{prefix}-{secrets.token_hex(12)}"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file, without its content. Times are seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    expires_at: int | None = None


class RequestCounts(msgspec.Struct, frozen=True):
    """How many lines a batch has, and how many have ended. The others are still to be answered."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """The tokens of all answered lines."""

    input_tokens: int = 0
    input_tokens_details: _InputDetails = _InputDetails()
    output_tokens: int = 0
    output_tokens_details: _OutputDetails = _OutputDetails()
    total_tokens: int = 0

    @staticmethod
    def of(num_input: int, num_cached: int, num_output: int, num_reasoning: int) -> Usage:
        return Usage(
            num_input,
            _InputDetails(num_cached),
            num_output,
            _OutputDetails(num_reasoning),
            num_input + num_output,
        )

    def __add__(self, other: Usage) -> Usage:
        return Usage.of(
            self.input_tokens + other.input_tokens,
            self.input_tokens_details.cached_tokens + other.input_tokens_details.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.output_tokens_details.reasoning_tokens
            + other.output_tokens_details.reasoning_tokens,
        )


class BatchError(msgspec.Struct, frozen=True):
    """Why a whole batch failed."""

    code: str
    message: str
    line: int | None = None  # its number in the input file, from 1
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """All errors of a batch."""

    data: tuple[BatchError, ...]
    object: Literal["list"] = "list"


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are seconds since 1970, and None for what has not happened."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str | None  # None if each line has its own
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None  # in the future while the batch runs
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: BatchErrors | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    model: str | None = None
    usage: Usage = Usage()

    @property
    def final(self) -> bool:
        """Whether the batch will not change any more."""
        return self.status in FINAL_STATUSES
