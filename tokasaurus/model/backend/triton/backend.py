"""The Triton backend: what a batch's kernels get, and their launches.

The kernels are in ``attention_kernels.py`` and ``operator_kernels.py``, which are imported with
Triton, once a backend is made. ``reference.py`` defines the results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from tokasaurus.model.backend.base import (
    DEFAULT_OPTIONS,
    NO_GROUPED_ROWS,
    BackendOptions,
    HeadNorms,
    ModelHeads,
    Operators,
    Rotation,
    SamplingKernels,
    SequenceRows,
)
from tokasaurus.model.backend.grouping import (
    GroupCosts,
    KernelBlocks,
    choose_groups,
    costs_of_choice,
)
from tokasaurus.model.backend.multiprocessors import num_multiprocessors
from tokasaurus.model.backend.triton.device_plan import (
    DevicePlan,
    plan_decodes,
    plan_without_groups,
    send_plan,
)
from tokasaurus.model.backend.triton.heads import TritonHeads
from tokasaurus.model.backend.triton.planning import Tiles, most_partials, plan_tasks
from tokasaurus.model.backend.triton.shapes import AttentionShape
from tokasaurus.model.capability import why_too_old
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.rounding import ceil_div

__all__ = ["TritonAttention", "TritonBackend", "is_interpreted"]

log = logging.getLogger(__name__)

# Programs for each multiprocessor of a device, which it has in part at a time.
_PROGRAMS_PER_PROCESSOR = 4

_OLDEST = (8, 0)
"""The compute capability of the first devices with bf16 and asynchronous copies."""

_OLDEST_WITH_E4M3 = (8, 9)
"""That of the first devices that convert numbers to e4m3."""


def is_interpreted() -> bool:
    """Whether Triton's kernels are interpreted, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


