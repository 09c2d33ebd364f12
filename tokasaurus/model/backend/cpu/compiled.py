"""The compiled backend: ``paged_attention.cpp`` through ctypes, and its operators.

Owns what one batch hands to the kernel. ``reference.py`` defines the result.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
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
from tokasaurus.model.backend.cpu.build import BuildError
from tokasaurus.model.backend.cpu.calibration import PAGE_SIZE, PAGES, measure_group_costs
from tokasaurus.model.backend.cpu.calls import call, load_kernels, load_replay, result
from tokasaurus.model.backend.cpu.operators import ELEMENTS, load_operators
from tokasaurus.model.backend.cpu.sampling import load_sampling
from tokasaurus.model.backend.grouping import (
    NEVER,
    ChosenGroups,
    GroupCosts,
    KernelBlocks,
    choose_groups,
    costs_of_choice,
)
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.rounding import ceil_div, round_up

__all__ = ["CompiledAttention", "CompiledBackend"]

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("paged_attention.cpp")

# Of the C++ files: positions of a range, whose results a row may keep apart; and the most floats
# of a vector.
_RANGE, _MOST_WIDTH = 512, 16


class _Plan(ctypes.Structure):
    """Mirrors ``Plan`` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("page_table", "slots", "query_starts")),
        *((name, ctypes.c_void_p) for name in ("kv_lengths", "own_starts", "group_first_rows")),
        *((name, ctypes.c_void_p) for name in ("group_num_decodes", "group_first_chunk_rows")),
        *((name, ctypes.c_void_p) for name in ("group_num_rows", "group_begins", "group_ends")),
        *((name, ctypes.c_void_p) for name in ("tasks", "row_slots", "row_positions")),
        *((name, ctypes.c_void_p) for name in ("row_levels", "row_by_range", "state_starts")),
        *((name, ctypes.c_void_p) for name in ("level_ends", "workspace")),
        *((name, ctypes.c_int64) for name in ("page_table_stride", "workspace_size")),
        *((name, ctypes.c_int32) for name in ("num_sequences", "num_rows", "num_groups")),
        *((name, ctypes.c_int32) for name in ("num_levels", "merges")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("page_size", "element", "num_threads")),
        *((name, ctypes.c_int32) for name in ("heads_at_once", "takes_ahead")),
    )


