"""``toka-bench roofline``: how fast a device multiplies matrices and reads memory.

    toka-bench roofline dtypes=bfloat16
    toka-bench roofline dtypes=bfloat16 device=cuda

No engine can multiply faster than the first, or read its weights and KV cache faster than the
second. The matrix is square and large, multiplied by PyTorch. The memory is read once, by a
product with a vector, and no cache holds it; on CUDA it is copied, and both directions count. Each
rate is the best of several rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError

__all__ = ["SCHEMA", "RooflineConfig", "matrix_gflop_per_s", "memory_gb_per_s", "run"]

# Of matrices, and of the memory in MiB: so large that a device is busy, and no cache helps.
_USUAL = {"cpu": (2048, 1024), "cuda": (8192, 4096)}


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """What to measure."""

    device: str = flag("cpu", choices=tuple(_USUAL), help="That multiplies and reads.")
    dtypes: tuple[str, ...] = flag(
        ("float32", "bfloat16"),
        choices=("float32", "bfloat16"),
        help="Of the matrices.",
    )
    matrix: int | None = flag(
        None,
        minimum=1,
        help="Rows and columns of the matrices.",
        usually="2048",
        adapts="8192 on cuda",
    )
    memory_mib: int | None = flag(
        None, minimum=1, help="MiB that are read.", usually="1024", adapts="4096 on cuda"
    )
    rounds: int = flag(7, minimum=1, help="How often each is measured.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=RooflineConfig,
    program="toka-bench roofline",
    summary="How fast a device multiplies matrices and reads memory.",
    examples=(
        "toka-bench roofline dtypes=bfloat16",
        "toka-bench roofline dtypes=bfloat16 device=cuda",
    ),
)


def run(config: RooflineConfig) -> None:
    """Measures and prints the results. Raises ConfigError if there is no such device."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; leave device out")
    progress("reading memory")
    memory = memory_gb_per_s(config)
    matrix = {}
    for dtype in config.dtypes:
        progress(f"multiplying in {dtype}")
        matrix[dtype] = matrix_gflop_per_s(config, dtype)
    rows = [(f"matrices in {dtype}", f"{rate:,.0f} GFLOP/s") for dtype, rate in matrix.items()]
    print(table(("what", "rate"), [*rows, ("memory", f"{memory:,.1f} GB/s")]))
    print_json({"device": config.device, "matrix_gflop_per_s": matrix, "memory_gb_per_s": memory})


def matrix_gflop_per_s(config: RooflineConfig, dtype: str) -> float:
    """The rate of products of square matrices."""
    import torch

    size, device = config.matrix or _USUAL[config.device][0], config.device
    left, right = (
        torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2)
    )
    result = torch.empty_like(left)
    return 2e-9 * size**3 / _least_s(config, lambda: torch.mm(left, right, out=result))


def memory_gb_per_s(config: RooflineConfig) -> float:
    """The rate at which memory is read; on CUDA, read and written."""
    import torch

    num_bytes = (config.memory_mib or _USUAL[config.device][1]) << 20
    if config.device == "cuda":
        source = torch.ones(num_bytes // 4, device="cuda")
        target = torch.empty_like(source)
        return 2e-9 * source.nbytes / _least_s(config, lambda: target.copy_(source))
    columns = 4096
    memory = torch.ones(max(num_bytes // (4 * columns), 1), columns)
    vector, result = torch.ones(columns), torch.empty(len(memory))
    seconds = _least_s(config, lambda: torch.mv(memory, vector, out=result))
    return 1e-9 * memory.nbytes / seconds


def _least_s(config: RooflineConfig, work: Callable[[], object]) -> float:
    wait = _no_wait
    if config.device == "cuda":
        import torch

        wait = torch.cuda.synchronize
    work()
    wait()
    seconds = []
    for _ in range(config.rounds):
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _no_wait() -> None:
    """On the CPU work is done when it returns."""
