"""Files and batches as clients see them: the objects of OpenAI's API, which are also what is stored."""

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
    """An id that nobody has."""
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
    """Lines of a batch. While it runs, those that are in neither number are still to come."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all lines that were answered."""

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
    line: int | None = None  # of the input file, from 1
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """All of them."""

    data: tuple[BatchError, ...]
    object: Literal["list"] = "list"


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are seconds since 1970; each is None until what it names has happened."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str | None  # None: that of each line
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None  # when it will have
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
        """Whether nothing about it will change any more."""
        return self.status in FINAL_STATUSES
