"""Norms and rotates the heads of a batch, and appends keys and values to their pages.

Where Triton runs and can write to the cache, a kernel of ours does all of it at once. Otherwise
torch norms and rotates, and FlashInfer appends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tokasaurus.model.backend.base import HeadNorms, Rotation, SequenceRows
from tokasaurus.model.backend.flashinfer.page_lists import joined
from tokasaurus.model.backend.flashinfer.planning import BatchPlan
from tokasaurus.model.backend.flashinfer.wrappers import LAYOUT
from tokasaurus.model.backend.reference_operators import norm_and_rotate
from tokasaurus.model.backend.triton.heads import TritonHeads
from tokasaurus.model.backend.triton.shapes import ALIGNMENT, AttentionShape
from tokasaurus.model.float8 import to_e4m3
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.upload import Staging
from tokasaurus.rounding import round_up

__all__ = ["StoredHeads", "appended_by_flashinfer", "stored_by_triton"]


class StoredHeads(Protocol):
    """The heads of one batch. ``TritonHeads`` is one."""

    def store(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        """Writes keys and values, and returns the queries, [rows, heads, head_dim].

        Args:
            layer: the index of the layer in the cache.
            heads: as for ``Attention.attend``, as the next two are.
            rotation: of these rows.
            norms: of queries and keys.
        """
        ...


def stored_by_triton(
    cache: KVCache, shape: AttentionShape, plan: BatchPlan, rows: SequenceRows, staging: Staging
) -> Callable[[Tensor], StoredHeads]:
    """What a kernel of ours needs.

    Args:
        cache: of the backend.
        shape: of the kernel.
        plan: of the batch.
        rows: of the batch.
        staging: that sends it.

    Returns:
        What makes the heads once the buffer is sent; the argument is not used.
    """
    num_rows = len(plan.row_slots)
    both = np.zeros((2, round_up(num_rows, ALIGNMENT)), np.int32)
    both[:, :num_rows] = plan.row_slots, rows.positions
    sent = staging.add(both)

    def stored(pages: Tensor) -> StoredHeads:
        # A copy begins at such an address.
        slots, positions = sent.tensor.clone()[:, :num_rows]
        return TritonHeads(cache, shape, rows.page_table, slots, positions)

    return stored


def appended_by_flashinfer(
    library: Any, cache: KVCache, num_heads: int, plan: BatchPlan, staging: Staging
) -> Callable[[Tensor], StoredHeads]:
    """What FlashInfer needs.

    Args:
        library: the module ``flashinfer``.
        cache: of the backend.
        num_heads: query heads.
        plan: of the batch.
        staging: that sends it.

    Returns:
        What makes the heads once the buffer is sent, from the list of all pages.
    """
    num_pages = joined(call.num_pages for call in plan.own)
    page_starts = np.append(0, np.cumsum(num_pages))
    rows = staging.add(plan.row_requests), staging.add(plan.own_positions)
    starts = staging.add(page_starts, np.int32)
    lengths = staging.add(joined(call.last_page_lengths for call in plan.own))

    def stored(pages: Tensor) -> StoredHeads:
        own_pages = pages[: page_starts[-1]]
        return _AppendedHeads(
            library.append_paged_kv_cache,
            cache,
            num_heads,
            rows=(rows[0].tensor, rows[1].tensor),
            requests=(own_pages, starts.tensor, lengths.tensor),
        )

    return stored


@dataclass(frozen=True)
class _AppendedHeads:
    """Implements ``StoredHeads``.

    Attributes:
        append: FlashInfer's function.
        cache: of the backend.
        num_heads: query heads.
        rows: the request of each row, and its position within the pages of this request.
        requests: their pages, where those of each begin, and the positions in their last pages.
    """

    append: Callable[..., None]
    cache: KVCache
    num_heads: int
    rows: tuple[Tensor, Tensor]
    requests: tuple[Tensor, Tensor, Tensor]

    def store(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        cache = self.cache
        query, key, value = norm_and_rotate(
            heads, self.num_heads, cache.num_kv_heads, rotation, norms
        )
        if len(heads):
            both = cache.keys[layer], cache.values[layer]
            if cache.is_narrow:
                key, value = to_e4m3(key), to_e4m3(value)
            self.append(key, value, *self.rows, both, *self.requests, kv_layout=LAYOUT)
        return query
