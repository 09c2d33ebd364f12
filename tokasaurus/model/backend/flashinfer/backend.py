"""The FlashInfer backend: the calls of a batch, and the merge of what they find.

A row attends to its sequence's own pages, and in one call for each of its groups to the pages of
the group. Each call gives a partial result and an LSE, and FlashInfer merges two at a time. Its LSE
are to base 2, those of its kernels and those of its merge. None leaves this file.

``reference.py`` defines the results. The element-wise kernels and those of sampling are ours in
Triton, or torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

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
from tokasaurus.model.backend.flashinfer.graphs import FlashInferGraphPlan
from tokasaurus.model.backend.flashinfer.heads import (
    StoredHeads,
    appended_by_flashinfer,
    stored_by_triton,
)
from tokasaurus.model.backend.flashinfer.library import import_library, why_not, why_not_heads
from tokasaurus.model.backend.flashinfer.page_lists import PageLists
from tokasaurus.model.backend.flashinfer.planning import BatchPlan, plan_calls
from tokasaurus.model.backend.flashinfer.probe import why_not_built
from tokasaurus.model.backend.flashinfer.wrappers import Wrappers
from tokasaurus.model.backend.grouping import (
    GroupCosts,
    KernelBlocks,
    choose_groups,
    costs_of_choice,
)
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted
from tokasaurus.model.backend.triton.heads import TritonHeads
from tokasaurus.model.backend.triton.shapes import AttentionShape
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.upload import Staging
from tokasaurus.rounding import ceil_div

__all__ = ["FlashInferAttention", "FlashInferBackend"]

# Rows of a tile that reads a group's pages, where each query head of a key head is a row.
_GROUP_TILE = 128


class FlashInferBackend:
    """Implements ``Backend``.

    Args:
        cache: in bf16, fp16 or e4m3, of heads in bf16 or fp16.
        num_heads: query heads.
        options: of the groups.
    """

    name: ClassVar[str] = "flashinfer"
    # How long ranges are cut depends on the batch.
    is_independent_of_batch: ClassVar[bool] = False

    @classmethod
    def why_not(cls, options: BackendOptions) -> str | None:
        return _why_not()

    @classmethod
    def why_not_model(cls, heads: ModelHeads) -> str | None:
        return why_not_heads(heads) or _why_not_built(heads)

    @classmethod
    def operators(cls, options: BackendOptions) -> Operators:
        return REFERENCE_OPERATORS if _lacks_triton(options) else TritonBackend.operators(options)

    @classmethod
    def sampling(cls, options: BackendOptions) -> SamplingKernels | None:
        return None if _lacks_triton(options) else TritonBackend.sampling(options)

    def __init__(
        self, cache: KVCache, num_heads: int, options: BackendOptions = DEFAULT_OPTIONS
    ) -> None:
        self._cache = cache
        self._heads = ModelHeads(
            num_heads,
            cache.num_kv_heads,
            cache.head_dim,
            cache.heads_dtype,
            cache.dtype if cache.is_narrow else None,
        )
        self._library = import_library()
        self._wrappers = Wrappers(self._library, self._heads, cache.dtype, cache.keys[0].device)
        # None where Triton does not run, or cannot write to this cache.
        is_stored = not _lacks_triton(options) and TritonBackend.why_not_model(self._heads) is None
        self._shape = _shape(self._heads, cache.page_size) if is_stored else None
        saved = _group_bytes(self._heads, cache.dtype)
        self._costs = costs_of_choice(options.use_groups, saved)
        self.grouped_rows = NO_GROUPED_ROWS

    def calibrate(self, shared: Callable[[Sequence[float]], list[float]]) -> None:
        """Does nothing: which groups save time follows from the bytes that they save."""

    def workspace_bytes(self, num_rows: int, longest: int) -> int:
        # Ranges that are cut have room in the wrappers. Rows of groups are copied, and merged with
        # what a level finds; each request lists its pages, whose places are in int64 first.
        heads = self._heads
        numbers = 3 * (heads.head_dim * heads.dtype.itemsize + torch.float32.itemsize)
        page = torch.int32.itemsize + 2 * torch.int64.itemsize
        pages = ceil_div(longest, self._cache.page_size) * page
        return num_rows * (heads.num_heads * numbers + pages)

    def plan(self, rows: SequenceRows) -> FlashInferAttention:
        groups = choose_groups(rows, self._cache.page_size, 1, self._costs)
        self.grouped_rows = groups.grouped_rows(rows)
        plan = plan_calls(rows, groups, self._cache.page_size)
        calls = (*plan.own, *plan.levels)
        staging = Staging(rows.page_table.device)
        lists = PageLists(calls, rows.page_table, staging)
        store = self._storing(plan, rows, staging)
        call_rows = [
            call.rows if isinstance(call.rows, slice) else staging.add_indices(call.rows)
            for call in calls
        ]
        staging.send()
        pages, parts = lists.gather()
        planned = [
            _PlannedCall(wrapper, where if isinstance(where, slice) else where.tensor)
            for wrapper, where in zip(self._planned(plan, parts), call_rows, strict=True)
        ]
        num_own = len(plan.own)
        return FlashInferAttention(
            self._library, self._cache, store(pages), planned[:num_own], planned[num_own:]
        )

    def graph_plan(
        self, num_rows: int, page_table: Tensor, max_tokens: int
    ) -> FlashInferGraphPlan | None:
        if self._shape is None:
            # FlashInfer's append writes something for each row, whether it has a sequence or not.
            return None
        max_pages = num_rows * ceil_div(max_tokens, self._cache.page_size)
        wrapper = self._wrappers.of_graph(num_rows, max_pages)
        call = _PlannedCall(wrapper.wrapped, slice(0, num_rows))
        cache, shape = self._cache, self._shape

        def attention(slots: Tensor, positions: Tensor) -> FlashInferAttention:
            store = TritonHeads(cache, shape, page_table, slots, positions)
            return FlashInferAttention(self._library, cache, store, [call], [])

        return FlashInferGraphPlan(
            num_rows,
            cache.page_size,
            page_table,
            self._takes_in_graph,
            lambda call, pages: self._wrappers.plan_again(wrapper, call, pages),
            attention,
        )

    def _takes_in_graph(self, rows: SequenceRows) -> bool:
        """Graphs have no groups."""
        groups = choose_groups(rows, self._cache.page_size, 1, self._costs)
        if len(groups.first_rows):
            return False
        self.grouped_rows = NO_GROUPED_ROWS
        return True

    def _planned(self, plan: BatchPlan, parts: Iterable[Tensor]) -> Iterator[Any]:
        """A wrapper for each own call, then for each level; ``parts`` are the pages of each."""
        pages = iter(parts)
        if plan.decodes is not None:
            yield self._wrappers.plan_decodes(plan.decodes, next(pages))
        if plan.chunks is not None:
            yield self._wrappers.plan_chunks(plan.chunks, next(pages))
        for depth, call in enumerate(plan.levels):
            yield self._wrappers.plan_level(depth, call, next(pages))

    def _storing(
        self, plan: BatchPlan, rows: SequenceRows, staging: Staging
    ) -> Callable[[Tensor], StoredHeads]:
        if self._shape is None:
            num_heads = self._heads.num_heads
            return appended_by_flashinfer(self._library, self._cache, num_heads, plan, staging)
        return stored_by_triton(self._cache, self._shape, plan, rows, staging)


class _PlannedCall(NamedTuple):
    """A wrapper that is planned for a call, and the rows of the batch that it attends with."""

    wrapper: Any
    rows: slice | Tensor


class FlashInferAttention:
    """Implements ``Attention`` for one batch.

    Args:
        library: the module ``flashinfer``.
        cache: of the backend.
        heads: of the batch.
        own: calls that have each row once, over its sequence's own pages.
        levels: calls over the pages of groups.
    """

    def __init__(
        self,
        library: Any,
        cache: KVCache,
        heads: StoredHeads,
        own: list[_PlannedCall],
        levels: list[_PlannedCall],
    ) -> None:
        self._library, self._cache, self._heads = library, cache, heads
        self._own, self._levels = own, levels

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        pages = self._cache.keys[layer], self._cache.values[layer]
        query = self._heads.store(layer, heads, rotation, norms)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if not self._levels:
            for wrapper, rows in self._own:
                wrapper.run(query[rows], pages, out=output[rows])
            return output.flatten(1)
        lse = output.new_empty(output.shape[:2], dtype=torch.float32)
        for wrapper, rows in self._own:
            wrapper.run(query[rows], pages, out=output[rows], lse=lse[rows], return_lse=True)
        for wrapper, rows in self._levels:
            if isinstance(rows, slice):
                self._merge(wrapper, query[rows], pages, output[rows], lse[rows])
            else:
                some, its_lse = output.index_select(0, rows), lse.index_select(0, rows)
                self._merge(wrapper, query.index_select(0, rows), pages, some, its_lse)
                output.index_copy_(0, rows, some)
                lse.index_copy_(0, rows, its_lse)
        return output.flatten(1)

    def _merge(
        self,
        wrapper: Any,
        query: Tensor,
        pages: tuple[Tensor, Tensor],
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """Attends to more pages, and merges that into the output and the LSE."""
        found = torch.empty_like(output)
        found_lse = torch.empty_like(lse)
        wrapper.run(query, pages, out=found, lse=found_lse, return_lse=True)
        self._library.merge_state_in_place(output, lse, found, found_lse)


def _shape(heads: ModelHeads, page_size: int) -> AttentionShape:
    return AttentionShape(
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        page_size,
        heads.dtype.itemsize,
        is_interpreted(),
    )


def _group_bytes(heads: ModelHeads, cache_dtype: torch.dtype) -> GroupCosts:
    """What a group saves of the memory's traffic, in bytes of a layer.

    A sequence that decodes reads each key and value once, and so does each tile of a group. A row
    of a group has one partial result more. It is written and read, and what it is merged with is
    read and written once more.
    """
    token = 2.0 * heads.num_kv_heads * heads.head_dim * cache_dtype.itemsize
    partial = heads.num_heads * (heads.head_dim * heads.dtype.itemsize + torch.float32.itemsize)
    num_rows = _GROUP_TILE * heads.num_kv_heads // heads.num_heads
    return GroupCosts(token, token, 4.0 * partial, 0.0, KernelBlocks(max(num_rows, 1), 1))


@cache
def _why_not() -> str | None:
    return why_not()


@cache
def _why_not_built(heads: ModelHeads) -> str | None:
    return why_not_built(FlashInferBackend, heads, torch.device("cuda"))


def _lacks_triton(options: BackendOptions) -> bool:
    return TritonBackend.why_not(options) is not None
