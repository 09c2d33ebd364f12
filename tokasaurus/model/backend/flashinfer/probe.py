"""Builds FlashInfer's kernels for a model, and compares what they compute with the reference.

It shows before a model is loaded that the kernels cannot be built, or that they compute something
else here. Where it fails, ``attention=auto`` takes another backend.
"""

from __future__ import annotations

import logging
import re
import time

import numpy as np
import torch

from tokasaurus.model.backend.base import (
    Backend,
    HeadNorms,
    ModelHeads,
    PrefixGroups,
    Rotation,
    SequenceRows,
)
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.float8 import E4M3
from tokasaurus.model.kv_cache import KVCache

__all__ = ["why_not_built"]

log = logging.getLogger(__name__)

_PAGE_SIZE = 16
_NUM_PAGES = 10

# How compilers and linkers begin to say what is wrong.
_MISTAKE = re.compile(r"\berror\s*:|\bfatal\s*:|cannot find -l")

# Results are rounded to the dtype, and so are the parts that they are merged from. Keys that differ
# in their last bits may be apart in e4m3.
_TOLERANCES = {torch.float16: 0.01, torch.bfloat16: 0.06, torch.float32: 1e-4, E4M3: 0.1}


def why_not_built(backend: type[Backend], heads: ModelHeads, device: torch.device) -> str | None:
    """Runs a small batch. Why this fails, and the remedy; None if it does not.

    Args:
        backend: to run.
        heads: of the model.
        device: that it runs on.
    """
    log.info(
        "attention=%s: its kernels are loaded; the first time, this takes minutes", backend.name
    )
    started = time.perf_counter()
    try:
        difference = _difference(backend, heads, device)
    except Exception as error:  # whatever a compiler, a driver or a cache may raise
        log.info("attention=%s: %s: %s", backend.name, type(error).__name__, error)
        return (
            f"its kernels cannot be built or run: {_reason(error)}; nvcc must be that of PyTorch's"
            f" CUDA {torch.version.cuda}, or set attention=triton"
        )
    log.info("attention=%s: kernels loaded in %.1f s", backend.name, time.perf_counter() - started)
    # Not a number is not near either.
    if not difference <= _TOLERANCES[heads.kept_dtype or heads.dtype]:
        return (
            f"its kernels compute something else here: results differ from the reference by"
            f" {difference:.2g}; set attention=triton"
        )
    return None


def _reason(error: Exception) -> str:
    """A line of what an error says: of a compiler's output, that of the first mistake."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return next((line for line in lines[1:] if _MISTAKE.search(line)), first)


def _difference(backend: type[Backend], heads: ModelHeads, device: torch.device) -> float:
    """The largest one between the backend and the reference."""
    rows = _batch(device)
    generator = torch.Generator().manual_seed(0)
    num_rows, half = len(rows.positions), heads.head_dim // 2
    total = heads.num_heads + 2 * heads.num_kv_heads
    mixed = torch.randn(num_rows, total, heads.head_dim, generator=generator)
    angles = torch.rand(num_rows, 1, half, generator=generator) * 6
    rotation = Rotation(angles.cos().to(device), angles.sin().to(device))
    ones = torch.ones(heads.head_dim, dtype=heads.dtype, device=device)
    shape = _NUM_PAGES, heads.num_kv_heads, _PAGE_SIZE, heads.head_dim
    filling = torch.randn(2, *shape, generator=generator)
    outputs = []
    for each in (backend, ReferenceBackend):
        cache = KVCache.allocate(
            num_layers=1,
            num_pages=_NUM_PAGES,
            page_size=_PAGE_SIZE,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            dtype=heads.dtype,
            device=device,
            kept_dtype=heads.kept_dtype,
        )
        for tensor, values in zip(cache.keys + cache.values, filling, strict=True):
            tensor.copy_(values)
        attention = each(cache, heads.num_heads).plan(rows)
        mine = mixed.to(device, heads.dtype)
        outputs.append(attention.attend(0, mine, rotation, HeadNorms(ones, ones, 1e-5)).float())
    return float((outputs[0] - outputs[1]).abs().max())


def _batch(device: torch.device) -> SequenceRows:
    """A decode alone, two that share a page, a chunk that shares it, and a chunk alone."""
    pages = [[0, 1, 0], [2, 3, 0], [2, 4, 0], [2, 5, 6], [7, 8, 9]]
    lengths, counts = [20, 17, 30, 40, 33], [1, 1, 1, 20, 33]
    return SequenceRows(
        slots=np.arange(len(pages), dtype=np.int32),
        query_starts=np.cumsum([0, *counts], dtype=np.int32),
        kv_lengths=np.array(lengths, np.int32),
        positions=np.concatenate(
            [
                np.arange(end - n, end, dtype=np.int32)
                for end, n in zip(lengths, counts, strict=True)
            ]
        ),
        page_table=torch.tensor(pages, dtype=torch.int32, device=device),
        num_decodes=3,
        groups=PrefixGroups(*(np.array([n], np.int32) for n in (1, 2, 3, 1, 0, 1))),
    )
