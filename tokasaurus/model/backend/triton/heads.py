"""Norms, rotates and stores the heads of a batch, in one kernel."""

from __future__ import annotations

from torch import Tensor

from tokasaurus.model.backend.base import HeadNorms, Rotation
from tokasaurus.model.backend.triton.shapes import AttentionShape
from tokasaurus.model.kv_cache import KVCache

__all__ = ["TritonHeads"]


class TritonHeads:
    """The heads of one batch.

    Args:
        cache: of the backend.
        shape: of the backend.
        page_table: [slots, columns] int32, on the device.
        row_slots: [rows] int32.
        row_positions: [rows] int32; -1 for a row that has no sequence, of which nothing is written.
    """

    def __init__(
        self,
        cache: KVCache,
        shape: AttentionShape,
        page_table: Tensor,
        row_slots: Tensor,
        row_positions: Tensor,
    ) -> None:
        # Where this runs Triton is installed.
        from tokasaurus.model.backend.triton import attention_kernels

        self._kernel = attention_kernels.prepare_heads
        self._cache, self._shape, self._page_table = cache, shape, page_table
        self._row_slots, self._row_positions = row_slots, row_positions

    def store(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        """Writes keys and values, and returns the queries, [rows, heads, head_dim], contiguous.

        Args:
            layer: the index of the layer in the cache.
            heads: as for ``Attention.attend``, as the next two are.
            rotation: of these rows.
            norms: of queries and keys.
        """
        cache, shape, num_rows = self._cache, self._shape, len(heads)
        query = heads.new_empty((num_rows, shape.num_heads, shape.head_dim))
        if not num_rows:
            return query
        if heads.stride()[1:] != (shape.head_dim, 1):
            heads = heads.contiguous()
        query_norm, key_norm, eps = (heads, heads, 0.0) if norms is None else norms
        self._kernel[shape.num_preparing(num_rows),](
            heads,
            rotation.cos.contiguous(),
            rotation.sin.contiguous(),
            query_norm,
            key_norm,
            query,
            cache.keys[layer],
            cache.values[layer],
            self._page_table,
            self._row_slots,
            self._row_positions,
            num_rows,
            heads.stride(0),
            self._page_table.stride(0),
            eps,
            HAS_NORMS=norms is not None,
            **shape.preparing,
        )
        return query
