"""The paged KV cache: the keys and values of every token position.

A page holds ``page_size`` consecutive positions of one sequence, in every layer. Each layer has two
tensors, [num_pages, kv_heads, page_size, head_dim]. In a page the positions of one head lie next to
each other, so work on one head reads long contiguous runs::

    page table of slot 7:   [ 5, 2, 9 ]              page_size 4, length 10

    position                0 1 2 3   4 5 6 7   8 9
                            └ page 5┘ └ page 2┘ └ page 9 ...

    keys[5]   head 0 │ k0 k1 k2 k3 │   each k is a row of head_dim numbers
              head 1 │ k0 k1 k2 k3 │
    keys[2]   head 0 │ k4 k5 k6 k7 │
              head 1 │ k4 k5 k6 k7 │
    keys[9]   head 0 │ k8 k9  ?  ? │   ?: never written, never read
              head 1 │ k8 k9  ?  ? │

    position p  ->  page_table[slot, p // page_size], row p % page_size

Keys and values may be kept in e4m3, which takes half of the memory of bf16 or fp16, and a quarter
of that of fp32. They are rounded as they are written, and widened as they are read: attention
itself is in ``heads_dtype``.

The memory is not initialised, so the operating system provides it as pages are first written. A
backend must therefore not read beyond a sequence's length: 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokasaurus.model.float8 import E4M3, to_e4m3
from tokasaurus.model.storage import Region

__all__ = ["KVCache"]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Attributes:
        keys: for each layer [num_pages, kv_heads, page_size, head_dim].
        values: of the same shape.
        heads_dtype: of queries, keys and values outside of the cache.
        memory: of all these.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    heads_dtype: torch.dtype
    memory: Region

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kept_dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Allocates the memory of all layers, uninitialised.

        Args:
            num_layers: of the worker.
            num_pages: of the cache.
            page_size: in tokens.
            num_kv_heads: of the worker.
            head_dim: numbers of a head.
            dtype: of heads.
            device: of the cache.
            kept_dtype: of keys and values in the cache; None for that of heads.
        """
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        memory = Region()

        def tensors() -> tuple[Tensor, ...]:
            kept = kept_dtype or dtype
            return tuple(memory.empty(shape, kept, device) for _ in range(num_layers))

        return cls(tensors(), tensors(), dtype, memory)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copies whole pages in every layer.

        Args:
            sources: [copies] int64.
            targets: [copies] int64; none of them is a source.
        """
        for tensor in self.keys + self.values:
            raw = self.raw(tensor)
            raw[targets] = raw[sources]

    def raw(self, kept: Tensor) -> Tensor:
        """A view of numbers of the cache, as ``rounded`` returns them."""
        return kept.view(torch.uint8) if self.is_narrow else kept

    def rounded(self, rows: Tensor) -> Tensor:
        """Numbers as the cache keeps them; those in e4m3 as bytes, which every device can index."""
        if self.is_narrow:
            return to_e4m3(rows).view(torch.uint8)
        return rows.to(self.dtype)

    def widened(self, raw: Tensor) -> Tensor:
        """What ``rounded`` has returned, in the dtype of heads."""
        return raw.view(E4M3).to(self.heads_dtype) if self.is_narrow else raw

    def write_pages(
        self, pages: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], num_tokens: int
    ) -> None:
        """Writes consecutive positions, from the beginning of a page on, in every layer.

        The rest of the last page keeps its contents. Numbers are rounded to the cache's dtype.

        Args:
            pages: [ceil(num_tokens / page_size)] int64, distinct, in order of position.
            keys: for each layer [kv_heads, num_tokens, head_dim], after RoPE, on any device.
            values: of the same shape.
            num_tokens: at least 1.
        """
        full, rest = divmod(num_tokens, self.page_size)
        split = (self.num_kv_heads, full, self.page_size, self.head_dim)
        for tensor, rows in zip(self.keys + self.values, (*keys, *values), strict=True):
            rows, tensor = self.rounded(rows.to(tensor.device)), self.raw(tensor)
            at = full * self.page_size
            tensor[pages[:full]] = rows[:, :at].reshape(split).transpose(0, 1)
            if rest:
                tensor[pages[full], :, :rest] = rows[:, at:]

    def read_pages(self, pages: Tensor, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of consecutive positions, from the beginning of a page on, in every layer.

        Args:
            pages: [ceil(num_tokens / page_size)] int64, in order of position.
            num_tokens: at least 1.

        Returns:
            Keys and values as ``write_pages`` takes them, in the dtype of heads.
        """

        def read(tensor: Tensor) -> Tensor:
            pages_of_all = self.widened(self.raw(tensor)[pages])
            return pages_of_all.transpose(0, 1).flatten(1, 2)[:, :num_tokens].clone()

        return [read(tensor) for tensor in self.keys], [read(tensor) for tensor in self.values]

    def resize(self, num_pages: int) -> None:
        """Allocates the memory of another number of pages, uninitialised. What it held is lost."""
        self.release()
        for tensor in self.keys + self.values:
            shape = (num_pages, *tensor.shape[1:])
            tensor.set_(tensor.untyped_storage(), 0, shape, (0,) * len(shape))
        self.restore()

    def release(self) -> None:
        """Frees the memory. What it held is lost."""
        self.memory.release(*self.keys, *self.values)

    def restore(self) -> None:
        """Allocates the memory again, uninitialised."""
        self.memory.restore(*self.keys, *self.values)

    @property
    def num_pages(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.keys[0].shape[1]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[2]

    @property
    def head_dim(self) -> int:
        return self.keys[0].shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values in the cache."""
        return self.keys[0].dtype

    @property
    def is_narrow(self) -> bool:
        """Whether keys and values are in e4m3."""
        return self.dtype == E4M3

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.keys + self.values)
