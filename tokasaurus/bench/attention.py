"""``toka-bench attention``: what one layer's attention takes, for batches of several shapes.

    toka-bench attention dtype=bfloat16

Each batch runs over pages of its own, in as many layers as a cache of the last level does not hold,
so that keys and values come from where they come from in a model. The numbers are medians.

A group is a number of sequences that decode, or feed the ends of their prompts, behind the same
prefix. Its batch runs in two ways, which take turns: each sequence reads the prefix, or the prefix
is read once for all.

    toka-bench attention plot=shared_prefix.svg

With ``plot`` only groups are measured, of more sizes, and drawn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.bench.plot import check_plot
from tokasaurus.bench.shared_prefix_plot import Curves, write_shared_prefix_plot
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
    plot: str | None = flag(
        None,
        help="An SVG file to write: how much faster groups of several sizes are.",
        adapts="no file",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.plot is not None:
            check_plot(self.plot)


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


def _both_ways(num_sequences: int, num_rows: int, prefix: int) -> tuple[_Case, _Case]:
    own = _OWN_TOKENS if num_rows == 1 else num_rows
    case = _Case(num_sequences, num_rows, prefix + own, prefix)
    return case, case._replace(grouped=True)


def _cases() -> Iterator[tuple[_Case, ...]]:
    """Each is measured in turn with the others beside it."""
    for num_sequences in (32, 128):
        for length in (100, 300, 1000):
            yield (_Case(num_sequences, 1, length),)
    yield (_Case(1, 1, 4000),)
    yield (_Case(4, 128, 128),)
    yield (_Case(1, 512, 512),)
    yield (_Case(1, 2048, 2048),)
    for num_sequences in (4, 32, 128):
        for prefix in (64, 512, 2048):
            yield _both_ways(num_sequences, 1, prefix)
    for num_rows in (4, 16, 64):
        yield _both_ways(16, num_rows, 512)


_PLOTTED_PREFIXES = (128, 512, 2048)
_PLOTTED_DECODES = (2, 4, 8, 16, 32, 64, 128)
_PLOTTED_CHUNKS = (2, 4, 8, 16, 32, 64)
_PLOTTED_PROMPTS = 16


def run(config: AttentionConfig) -> None:
    """Measures and prints the results."""
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.plot is not None:
        _plot(config, config.plot)
        return
    rows, results = [], {}
    for cases in _cases():
        progress(cases[0].name)
        for case, microseconds in zip(cases, _measure(config, cases), strict=True):
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


def _plot(config: AttentionConfig, path: str) -> None:
    """Measures groups of many sizes, and draws how much faster they are."""
    decodes = Curves(
        title=f"Sequences that decode, {config.dtype}",
        axis="sequences of the group",
        lines={
            f"{prefix} shared tokens": [
                (count, _speed_up(config, count, 1, prefix)) for count in _PLOTTED_DECODES
            ]
            for prefix in _PLOTTED_PREFIXES
        },
    )
    chunks = Curves(
        title=f"{_PLOTTED_PROMPTS} prompts at once, {config.dtype}",
        axis="tokens of each prompt behind the prefix",
        lines={
            f"{prefix} shared tokens": [
                (num_rows, _speed_up(config, _PLOTTED_PROMPTS, num_rows, prefix))
                for num_rows in _PLOTTED_CHUNKS
            ]
            for prefix in _PLOTTED_PREFIXES
        },
    )
    rows = [
        (curves.title, name, str(count), f"{ratio:.2f}")
        for curves in (decodes, chunks)
        for name, line in curves.lines.items()
        for count, ratio in line
    ]
    print(table(("what", "prefix", "count", "times faster"), rows))
    print_json({curves.title: curves.lines for curves in (decodes, chunks)})
    write_shared_prefix_plot(path, [decodes, chunks])


def _speed_up(config: AttentionConfig, num_sequences: int, num_rows: int, prefix: int) -> float:
    """How often faster a batch is as a group."""
    cases = _both_ways(num_sequences, num_rows, prefix)
    progress(cases[0].name)
    alone, grouped = _measure(config, cases)
    return alone / grouped


def _measure(config: AttentionConfig, cases: Sequence[_Case]) -> list[float]:
    """Microseconds of one layer, for cases that differ in their groups only."""
    import torch

    from tokasaurus.model.backend import choose_backend
    from tokasaurus.model.backend.base import BackendOptions, Rotation
    from tokasaurus.model.kv_cache import KVCache

    dtype: torch.dtype = getattr(torch, config.dtype)
    batches = [_batch(case) for case in cases]
    rows, num_pages = batches[0]
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
    planned = [backend(cache, config.num_heads, options).plan(rows) for rows, _ in batches]
    seconds: list[list[float]] = [[] for _ in cases]
    with torch.inference_mode():
        for _ in range(config.rounds + 1):
            for attention, times in zip(planned, seconds, strict=True):
                for layer in range(config.num_layers):
                    started = time.perf_counter()
                    attention.attend(layer, heads, rotation, None)
                    times.append(time.perf_counter() - started)
    return [1e6 * statistics.median(times[config.num_layers :]) for times in seconds]


def _batch(case: _Case) -> tuple[SequenceRows, int]:
    """The batch over shuffled pages, and the number of pages."""
    import torch

    from tokasaurus.model.backend.base import NO_GROUPS, PrefixGroups, SequenceRows

    count, columns = case.num_sequences, ceil_div(case.length, _PAGE_SIZE)
    shared = case.prefix // _PAGE_SIZE
    num_pages = shared + count * (columns - shared)
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    pages = np.empty((count, columns), np.int32)
    pages[:, :shared] = order[:shared]
    pages[:, shared:] = order[shared:].reshape(count, -1)
    num_decodes = count if case.num_rows == 1 else 0
    one_group = (0, num_decodes, num_decodes, count - num_decodes, 0, shared)
    rows = SequenceRows(
        slots=np.arange(count, dtype=np.int32),
        query_starts=np.arange(0, (count + 1) * case.num_rows, case.num_rows, dtype=np.int32),
        kv_lengths=np.full(count, case.length, np.int32),
        positions=np.tile(
            np.arange(case.length - case.num_rows, case.length, dtype=np.int32), count
        ),
        page_table=torch.from_numpy(pages),
        num_decodes=num_decodes,
        groups=(
            PrefixGroups(*(np.array([number], np.int32) for number in one_group))
            if case.grouped
            else NO_GROUPS
        ),
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