class _Layer(ctypes.Structure):
    """Mirrors ``Layer`` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plan", "heads", "cosines", "sines")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("key_cache", "value_cache", "output")),
        ("eps", ctypes.c_float),
    )


class _Library:
    """The functions of one build of the kernel.

    Raises:
        BuildError: it cannot be built on this machine.
        ConfigError: the processor does not run this instruction set.
    """

    def __init__(self, instruction_set: str) -> None:
        library, (self.attend, self.plan) = load_kernels(
            _SOURCE,
            instruction_set,
            {"tokasaurus_attend": _Layer, "tokasaurus_plan_attention": _Plan},
        )
        library.tokasaurus_task_size.restype = ctypes.c_int64
        self.task_size: int = library.tokasaurus_task_size()
        self.max_tasks = library.tokasaurus_max_tasks
        self.max_tasks.argtypes = (ctypes.c_void_p,)
        self.max_tasks.restype = ctypes.c_int64
        self.rows_per_task = library.tokasaurus_rows_per_task
        self.rows_per_task.argtypes = (ctypes.c_int32,)
        self.rows_per_task.restype = ctypes.c_int32
        self.rows_without_layout = library.tokasaurus_rows_without_layout
        self.rows_without_layout.argtypes = (ctypes.c_int32,)
        self.rows_without_layout.restype = ctypes.c_int32
        library.tokasaurus_group_step.restype = ctypes.c_int32
        self.group_step: int = library.tokasaurus_group_step()


@cache
def _library(instruction_set: str) -> _Library:
    return _Library(instruction_set)


class CompiledBackend:
    """Implements ``Backend``.

    Args:
        cache: on the processor, in fp32, bf16 or fp16.
        num_heads: query heads.
        options: of the kernels.

    Raises:
        BuildError: the kernel cannot be built on this machine.
    """

    name: ClassVar[str] = "compiled"
    is_independent_of_batch: ClassVar[bool] = True

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        try:
            _library(options.instruction_set)
            load_operators(options.instruction_set)
            load_replay()
            load_sampling(options.instruction_set)
        except BuildError as error:
            return f"no kernel can be built: {error}; install g++"
        return None

    @classmethod
    def why_not_model(cls, heads: ModelHeads) -> str | None:
        if heads.kept_dtype is None:
            return None
        return (
            "it has no kernels for a KV cache in e4m3; leave kv_cache_dtype out, or set"
            " attention=reference"
        )

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        return load_operators(options.instruction_set)

    @classmethod
    def sampling(cls, options: BackendOptions) -> SamplingKernels:
        return load_sampling(options.instruction_set)

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None:
        self._options = options
        # Until it is calibrated, it takes no groups by itself.
        self._costs = costs_of_choice(options.use_groups, NEVER)
        self.grouped_rows = NO_GROUPED_ROWS
        self._library = _library(options.instruction_set)
        self._cache = cache
        self._num_heads = num_heads
        self._workspace = np.empty(0, np.float32)
        # The address of the plan of the batch that runs.
        self._current = ctypes.c_void_p()

    def calibrate(self, shared: Callable[[Sequence[float]], list[float]]) -> None:
        if self._options.use_groups is not None:
            return
        cache = KVCache.allocate(
            num_layers=1,
            num_pages=PAGES,
            page_size=PAGE_SIZE,
            num_kv_heads=self._cache.num_kv_heads,
            head_dim=self._cache.head_dim,
            dtype=self._cache.dtype,
            device=torch.device("cpu"),
        )
        for tensor in cache.keys + cache.values:
            tensor.zero_()
        options = replace(self._options, use_groups=True)
        costs = measure_group_costs(
            CompiledBackend(cache, self._num_heads, options),
            self._num_heads + 2 * cache.num_kv_heads,
            cache.head_dim,
            cache.dtype,
            self._blocks,
        )
        per_pair, per_token, per_row, fixed = shared(costs[:4])
        self._costs = GroupCosts(per_pair, per_token, per_row, fixed, costs.blocks)
        log.debug("prefix groups save seconds of a layer: %s", self._costs)

    @property
    def _blocks(self) -> KernelBlocks:
        group = self._num_heads // self._cache.num_kv_heads
        return KernelBlocks(
            self._library.rows_per_task(group), self._library.rows_without_layout(group)
        )

    def workspace_bytes(self, num_rows: int, longest: int) -> int:
        # Of mixed values, the best score and the sum.
        state = self._num_heads * (round_up(self._cache.head_dim, _MOST_WIDTH) + 2)
        num_states = num_rows * max(2, ceil_div(longest, _RANGE))
        return num_states * state * np.dtype(np.float32).itemsize

    def plan(self, rows: SequenceRows) -> CompiledAttention:
        groups = choose_groups(rows, self._cache.page_size, self._library.group_step, self._costs)
        self.grouped_rows = groups.grouped_rows(rows)
        attention = CompiledAttention(
            self._library, self._cache, self._num_heads, rows, groups, self._current
        )
        self._workspace = attention.use_workspace(self._workspace)
        return attention

    def graph_plan(self, num_rows: int, page_table: Tensor, max_tokens: int) -> None:
        """There is none: layers are recorded by ``RecordedRunner``."""


class CompiledAttention:
    """Implements ``Attention`` for one batch. Keeps the arrays alive that the kernel points to."""

    def __init__(
        self,
        library: _Library,
        cache: KVCache,
        num_heads: int,
        rows: SequenceRows,
        groups: ChosenGroups,
        current: ctypes.c_void_p,
    ) -> None:
        self._library, self._cache, self._rows = library, cache, rows
        self._current = current
        self._num_heads = num_heads
        num_rows, num_groups = len(rows.positions), len(groups.first_rows)
        num_threads = torch.get_num_threads()
        by_row = np.empty((5, num_rows + 1), np.int32)
        level_ends = np.empty(num_groups + 1, np.int32)
        row_slots, row_positions, row_levels, row_by_range, state_starts = (
            each.ctypes.data for each in by_row
        )
        self._plan = _Plan(
            page_table=rows.page_table.data_ptr(),
            slots=rows.slots.ctypes.data,
            query_starts=rows.query_starts.ctypes.data,
            kv_lengths=rows.kv_lengths.ctypes.data,
            own_starts=groups.own_starts.ctypes.data if num_groups else None,
            group_first_rows=groups.first_rows.ctypes.data,
            group_num_decodes=groups.num_decodes.ctypes.data,
            group_first_chunk_rows=groups.first_chunk_rows.ctypes.data,
            group_num_rows=groups.num_rows.ctypes.data,
            group_begins=groups.begins.ctypes.data,
            group_ends=groups.ends.ctypes.data,
            row_slots=row_slots,
            row_positions=row_positions,
            row_levels=row_levels,
            row_by_range=row_by_range,
            state_starts=state_starts,
            level_ends=level_ends.ctypes.data,
            page_table_stride=rows.page_table.stride(0),
            num_sequences=len(rows.slots),
            num_rows=num_rows,
            num_groups=num_groups,
            num_heads=num_heads,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            page_size=cache.page_size,
            element=ELEMENTS[cache.dtype],
            num_threads=num_threads,
        )
        num_tasks = library.max_tasks(ctypes.byref(self._plan))
        tasks = np.empty(num_tasks * library.task_size, np.uint8)
        self._plan.tasks = tasks.ctypes.data
        self._kept: tuple[NDArray[Any], ...] = (tasks, by_row, level_ends, *groups)
        library.plan(ctypes.byref(self._plan), num_rows, num_threads)

    def use_workspace(self, workspace: NDArray[np.float32]) -> NDArray[np.float32]:
        """Gives room for the states of rows. Returns the same room, or a larger one."""
        size = self._plan.workspace_size
        if len(workspace) < size:
            workspace = np.empty(size, np.float32)
        self._workspace = workspace
        self._plan.workspace = workspace.ctypes.data
        return workspace

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        num_rows, _, head_dim = heads.shape
        output = result(num_rows, self._num_heads * head_dim, heads.dtype)
        heads, cos, sin = heads.contiguous(), rotation.cos.contiguous(), rotation.sin.contiguous()
        arguments = _Layer(
            plan=ctypes.addressof(self._current),
            heads=heads.data_ptr(),
            cosines=cos.data_ptr(),
            sines=sin.data_ptr(),
            key_cache=self._cache.keys[layer].data_ptr(),
            value_cache=self._cache.values[layer].data_ptr(),
            output=output.data_ptr(),
        )
        if norms is not None:
            arguments.query_norm = norms.query.data_ptr()
            arguments.key_norm = norms.key.data_ptr()
            arguments.eps = norms.eps
        self.select()
        call(self._library.attend, arguments, num_rows)
        return output

    def select(self) -> None:
        """Makes this the attention that recorded calls use."""
        self._current.value = ctypes.addressof(self._plan)
