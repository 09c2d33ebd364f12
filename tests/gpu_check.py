"""``make gpu-check``: whether a GPU computes what the CPU computes, and how fast it serves.

    make gpu-check                                 everything, on a GPU
    make gpu-check ARGS='parts=parity'             without loads
    make gpu-check ARGS='device=cpu size=tiny'     the check itself, on any machine

=======  ===========================================================================================
kernels  each backend against the reference on the device itself, on random batches, in three dtypes
parity   a small model with every backend and option against the CPU: greedy tokens and logprobs
speed    Llama-3.2-1B's shape with random weights: repeated sampling, and chat-like traffic
=======  ===========================================================================================

A table at the end has a line for each part, with its gate. Rates have gates on a GPU only, for one
H200. The exit status is 0 if all gates hold, 1 if one does not, 2 if there is no such device.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_kernels import check_kernels
from gpu_parity import check, make_model
from gpu_speed import SIZES, Speed, measure_rates, measure_speeds

from tokasaurus.bench.output import table
from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.schema import Schema, check_fields, flag

__all__ = ["main"]

_PARTS = ("kernels", "parity", "speed")

# Of repeated sampling on one H200, with prefixes read once.
_LEAST_TOKENS_PER_S = 120_000
_LEAST_ROOFLINE = 0.6
_MOST_IDLE = 0.03


@dataclass(frozen=True, kw_only=True)
class GPUCheckConfig:
    """What to check."""

    device: str = flag("cuda", choices=("cuda", "cpu"), help="That is checked.")
    size: str = flag("full", choices=tuple(SIZES), help="Of the loads.")
    parts: tuple[str, ...] = flag(_PARTS, choices=_PARTS, help="What is checked.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=GPUCheckConfig,
    program="make gpu-check",
    summary="Whether a GPU computes what the CPU computes, and how fast it serves.",
    examples=("make gpu-check", "make gpu-check ARGS='device=cpu size=tiny'"),
)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        what: was checked.
        result: of it.
        gate: that it must pass; "" for none.
        passed: it has.
    """

    what: str
    result: str
    gate: str = ""
    passed: bool = True

    @property
    def verdict(self) -> str:
        if not self.passed:
            return "FAILED"
        return "passed" if self.gate else ""


def main(arguments: Sequence[str]) -> int:
    config = parse_or_exit(SCHEMA, arguments)
    if config.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-check: this machine has no CUDA device that PyTorch can use; nothing was checked."
            f" PyTorch is {torch.__version__}.",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    print(f"gpu-check: device={config.device}, {_name(config.device)}, PyTorch {torch.__version__}")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as directory:
        parts = {"kernels": _kernels, "parity": _parity, "speed": _speed}
        for part in config.parts:
            begun = time.perf_counter()
            lines += parts[part](config, Path(directory))
            lines.append(Line(f"{part}: time", f"{time.perf_counter() - begun:.0f} s"))
    lines.append(Line("in all: time", f"{time.perf_counter() - started:.0f} s"))
    print()
    rows = [(each.what, each.result, each.gate, each.verdict) for each in lines]
    print(table(("what", "result", "gate", ""), rows))
    return 0 if all(each.passed for each in lines) else 1


def _kernels(config: GPUCheckConfig, directory: Path) -> list[Line]:
    found = check_kernels(config.device)
    return [_failures("kernels: each backend, and the reference on the device", found)]


def _parity(config: GPUCheckConfig, directory: Path) -> list[Line]:
    checkpoint = make_model(directory / "small")
    compiles = SIZES[config.size].compiles
    found = check(config.device, checkpoint, checkpoint, compiles=compiles)
    return [_failures("parity: each backend and option, and the CPU", found)]


def _failures(what: str, failures: list[str]) -> Line:
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return Line(what, f"{len(failures)} differences", "none", not failures)


def _speed(config: GPUCheckConfig, directory: Path) -> Iterator[Line]:
    size = SIZES[config.size]
    rates = measure_rates(config.device, size)
    yield Line(f"products in {size.dtype}", f"{rates.flops / 1e12:,.2f} TFLOP/s")
    yield Line("memory", f"{rates.bytes / 1e12:,.3f} TB/s")
    model = directory / "large"
    model.mkdir()
    for speed in measure_speeds(config.device, size, rates, model):
        print(
            f" {speed.name}: {speed.tokens_per_s:,.0f} tokens/s in {speed.num_batches} batches",
            flush=True,
        )
        yield from _lines(speed, has_gates=config.device == "cuda" and config.size == "full")


def _lines(speed: Speed, *, has_gates: bool) -> Iterator[Line]:
    gates = has_gates and speed.name == "repeated, groups"

    def line(what: str, result: str, gate: str, passed: bool) -> Line:
        return Line(f"{speed.name}: {what}", result, gate if gates else "", passed or not gates)

    rate, share = speed.tokens_per_s, speed.roofline
    yield line(
        "tokens/s", f"{rate:,.0f}", f">= {_LEAST_TOKENS_PER_S:,}", rate >= _LEAST_TOKENS_PER_S
    )
    yield line(
        "share of the roofline",
        f"{share:.1%}",
        f">= {_LEAST_ROOFLINE:.0%}",
        share >= _LEAST_ROOFLINE,
    )
    yield line("idle", f"{speed.idle:.1%}", f"< {_MOST_IDLE:.0%}", speed.idle < _MOST_IDLE)
    yield Line(f"{speed.name}: manager's time for a batch", f"{speed.manager_us:,.0f} us")
    recompiles = speed.num_recompiles
    yield Line(f"{speed.name}: recompiles", str(recompiles), "0", not recompiles)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the processor"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