class TritonBackend:
    """Implements ``Backend``.

    Args:
        cache: in fp32, bf16 or fp16.
        num_heads: query heads.
        options: of the kernels.
    """

    name: ClassVar[str] = "triton"
    # How long ranges are cut depends on the batch.
    is_independent_of_batch: ClassVar[bool] = False

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        return _why_not()

    @classmethod
    def why_not_model(cls, heads: ModelHeads) -> str | None:
        return None if heads.kept_dtype is None else _why_not_e4m3(heads.dtype)

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        from tokasaurus.model.backend.triton.operators import TRITON_OPERATORS

        return TRITON_OPERATORS

    @classmethod
    def sampling(cls, options: BackendOptions) -> SamplingKernels:
        from tokasaurus.model.backend.triton.sampling import TRITON_SAMPLING

        return TRITON_SAMPLING

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None:
        self._cache = cache
        self._shape = AttentionShape(
            num_heads,
            cache.num_kv_heads,
            cache.head_dim,
            cache.page_size,
            cache.heads_dtype.itemsize,
            is_interpreted(),
        )
        few, many = (block // self._shape.group for block in self._shape.blocks)
        num_programs = num_multiprocessors(cache.keys[0].device) * _PROGRAMS_PER_PROCESSOR
        self._tiles = Tiles(few, many, ceil_div(num_programs, cache.num_kv_heads))
        saved = _group_bytes(cache, num_heads, self._tiles)
        self._costs = costs_of_choice(options.use_groups, saved)
        self.grouped_rows = NO_GROUPED_ROWS

    def calibrate(self, shared: Callable[[Sequence[float]], list[float]]) -> None:
        """Does nothing: which groups save time follows from the bytes that they save."""

    def workspace_bytes(self, num_rows: int, longest: int) -> int:
        shape = self._shape
        numbers = shape.num_heads * (shape.head_dim + 1)
        return most_partials(num_rows, self._tiles) * numbers * torch.float32.itemsize

    def plan(self, rows: SequenceRows) -> TritonAttention:
        groups = choose_groups(rows, self._cache.page_size, 1, self._costs)
        self.grouped_rows = groups.grouped_rows(rows)
        if rows.num_decodes and not len(groups.first_rows):
            plan = plan_without_groups(rows, self._tiles)
        else:
            plan = send_plan(plan_tasks(rows, groups, self._tiles), rows.page_table.device)
        return TritonAttention(self._cache, self._shape, plan, rows.page_table)

    def graph_plan(self, num_rows: int, page_table: Tensor, max_tokens: int) -> TritonGraphPlan:
        return TritonGraphPlan(self, num_rows, page_table)

    def plan_in_graph(self, rows: SequenceRows) -> bool:
        """Counts the rows of groups. Returns False if any were chosen: graphs have none."""
        groups = choose_groups(rows, self._cache.page_size, 1, self._costs)
        if len(groups.first_rows):
            return False
        self.grouped_rows = NO_GROUPED_ROWS
        return True

    def attention_of_decodes(
        self, slots: Tensor, lengths: Tensor, page_table: Tensor
    ) -> TritonAttention:
        """Attention that the device plans from what it knows, as ``plan_decodes`` does."""
        plan = plan_decodes(slots, lengths, self._tiles)
        return TritonAttention(self._cache, self._shape, plan, page_table)


class TritonGraphPlan:
    """Implements ``GraphPlan``. The graph contains the planning, too.

    Args:
        backend: whose attention it is.
        num_rows: of the graph.
        page_table: [slots, columns] int32, on the device.
    """

    def __init__(self, backend: TritonBackend, num_rows: int, page_table: Tensor) -> None:
        self._backend, self._page_table = backend, page_table
        # Slots and lengths. A row of length 0 has no sequence.
        self._rows = torch.zeros(2, num_rows, dtype=torch.int32, device=page_table.device)

    def attention(self) -> TritonAttention:
        slots, lengths = self._rows
        return self._backend.attention_of_decodes(slots, lengths, self._page_table)

    def fill(self, rows: SequenceRows | None) -> bool:
        slots, lengths = self._rows
        num_rows = 0
        if rows is not None:
            if not self._backend.plan_in_graph(rows):
                return False
            num_rows = rows.num_decodes
            slots[:num_rows], lengths[:num_rows] = rows.decodes_on_device()
        lengths[num_rows:].zero_()
        return True


class TritonAttention:
    """Implements ``Attention`` for one batch.

    Args:
        cache: of the backend.
        shape: of the backend.
        plan: of the batch.
        page_table: [slots, columns] int32, on the device.
    """

    def __init__(
        self, cache: KVCache, shape: AttentionShape, plan: DevicePlan, page_table: Tensor
    ) -> None:
        # Where this runs Triton is installed.
        from tokasaurus.model.backend.triton import attention_kernels

        self._kernels = attention_kernels
        self._cache, self._shape, self._page_table = cache, shape, page_table
        self._plan = plan
        self._heads = TritonHeads(cache, shape, page_table, plan.row_slots, plan.row_positions)
        self._launches = [
            (block, tasks)
            for block, tasks in zip(shape.blocks, (plan.few_tasks, plan.many_tasks), strict=True)
            if len(tasks)
        ]
        # All layers use the same room, one after the other.
        room, device = (max(plan.num_partials, 1), shape.num_heads), page_table.device
        self._partials = torch.empty(*room, shape.head_dim, dtype=torch.float32, device=device)
        self._lses = torch.empty(room, dtype=torch.float32, device=device)

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        query = self._heads.store(layer, heads, rotation, norms)
        output = torch.empty_like(query)
        if len(heads):
            for block, tasks in self._launches:
                self._attend(layer, query, output, block, tasks)
            if len(self._plan.merged_rows):
                self._merge(output)
        return output.flatten(1)

    def _attend(self, layer: int, query: Tensor, output: Tensor, block: int, tasks: Tensor) -> None:
        cache, shape, plan = self._cache, self._shape, self._plan
        self._kernels.attend_task[len(tasks) * shape.num_kv_heads,](
            query,
            cache.keys[layer],
            cache.values[layer],
            output,
            self._partials,
            self._lses,
            self._page_table,
            plan.row_positions,
            plan.partial_starts,
            tasks,
            self._page_table.stride(0),
            shape.head_dim**-0.5,
            BLOCK_M=block,
            **shape.attending,
        )

    def _merge(self, output: Tensor) -> None:
        merged_rows = self._plan.merged_rows
        self._kernels.merge_partials[len(merged_rows), self._shape.num_merging](
            output,
            self._partials,
            self._lses,
            self._plan.partial_starts,
            merged_rows,
            **self._shape.merging,
        )


def _group_bytes(cache: KVCache, num_heads: int, tiles: Tiles) -> GroupCosts:
    """What a group saves of the memory's traffic, in bytes of a layer.

    A sequence that decodes reads each key and value once, and so does each large tile of a group. A
    row of a group has two partial results more than it would have, each written once and read once.
    """
    token = 2.0 * cache.num_kv_heads * cache.head_dim * cache.dtype.itemsize
    partial = num_heads * (cache.head_dim + 1) * torch.float32.itemsize
    return GroupCosts(token, token, 4.0 * partial, 0.0, KernelBlocks(tiles.many_rows, 1))


def _why_not_e4m3(dtype: torch.dtype) -> str | None:
    """Why kernels cannot keep keys and values in e4m3 here, with heads in this dtype."""
    if dtype == torch.float32:
        return "a KV cache in e4m3 needs dtype=bfloat16 or float16; leave kv_cache_dtype out"
    if is_interpreted():
        return "Triton's interpreter has no arithmetic for e4m3; set attention=reference"
    if reason := why_too_old(_OLDEST_WITH_E4M3, "a KV cache in e4m3 needs"):
        return f"{reason}; leave kv_cache_dtype out, or set attention=reference"
    return None


@cache
def _why_not() -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed; pip install 'tokasaurus[cuda]'"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no CUDA device; install its build for CUDA"
    if reason := why_too_old(_OLDEST, "the kernels need"):
        return f"{reason}; set attention=reference"
    return _failure(triton.__version__)


def _failure(triton_version: str) -> str | None:
    """Builds a kernel and runs it: Triton needs a C compiler, too. Why this fails, if it does."""
    from tokasaurus.model.backend.triton.operators import TRITON_OPERATORS

    try:
        ones = torch.ones(1, 16, device="cuda")
        TRITON_OPERATORS.rms_norm(ones, ones[0], 0.0)
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler, a driver or a cache may raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return (
            f"Triton {triton_version} cannot build its kernels: {reason}; install gcc and the"
            " headers of Python and CUDA"
        )
    log.info("Triton %s builds kernels", triton_version)
    return None
