"""Pages that are written as a whole: every position is where the page table would look for it."""

from __future__ import annotations

import torch
from rows import named

from tokasaurus.model.kv_cache import KVCache
from tokasaurus.rounding import ceil_div

NUM_LAYERS, NUM_PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 2, 8, 4, 3, 5
PAGES = [6, 1, 4]


def make_cache(dtype: torch.dtype) -> KVCache:
    """A cache full of NaN, so that what was not written shows."""
    cache = KVCache.allocate(
        num_layers=NUM_LAYERS,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for tensor in cache.keys + cache.values:
        tensor.fill_(torch.nan)
    return cache


def test_positions_are_written_in_order_and_nothing_else_is() -> None:
    for num_tokens in (1, 3, 4, 5, 8, 11, 12):
        for dtype in (torch.float32, torch.bfloat16):
            with named((num_tokens, dtype)):
                check_pages_of(num_tokens, dtype)


def check_pages_of(num_tokens: int, dtype: torch.dtype) -> None:
    cache = make_cache(dtype)
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (HEADS, num_tokens, HEAD_DIM)
    keys, values = (
        [torch.randn(shape, generator=generator) for _ in range(NUM_LAYERS)] for _ in range(2)
    )
    pages = torch.tensor(PAGES[: ceil_div(num_tokens, PAGE_SIZE)])
    cache.write_pages(pages, keys, values, num_tokens)
    for tensor, written in zip(cache.keys + cache.values, keys + values, strict=True):
        for position in range(num_tokens):
            page, row = PAGES[position // PAGE_SIZE], position % PAGE_SIZE
            assert torch.equal(tensor[page, :, row], written[:, position].to(dtype))
        num_numbers = int((~tensor.isnan()).sum())
        assert num_numbers == num_tokens * HEADS * HEAD_DIM
