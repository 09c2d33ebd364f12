"""How fast a device serves, and how fast it could: part of ``make gpu-check``.

A model with random weights runs in the engine's own processes: a manager, a worker, and the text
core here. Two loads run one after the other:

repeated   8 prompts, many samples of each: once with prefixes read once, and once without
chat       prompts with nothing in common, of log-normal lengths

*Roofline*: what ``bound_s`` says, with rates that are measured on the spot.

*Idle*: the share of the time with batches in flight in which no batch was on the device, by the
device's own clock. A batch counts from the moment its first work is enqueued. Where nvidia-smi
runs, it says how long kernels ran, and the larger share counts.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.peers.checkpoint import SHAPES, Shape, make_without_weights
from tokasaurus.bench.peers.loads import LoadedEngine, Rates, bound_s, loaded_engine
from tokasaurus.bench.peers.workloads import Request, Workload
from tokasaurus.bench.roofline import RooflineConfig, matrix_gflop_per_s, memory_gb_per_s
from tokasaurus.rounding import ceil_div

__all__ = ["SIZES", "Size", "Speed", "measure_rates", "measure_speeds"]

_WIDTHS = {"float32": 4, "bfloat16": 2}
_PAGE = 16
_LONGEST_CHAT = 1024
_SAMPLE_MS = 100


@dataclass(frozen=True)
class Size:
    """What runs.

    Attributes:
        shape: of the model.
        dtype: of weights and products.
        num_prompts: of repeated sampling.
        num_samples: of each prompt.
        prompt_tokens: of each.
        new_tokens: of each sample.
        chat: the number of requests, as a multiple of 96.
        batch_tokens: of a batch, at most.
        compiles: torch.compile is on.
        roofline: what is measured.
    """

    shape: str
    dtype: str
    num_prompts: int
    num_samples: int
    prompt_tokens: int
    new_tokens: int
    chat: float
    batch_tokens: int
    compiles: bool
    matrix: int | None = None
    memory_mib: int | None = None

    @property
    def max_seqs(self) -> int:
        """That run together."""
        return self.num_prompts * self.num_samples

    @property
    def kv_tokens(self) -> int:
        """Room for all samples, with a page that each fills in part; and for any chat."""
        own = self.max_seqs * (ceil_div(self.new_tokens, _PAGE) + 1)
        shared = self.num_prompts * (ceil_div(self.prompt_tokens, _PAGE) + 1)
        return max((own + shared) * _PAGE, _LONGEST_CHAT)


SIZES = {
    "full": Size("llama-1b", "bfloat16", 8, 1024, 1024, 256, 64.0, 16384, compiles=True),
    "tiny": Size(
        "tiny", "float32", 2, 6, 40, 9, 0.02, 64, compiles=False, matrix=256, memory_mib=16
    ),
}


@dataclass(frozen=True)
class Speed:
    """What one load came to.

    Attributes:
        name: of the load.
        tokens_per_s: generated.
        roofline: the share of it.
        idle: share of the time; negative if unknown.
        manager_us: CPU time of the manager for a batch, in microseconds.
        num_batches: that ran.
        num_recompiles: while it ran.
    """

    name: str
    tokens_per_s: float
    roofline: float
    idle: float
    manager_us: float
    num_batches: int
    num_recompiles: int


def measure_rates(device: str, size: Size) -> Rates:
    """Measures the device."""
    config = RooflineConfig(device=device, matrix=size.matrix, memory_mib=size.memory_mib)
    return Rates(1e9 * matrix_gflop_per_s(config, size.dtype), 1e9 * memory_gb_per_s(config))


def measure_speeds(device: str, size: Size, rates: Rates, directory: Path) -> Iterator[Speed]:
    """Runs every load.

    Args:
        device: that the worker runs on.
        size: of the loads.
        rates: of the device.
        directory: for a model without weights.
    """
    shape, width = SHAPES[size.shape], _WIDTHS[size.dtype]
    make_without_weights(shape, directory)
    chat = Workload("mixed", shape.vocab_size, size.chat).requests()
    for shares in (True, False):
        with loaded_engine(_flags(device, size, directory, shares=shares)) as engine:
            # The repetitions of a workload differ in their ids.
            loads = [("repeated", _repeated(size, shape))]
            if shares:
                loads.append(("chat", chat))
            for name, requests in loads:
                bound = bound_s(shape, width, requests, size.max_seqs, rates, shares=shares)
                how = "" if name == "chat" else ", groups" if shares else ", no groups"
                yield _measure(engine, device, f"{name}{how}", requests, bound)


def _repeated(size: Size, shape: Shape) -> list[Request]:
    ids = Workload("repeated", shape.vocab_size)
    return [
        Request(ids._prompt(size.prompt_tokens), size.new_tokens, size.num_samples)
        for _ in range(size.num_prompts)
    ]


def _flags(device: str, size: Size, directory: Path, *, shares: bool) -> dict[str, object]:
    return {
        "model": str(directory),
        "device": device,
        "dtype": size.dtype,
        "load_format": "dummy",
        "kv_cache_num_tokens": size.kv_tokens,
        "page_size": _PAGE,
        "max_seqs_per_forward": size.max_seqs,
        "max_tokens_per_forward": size.batch_tokens,
        "torch_compile": size.compiles,
        "use_hydragen": None if shares else False,
        "max_n": size.num_samples,
    }


def _measure(
    engine: LoadedEngine, device: str, name: str, requests: list[Request], bound: float
) -> Speed:
    # What the first requests load is no part of it.
    engine.run([Request(requests[0].prompt[:8], 2, 2)])
    before, pid = engine.statistics(4), engine.manager_pid
    cpu_s = process_cpu_s(pid)
    with _busy_shares(device) as shares:
        seconds = engine.run(requests)
    num_tokens = sum(each.max_tokens * each.n for each in requests)
    after = engine.statistics(before.num_generated_tokens + num_tokens)
    cpu_s = process_cpu_s(pid) - cpu_s
    num_batches = after.num_batches - before.num_batches
    active_s = after.active_s - before.active_s
    idle = 1 - (after.device_s - before.device_s) / active_s
    if shares:
        idle = max(idle, 1 - statistics.median(shares))
    return Speed(
        name=name,
        tokens_per_s=num_tokens / seconds,
        roofline=bound / seconds,
        idle=idle,
        manager_us=1e6 * cpu_s / num_batches,
        num_batches=num_batches,
        num_recompiles=after.num_recompiles,
    )


@contextmanager
def _busy_shares(device: str) -> Iterator[list[float]]:
    """A list that gets the shares of time in which kernels ran, if nvidia-smi says them.

    Without the first and the last tenth: requests begin, and the last ones end.
    """
    shares: list[float] = []
    program = shutil.which("nvidia-smi")
    if device != "cuda" or program is None:
        yield shares
        return
    words = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"-lms={_SAMPLE_MS}"]
    process = subprocess.Popen(
        [program, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield shares
    finally:
        process.terminate()
        printed, _ = process.communicate()
    lines = [line.strip() for line in printed.splitlines()]
    found = [int(line) / 100 for line in lines if line.isdigit()]
    edge = len(found) // 10
    shares += found[edge : len(found) - edge]
