"""``toka-bench attention``: what one layer's attention takes, for batches of several shapes.

    toka-bench attention dtype=bfloat16

Each batch runs over pages of its own, in as many layers as a cache of the last level does not hold,
so that keys and values come from where they come from in a model. The numbers are medians.

A group is a number of sequences that decode behind the same prefix. It runs twice: once as a group,
whose prefix is read once, and once row by row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.rounding import ceil_div

if TYPE_CHECKING:
    from tokasaurus.model.backend.base import SequenceRows

__all__ = ["SCHEMA", "AttentionConfig", "run"]

_PAGE_SIZE = 16
_OWN_TOKENS = 32  # behind a group's prefix


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The model's shape, and the kernels."""

    num_heads: int = flag(9, minimum=1, help="Query heads.")
    num_kv_heads: int = flag(3, minimum=1, help="Key heads, and as many value heads.")
    head_dim: int = flag(64, minimum=2, help="Numbers in a head.")
    num_layers: int = flag(8, minimum=1, help="Layers that take turns.")
    dtype: str = flag(
        "float32", choices=("float32", "bfloat16", "float16"), help="Of queries and KV cache."
    )
    attention: str = flag(
        "compiled", choices=("compiled", "reference"), help="The backend that is measured."
    )
    instruction_set: str = flag(
        "auto",
        choices=("auto", "amx", "avx512_bf16", "avx512", "avx2", "generic"),
        help="The processor's instructions that the compiled kernel uses.",
    )
    threads: int | None = flag(
        None, minimum=1, help="Threads of the kernel.", adapts="PyTorch's choice"
    )
    rounds: int = flag(7, minimum=1, help="How often each batch runs through all layers.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=AttentionConfig,
    program="toka-bench attention",
    summary="What one layer's attention takes, for batches of several shapes.",
    examples=("toka-bench attention dtype=bfloat16 num_heads=32 num_kv_heads=8",),
)


class _Case(NamedTuple):
    """A batch of sequences that are alike.

    Attributes:
        num_sequences: of the batch.
        num_rows: of each sequence.
        length: of each sequence's context, its rows included.
        prefix: tokens that all sequences share.
        grouped: the prefix is read once for all.
    """

    num_sequences: int
    num_rows: int
    length: int
    prefix: int = 0
    grouped: bool = False

    @property
    def name(self) -> str:
        kind = "decode" if self.num_rows == 1 else "prefill"
        shared = f", {self.prefix} shared" if self.prefix else ""
        way = " as a group" if self.grouped else ""
        return f"{kind} {self.num_sequences} x {self.num_rows} at {self.length}{shared}{way}"


def _cases() -> Iterator[_Case]:
    for num_sequences in (32, 128):
        for length in (100, 300, 1000):
            yield _Case(num_sequences, 1, length)
    yield _Case(1, 1, 4000)
    yield _Case(4, 128, 128)
    yield _Case(1, 512, 512)
    yield _Case(1, 2048, 2048)
    for num_sequences in (4, 32, 128):
        for prefix in (64, 512, 2048):
            for grouped in (False, True):
                yield _Case(num_sequences, 1, prefix + _OWN_TOKENS, prefix, grouped)


def run(config: AttentionConfig) -> None:
    """Measures and prints the results."""
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows, results = [], {}
    for case in _cases():
        progress(case.name)
        microseconds = _measure(config, case)
        num_bytes, flops = _work(config, case)
        results[case.name] = {
            "microseconds": microseconds,
            "gb_per_s": num_bytes / microseconds / 1e3,
            "gflop_per_s": flops / microseconds / 1e3,
        }
        rows.append(
            (
                case.name,
                f"{microseconds:,.0f}",
                f"{num_bytes / microseconds / 1e3:.1f}",
                f"{flops / microseconds / 1e3:.0f}",
            )
        )
    print(table(("batch", "us a layer", "GB/s", "GFLOP/s"), rows))
    print_json(results)


def _measure(config: AttentionConfig, case: _Case) -> float:
    """Microseconds of one layer."""
    import torch

    from tokasaurus.model.backend import choose_backend
    from tokasaurus.model.backend.base import BackendOptions, Rotation
    from tokasaurus.model.kv_cache import KVCache

    dtype: torch.dtype = getattr(torch, config.dtype)
    rows, num_pages = _batch(case)
    cache = KVCache.allocate(
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=_PAGE_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for tensor in cache.keys + cache.values:
        tensor.normal_()
    options = BackendOptions(config.instruction_set)
    backend = choose_backend(config.attention, torch.device("cpu"), options)
    num_heads = config.num_heads + 2 * config.num_kv_heads
    heads = torch.randn(len(rows.positions), num_heads, config.head_dim).to(dtype)
    angles = torch.rand(len(rows.positions), 1, config.head_dim // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    attention = backend(cache, config.num_heads, options).plan(rows)
    seconds = []
    with torch.inference_mode():
        for _ in range(config.rounds + 1):
            for layer in range(config.num_layers):
                started = time.perf_counter()
                attention.attend(layer, heads, rotation, None)
                seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds[config.num_layers :])


def _batch(case: _Case) -> tuple[SequenceRows, int]:
    """The batch over shuffled pages, and the number of pages."""
    import torch

    from tokasaurus.model.backend.base import NO_GROUPS, PrefixGroups, SequenceRows

    count, columns = case.num_sequences, ceil_div(case.length, _PAGE_SIZE)
    num_pages = count * columns
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    pages = pages.reshape(count, columns)
    shared = case.prefix // _PAGE_SIZE
    pages[:, :shared] = pages[0, :shared]
    one_group = (np.array([number], np.int32) for number in (0, count, 0, shared))
    rows = SequenceRows(
        slots=np.arange(count, dtype=np.int32),
        query_starts=np.arange(0, (count + 1) * case.num_rows, case.num_rows, dtype=np.int32),
        kv_lengths=np.full(count, case.length, np.int32),
        positions=np.tile(
            np.arange(case.length - case.num_rows, case.length, dtype=np.int32), count
        ),
        page_table=torch.from_numpy(pages),
        num_decodes=count if case.num_rows == 1 else 0,
        groups=PrefixGroups(*one_group) if case.grouped else NO_GROUPS,
    )
    return rows, num_pages


def _work(config: AttentionConfig, case: _Case) -> tuple[float, float]:
    """Bytes of keys and values that are read at least, and operations, of one layer."""
    element_bytes = 4 if config.dtype == "float32" else 2
    # Each row sees one position more than the row before.
    seen = case.num_rows * (case.length - (case.num_rows - 1) / 2)
    flops = 4.0 * case.num_sequences * seen * config.num_heads * config.head_dim
    own = case.length - case.prefix
    tokens = case.prefix + case.num_sequences * own
    if case.prefix and not case.grouped:
        tokens = case.num_sequences * case.length
    num_bytes = 2.0 * tokens * config.num_kv_heads * config.head_dim * element_bytes
    return num_bytes, flops
