"""Measures what a worker takes of its device, and gives the KV cache the rest.

::

    total  │ taken: weights, │ batch: the largest, │ graphs   │ attention:  │ reserve │ KV cache,
           │ tables, what    │ with every sampling │          │ the longest │         │ history
           │ others have     │ feature             │          │ sequences   │         │
             measured at rest  measured as it runs   measured   arithmetic    stated

Owns the arithmetic, and the words of a refusal. Knows no model: it is told how to run the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokasaurus.config.memory import amount
from tokasaurus.config.slices import WorkerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.model.worker.device_memory import DeviceMemory
from tokasaurus.rounding import ceil_div

__all__ = ["MeasuredMemory", "measure", "trial_pages"]

_RESERVE = 0.03
"""The share of a device that stays free, for pieces that the allocator cannot use, for prefix
groups in one another, and for what a driver takes later."""

_LEAST_RESERVE = 512 << 20


@dataclass(frozen=True)
class MeasuredMemory:
    """A device's memory, in bytes.

    Attributes:
        total: of the device.
        taken: when nothing runs and there is no KV cache.
        batch: the most that tensors of a batch hold at a time.
        graphs: of recorded kernels.
        attention: of a batch with the longest sequences.
        token: of the KV cache and the history, for each position.
    """

    total: int
    taken: int
    batch: int
    graphs: int
    attention: int
    token: int

    @property
    def reserve(self) -> int:
        """That stays free."""
        return max(int(_RESERVE * self.total), _LEAST_RESERVE)

    @property
    def left(self) -> int:
        """For the KV cache."""
        used = self.taken + self.batch + self.graphs + self.attention + self.reserve
        return max(0, self.total - used)

    def pages(self, page_size: int) -> int:
        """Pages of the KV cache that fit."""
        return self.left // (self.token * page_size)

    def __str__(self) -> str:
        return (
            f"of {amount(self.total)}, {amount(self.taken)} are taken by weights, tables, libraries"
            f" and other processes, {amount(self.batch)} by the largest batch,"
            f" {amount(self.graphs)} by graphs, {amount(self.attention)} by attention, and"
            f" {amount(self.reserve)} stay free; {amount(self.left)} are left for the KV cache"
        )

    def why_not(self, config: WorkerConfig, num_pages: int) -> str | None:
        """Why these pages are too few for the flags, and what helps; None if they are enough."""
        if num_pages >= config.least_pages:
            return None
        needed, fitting = (count * config.page_size for count in (config.least_pages, num_pages))
        remedy = "free memory, or serve a smaller model"
        if fitting:
            remedy = f"max_num_tokens_per_request={fitting} with kv_cache_num_tokens=auto fits"
        return (
            f"the KV cache needs {needed} tokens, {amount(needed * self.token)}, for"
            f" kv_cache_num_tokens or for the longest request, of {config.max_request_tokens}"
            f" tokens; {self}, which hold {fitting} tokens; {remedy}, and a lower"
            f" max_tokens_per_forward, which is {config.max_tokens_per_forward}, makes batches"
            " smaller"
        )


def trial_pages(config: WorkerConfig) -> int:
    """Pages that the largest batches of the warm-up need: all sequences use the same ones."""
    longest = min(config.max_tokens_per_forward, config.max_request_tokens) + 1
    return min(ceil_div(longest, config.page_size), config.least_pages)


def measure(
    memory: DeviceMemory,
    config: WorkerConfig,
    run: Callable[[], object],
    record: Callable[[], object],
    *,
    cache_bytes: int,
    attention: int,
    token: int,
) -> MeasuredMemory:
    """Runs the largest batches over a small KV cache, and says what they take.

    Args:
        memory: of the device, on which everything but the KV cache is allocated.
        config: of the worker, for errors.
        run: runs the batches to their end.
        record: records graphs, if there are any. They are still there when this returns.
        cache_bytes: of the small KV cache.
        attention: bytes that attention takes with the longest sequences.
        token: bytes for each position of the KV cache.

    Raises:
        ConfigError: not even these batches fit.
    """
    memory.give_back()
    memory.reset_peak()
    held = memory.held()
    try:
        run()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"max_tokens_per_forward={config.max_tokens_per_forward}: the largest batch does not"
            f" fit beside the weights: {amount(memory.free() + memory.peak() - held)} of"
            f" {amount(memory.total())} were free; lower it, or max_seqs_per_forward, which is"
            f" {config.max_seqs_per_forward}, or free memory ({error})"
        ) from error
    batch = memory.peak() - held
    memory.give_back()
    total, free = memory.total(), memory.free()
    record()
    memory.give_back()
    return MeasuredMemory(
        total=total,
        taken=total - free - cache_bytes,
        batch=batch,
        graphs=free - memory.free(),
        attention=attention,
        token=token,
    )
