"""``toka-bench roofline``: how fast this machine multiplies matrices and reads memory.

    toka-bench roofline dtypes=bfloat16

No engine can multiply faster than the first, or read its weights and KV cache faster than the
second. The matrix is square and large, multiplied by PyTorch. The memory is read once, by a
product with a vector, and no cache holds it. Each rate is the best of several rounds. With
``device=cuda`` they are those of the first GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.model.instruction_sets import processor_name

__all__ = ["SCHEMA", "RooflineConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """What to measure."""

    dtypes: tuple[str, ...] = flag(
        ("float32", "bfloat16"),
        choices=("float32", "bfloat16"),
        help="Of the matrices.",
    )
    device: str = flag("cpu", choices=("cpu", "cuda"), help="What multiplies and reads.")
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
    print_json(
        {
            "device": _name(config.device),
            "matrix_gflop_per_s": matrix,
            "memory_gb_per_s": memory,
        }
    )


def _name(device: str) -> str:
    if device == "cpu":
        return processor_name()
    import torch

    name: str = torch.cuda.get_device_name()
    return name


def _matrix_gflop_per_s(config: RooflineConfig, dtype: str) -> float:
    import torch

    size = config.matrix
    left, right = (
        torch.randn(size, size, device=config.device).to(getattr(torch, dtype)) for _ in range(2)
    )
    result = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=result)
        result[0, 0].item()  # waits for the device

    return 2e-9 * size**3 / _least_s(config, multiply)


def _memory_gb_per_s(config: RooflineConfig) -> float:
    import torch

    columns = 4096
    rows = config.memory_mib * (1 << 20) // (4 * columns)
    memory = torch.ones(rows, columns, device=config.device)
    vector = torch.ones(columns, device=config.device)
    result = torch.empty(rows, device=config.device)

    def read() -> None:
        torch.mv(memory, vector, out=result)
        result[0].item()  # waits for the device

    return 1e-9 * memory.nbytes / _least_s(config, read)


def _least_s(config: RooflineConfig, work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(config.rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
