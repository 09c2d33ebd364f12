"""What a worker is: everything beside the request that its results follow from.

A worker says it once, when it is ready. The text core copies it into receipts.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["WeightFile", "WorkerIdentity"]


class WeightFile(msgspec.Struct, frozen=True):
    """A file of weights, as it was when the worker read it."""

    path: str
    num_bytes: int
    modified_ns: int


class WorkerIdentity(msgspec.Struct, frozen=True):
    """What a worker computes with. The values of its tables are plain JSON."""

    # Whether a request's results are the same whatever runs beside it, and a line for users: why.
    is_deterministic: bool
    determinism_reason: str
    model: dict[str, Any]  # the model's configuration, as the worker read it
    configuration: dict[str, Any]  # the flags that change results, with what "auto" stands for
    kernels: dict[str, Any]  # by library: what it was compiled from, and how
    environment: dict[str, Any]  # processor, threads, compiler, versions of libraries
    weight_files: tuple[WeightFile, ...]  # that the first weights came from; () if they are random
