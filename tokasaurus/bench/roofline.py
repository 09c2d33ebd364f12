"""``toka-bench roofline``: how fast this machine multiplies matrices and reads memory.

    toka-bench roofline dtypes=bfloat16

No engine can multiply faster than the first, or read its weights and KV cache faster than the
second. The matrix is square and large, multiplied by PyTorch. The memory is read once, by a
product with a vector, and no cache holds it. Each rate is the best of several rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.schema import Schema, check_fields, flag

__all__ = ["SCHEMA", "RooflineConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """What to measure."""

    dtypes: tuple[str, ...] = flag(
        ("float32", "bfloat16"),
        choices=("float32", "bfloat16"),
        help="Of the matrices.",
    )
    matrix: int = flag(2048, minimum=1, help="Rows and columns of the matrices.")
    memory_mib: int = flag(1024, minimum=1, help="MiB that are read.")
    rounds: int = flag(7, minimum=1, help="How often each is measured.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=RooflineConfig,
    program="toka-bench roofline",
    summary="How fast this machine multiplies matrices and reads memory.",
    examples=("toka-bench roofline dtypes=bfloat16",),
)


def run(config: RooflineConfig) -> None:
    """Measures and prints the results."""
    progress("reading memory")
    memory = _memory_gb_per_s(config)
    matrix = {}
    for dtype in config.dtypes:
        progress(f"multiplying in {dtype}")
        matrix[dtype] = _matrix_gflop_per_s(config, dtype)
    rows = [(f"matrices in {dtype}", f"{rate:,.0f} GFLOP/s") for dtype, rate in matrix.items()]
    print(table(("what", "rate"), [*rows, ("memory", f"{memory:.1f} GB/s")]))
    print_json({"matrix_gflop_per_s": matrix, "memory_gb_per_s": memory})


def _matrix_gflop_per_s(config: RooflineConfig, dtype: str) -> float:
    import torch

    size = config.matrix
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    result = torch.empty_like(left)
    return 2e-9 * size**3 / _least_s(config, lambda: torch.mm(left, right, out=result))


def _memory_gb_per_s(config: RooflineConfig) -> float:
    import torch

    columns = 4096
    memory = torch.ones(config.memory_mib * (1 << 20) // (4 * columns), columns)
    vector, result = torch.ones(columns), torch.empty(len(memory))
    seconds = _least_s(config, lambda: torch.mv(memory, vector, out=result))
    return 1e-9 * memory.nbytes / seconds


def _least_s(config: RooflineConfig, work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(config.rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
