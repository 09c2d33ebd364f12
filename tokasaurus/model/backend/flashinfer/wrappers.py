"""FlashInfer's wrappers, and how calls are planned with them.

A wrapper is planned for a batch, and then runs in each layer. To plan it writes numbers into pinned
memory of the wrapper and enqueues their copy to the device. So a wrapper must not be planned again
before that copy is done, and FlashInfer does not wait for it. A batch is planned while the device
runs the one before. So two wrappers take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokasaurus.model.backend.base import ModelHeads
from tokasaurus.model.backend.flashinfer.planning import Call
from tokasaurus.model.backend.flashinfer.workspaces import (
    graph_bytes,
    graph_plan_bytes,
    workspace_bytes,
)
from tokasaurus.model.backend.multiprocessors import num_multiprocessors
from tokasaurus.model.upload import pinned
from tokasaurus.rounding import ceil_div

__all__ = ["LAYOUT", "PlannedWrapper", "Wrappers"]

# As many batches can be planned before the first of them has begun, without waiting.
_TURNS = 2

# Our pages are [kv_heads, page_size, head_dim], which FlashInfer calls this.
LAYOUT = "HND"

# The kernels of the third generation cut no ranges and have a tile for each query head. They are
# for many rows: they must fill their tiles by half, and the device.
_FA3_ROWS = 128
_FA3_CAPABILITY = (9, 0)


class Wrappers:
    """Plans the calls of batches over one KV cache.

    Args:
        library: the module ``flashinfer``.
        heads: of the model.
        cache_dtype: of keys and values in the cache.
        device: of the cache.
    """

    def __init__(
        self, library: Any, heads: ModelHeads, cache_dtype: torch.dtype, device: torch.device
    ) -> None:
        self._library, self._heads, self._cache_dtype = library, heads, cache_dtype
        self._num_processors = num_multiprocessors(device)
        # Calls run one after the other, so they share it.
        self._workspace = _zeros(workspace_bytes(heads, self._num_processors), device)
        self._graph_workspaces = _zeros(0, device), _zeros(0, device), _zeros(0, device)
        self._kinds: dict[str, _Turns] = {}
        self._has_fa3 = _has_fa3(library, heads, cache_dtype, device)

    def plan_decodes(self, call: Call, pages: Tensor) -> Any:
        """Plans requests of one row each, and returns the wrapper, whose ``run`` computes it.

        Args:
            call: what they attend to.
            pages: [pages] int32, on the device, of all requests.
        """
        return self.plan_again(self._take("decodes", self._make_decode), call, pages)

    def plan_again(self, wrapper: PlannedWrapper, call: Call, pages: Tensor) -> Any:
        """Plans as ``plan_decodes`` does, with this wrapper."""
        heads = self._heads
        page_starts, last_page_lengths, lengths = pinned(
            (call.page_starts, call.last_page_lengths, call.lengths), pages.device
        )
        return wrapper.plan(
            page_starts,
            pages,
            last_page_lengths,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            call.page_size,
            q_data_type=heads.dtype,
            kv_data_type=self._cache_dtype,
            sm_scale=heads.head_dim**-0.5,
            seq_lens=lengths.as_subclass(_Lengths),
        )

    def plan_chunks(self, call: Call, pages: Tensor) -> Any:
        """Plans requests whose rows are at their last positions, as ``plan_decodes`` does."""
        if self._has_fa3 and _fills_fa3(call, self._heads.num_heads, self._num_processors):
            return self._plan_rows("fa3", call, pages, is_causal=True)
        return self._plan_rows("chunks", call, pages, is_causal=True)

    def plan_level(self, depth: int, call: Call, pages: Tensor) -> Any:
        """Plans requests whose rows see all their positions.

        Args:
            depth: of the groups.
            call: what they attend to.
            pages: [pages] int32, on the device, of all requests.
        """
        return self._plan_rows(f"level {depth}", call, pages, is_causal=False)

    def of_graph(self, num_rows: int, max_pages: int) -> PlannedWrapper:
        """A wrapper for a graph, which ``plan_again`` plans. Its tensors stay in place.

        Args:
            num_rows: of the graph; each decodes.
            max_pages: of all its sequences.
        """
        device, heads = self._workspace.device, self._heads
        sizes = (
            graph_bytes(heads, self._num_processors, num_rows),
            graph_plan_bytes(heads, self._num_processors, num_rows),
            max_pages * torch.int32.itemsize,
        )
        # A plan is made before each replay, so graphs share even what plans and lists of pages are
        # copied to. The largest graph comes first. Graphs that were recorded with smaller ones keep
        # them.
        numbers, plans, pages = (
            workspace if len(workspace) >= size else _zeros(size, device)
            for workspace, size in zip(self._graph_workspaces, sizes, strict=True)
        )
        self._graph_workspaces = numbers, plans, pages

        def buffer(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            numbers,
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=buffer(num_rows + 1),
            paged_kv_indices_buffer=pages.view(torch.int32),
            paged_kv_last_page_len_buffer=buffer(num_rows),
            backend="fa2",
        )
        wrapper.reset_workspace_buffer(numbers, plans)
        return PlannedWrapper(wrapper, device)

    def _plan_rows(self, kind: str, call: Call, pages: Tensor, *, is_causal: bool) -> Any:
        wrapper = self._take(kind, lambda: self._make_prefill("fa3" if kind == "fa3" else "fa2"))
        heads = self._heads
        query_starts, page_starts, last_page_lengths, lengths = pinned(
            (call.query_starts, call.page_starts, call.last_page_lengths, call.lengths),
            pages.device,
        )
        return wrapper.plan(
            query_starts,
            page_starts,
            pages,
            last_page_lengths,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            call.page_size,
            causal=is_causal,
            q_data_type=heads.dtype,
            kv_data_type=self._cache_dtype,
            sm_scale=heads.head_dim**-0.5,
            seq_lens=lengths.as_subclass(_Lengths),
            # Otherwise FlashInfer looks for the most in a loop.
            max_token_per_sequence=int(call.num_rows.max()),
        )

    def _take(self, kind: str, make: Callable[[], Any]) -> PlannedWrapper:
        turns = self._kinds.get(kind)
        if turns is None:
            turns = self._kinds[kind] = _Turns(
                [PlannedWrapper(make(), self._workspace.device) for _ in range(_TURNS)]
            )
        return turns.take()

    def _make_decode(self) -> Any:
        # Named, since a wrapper that may choose would take another generation on some devices.
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, LAYOUT, use_tensor_cores=True, backend="fa2"
        )

    def _make_prefill(self, generation: str) -> Any:
        return self._library.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, LAYOUT, backend=generation
        )


class PlannedWrapper:
    """A wrapper, and whether the device has read what it was planned with last.

    Attributes:
        wrapped: FlashInfer's.
    """

    def __init__(self, wrapped: Any, device: torch.device) -> None:
        self.wrapped = wrapped
        # Behind the copy of the last plan. Where nothing is asynchronous there is none.
        self._copied = torch.Event(device) if device.type == "cuda" else None

    def plan(self, *arrays: object, **options: object) -> Any:
        """Plans it, and returns it."""
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapped.plan(*arrays, **options)
        if self._copied is not None:
            self._copied.record()
        return self.wrapped


class _Turns:
    """Wrappers of one kind, which take turns."""

    def __init__(self, wrappers: list[PlannedWrapper]) -> None:
        self._wrappers = wrappers
        self._next = 0

    def take(self) -> PlannedWrapper:
        """The one that was planned the longest time ago."""
        wrapper = self._wrappers[self._next]
        self._next = (self._next + 1) % len(self._wrappers)
        return wrapper


class _Lengths(Tensor):
    """Lengths whose largest Python's ``max`` finds at once.

    FlashInfer calls ``max`` on the tensor of lengths. For 8,192 of them this takes 15 ms, since
    Python makes a tensor of each and compares these.
    """

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.as_subclass(Tensor).amax(),))


def _zeros(num_bytes: int, device: torch.device) -> Tensor:
    """FlashInfer asks for zeros in a workspace that it has not used yet."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _fills_fa3(call: Call, num_heads: int, num_processors: int) -> bool:
    """Whether chunks are long enough for the third generation."""
    num_tiles = int(ceil_div(call.num_rows, _FA3_ROWS).sum())
    fills_tiles = 2 * int(call.num_rows.sum()) >= num_tiles * _FA3_ROWS
    return fills_tiles and num_tiles * num_heads >= num_processors


def _has_fa3(
    library: Any, heads: ModelHeads, cache_dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernels of the third generation are built already.

    Building them takes several times as long as everything else, so no engine begins to.
    """
    # They take no wider queries than keys.
    if cache_dtype != heads.dtype or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) != _FA3_CAPABILITY:
        return False
    spec = library.jit.gen_batch_prefill_module(
        "fa3",
        heads.dtype,
        cache_dtype,
        heads.dtype,
        torch.int32,
        heads.head_dim,
        heads.head_dim,
        0,  # no rotation within the kernel
        False,  # no window
        False,  # no cap of the scores
        False,  # sums in fp32
    )
    return bool(spec.is_compiled)
