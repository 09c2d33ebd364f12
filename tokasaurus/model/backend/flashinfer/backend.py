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
from tokasaurus.model.backend.flashinfer.library import import_library, why_not, why_not_heads
from tokasaurus.model.backend.flashinfer.page_lists import SentPlan, send
from tokasaurus.model.backend.flashinfer.planning import BatchPlan, plan_calls
from tokasaurus.model.backend.flashinfer.probe import why_not_built
from tokasaurus.model.backend.flashinfer.wrappers import LAYOUT, Wrappers
from tokasaurus.model.backend.grouping import (
    ALWAYS,
    NEVER,
    GroupCosts,
    KernelBlocks,
    choose_groups,
)
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS, norm_and_rotate
from tokasaurus.model.backend.triton.backend import TritonBackend
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.rounding import ceil_div

__all__ = ["FlashInferAttention", "FlashInferBackend"]

# Rows of a tile that reads a group's pages, where each query head of a key head is a row.
_GROUP_TILE = 128


class FlashInferBackend:
    """Implements ``Backend``.

    Args:
        cache: in bf16 or fp16.
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
        self._heads = ModelHeads(num_heads, cache.num_kv_heads, cache.head_dim, cache.dtype)
        self._library = import_library()
        self._wrappers = Wrappers(self._library, self._heads, cache.dtype, cache.keys[0].device)
        if options.use_groups is None:
            self._costs = _group_bytes(self._heads, cache.dtype)
        else:
            self._costs = ALWAYS if options.use_groups else NEVER
        self.grouped_rows = NO_GROUPED_ROWS

    def calibrate(self, shared: Callable[[Sequence[float]], list[float]]) -> None:
        """Does nothing: which groups save time follows from the bytes that they save."""

    def workspace_bytes(self, num_rows: int, longest: int) -> int:
        # Ranges that are cut have room in the wrappers. Rows of groups are copied, and merged with
        # what a level finds; each request lists its pages.
        heads = self._heads
        numbers = 3 * heads.head_dim * heads.dtype.itemsize + 2 * torch.float32.itemsize
        pages = ceil_div(longest, self._cache.page_size) * torch.int32.itemsize
        return num_rows * (heads.num_heads * numbers + pages)

    def plan(self, rows: SequenceRows) -> FlashInferAttention:
        groups = choose_groups(rows, self._cache.page_size, 1, self._costs)
        self.grouped_rows = groups.grouped_rows(rows)
        plan = plan_calls(rows, groups, self._cache.page_size)
        sent = send(plan, rows.page_table)
        wrappers = self._planned(plan, sent.pages)
        calls = [_PlannedCall(*each) for each in zip(wrappers, sent.rows, strict=True)]
        num_own = len(plan.own)
        return FlashInferAttention(
            self._library, self._cache, self._heads, sent, calls[:num_own], calls[num_own:]
        )

    def graph_plan(self, num_rows: int, page_table: Tensor, max_tokens: int) -> None:
        """Its wrappers are not planned for graphs."""

    def _planned(self, plan: BatchPlan, pages: Iterable[Tensor]) -> Iterator[Any]:
        """A wrapper for each own call, then for each level."""
        its_pages = iter(pages)
        if plan.decodes is not None:
            yield self._wrappers.plan_decodes(plan.decodes, next(its_pages))
        if plan.chunks is not None:
            yield self._wrappers.plan_chunks(plan.chunks, next(its_pages))
        for depth, call in enumerate(plan.levels):
            yield self._wrappers.plan_level(depth, call, next(its_pages))


class _PlannedCall(NamedTuple):
    """A wrapper that is planned for a call, and the rows of the batch that it attends with."""

    wrapper: Any
    rows: slice | Tensor


class FlashInferAttention:
    """Implements ``Attention`` for one batch.

    Args:
        library: the module ``flashinfer``.
        cache: of the backend.
        heads: of the model.
        sent: the plan, on the device.
        own: calls that have each row once, over its sequence's own pages.
        levels: calls over the pages of groups.
    """

    def __init__(
        self,
        library: Any,
        cache: KVCache,
        heads: ModelHeads,
        sent: SentPlan,
        own: list[_PlannedCall],
        levels: list[_PlannedCall],
    ) -> None:
        self._library, self._cache, self._heads, self._sent = library, cache, heads, sent
        self._own, self._levels = own, levels

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        pages = self._cache.keys[layer], self._cache.values[layer]
        query = self._write(heads, rotation, norms, pages)
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

    def _write(
        self,
        heads: Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        pages: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Writes keys and values to their pages, and returns the queries."""
        query, key, value = norm_and_rotate(
            heads, self._heads.num_heads, self._heads.num_kv_heads, rotation, norms
        )
        sent = self._sent
        if len(heads):
            self._library.append_paged_kv_cache(
                key,
                value,
                sent.row_requests,
                sent.row_positions,
                pages,
                sent.own_pages,
                sent.own_page_starts,
                sent.own_last_page_lengths,
                kv_layout=LAYOUT,
            )
        return query

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
