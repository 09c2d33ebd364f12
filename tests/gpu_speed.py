"""How fast a device serves, and how fast it could: part of ``make gpu-check``.

A model with random weights runs in the engine's own processes: a manager, a worker, and the text
core here. There is an engine for each setup, and two loads run one after the other:

repeated   8 prompts, many samples of each
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
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.peers.checkpoint import SHAPES, Shape, make_without_weights
from tokasaurus.bench.peers.loads import LoadedEngine, Rates, bound_s, loaded_engine
from tokasaurus.bench.peers.workloads import Request, Workload
from tokasaurus.bench.roofline import RooflineConfig, matrix_gflop_per_s, memory_gb_per_s
from tokasaurus.rounding import ceil_div

__all__ = ["SETUPS", "SIZES", "Setup", "Size", "Speed", "measure_rates", "measure_speeds"]

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
        compiles: torch.compile is tried.
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
class Setup:
    """An engine that loads run in.

    Attributes:
        attention: of it.
        compiles: torch.compile is on.
        shares: prefixes are read once.
        loads: that run, one after the other.
    """

    attention: str
    compiles: bool = False
    shares: bool = True
    loads: tuple[str, ...] = ("repeated", "chat")

    @property
    def name(self) -> str:
        compiles = ", torch_compile=T" if self.compiles else ""
        return f"attention={self.attention}{compiles}"

    def name_of(self, load: str) -> str:
        """The name of a load here."""
        how = "" if load == "chat" else ", groups" if self.shares else ", no groups"
        return f"{load}{how}"


SETUPS: Mapping[str, Sequence[Setup]] = {
    # What is worth most comes first, since the time may be up before the last.
    "cuda": (
        Setup("triton"),
        Setup("flashinfer"),
        Setup("triton", compiles=True, loads=("repeated",)),
        Setup("flashinfer", compiles=True, loads=("repeated",)),
        Setup("triton", shares=False, loads=("repeated",)),
    ),
    "cpu": (Setup("auto"), Setup("auto", shares=False, loads=("repeated",))),
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
        setup: of the engine.
    """

    name: str
    tokens_per_s: float
    roofline: float
    idle: float
    manager_us: float
    num_batches: int
    num_recompiles: int
    setup: str = ""


def measure_rates(device: str, size: Size) -> Rates:
    """Measures the device."""
    config = RooflineConfig(device=device, matrix=size.matrix, memory_mib=size.memory_mib)
    return Rates(1e9 * matrix_gflop_per_s(config, size.dtype), 1e9 * memory_gb_per_s(config))


def measure_speeds(
    device: str, size: Size, rates: Rates, directory: Path, setup: Setup
) -> tuple[list[Speed], str | None]:
    """Runs the loads of an engine.

    Args:
        device: that the worker runs on.
        size: of the loads.
        rates: of the device.
        directory: for a model without weights; it exists.
        setup: of the engine.

    Returns:
        What has run, and why the rest has not; None if all has.
    """
    shape, width = SHAPES[size.shape], _WIDTHS[size.dtype]
    make_without_weights(shape, directory)
    requests = {
        "chat": Workload("mixed", shape.vocab_size, size.chat).requests(),
        # The repetitions of a workload differ in their ids.
        "repeated": _repeated(size, shape),
    }
    speeds: list[Speed] = []
    try:
        with loaded_engine(_flags(device, size, directory, setup)) as engine:
            for load in setup.loads:
                some = requests[load]
                bound = bound_s(shape, width, some, size.max_seqs, rates, shares=setup.shares)
                speeds.append(_measure(engine, device, setup, load, some, bound))
                print(f"{speeds[-1]}", flush=True)
    except Exception as error:
        traceback.print_exc()
        return speeds, f"{type(error).__name__}: {error}"
    return speeds, None


def _repeated(size: Size, shape: Shape) -> list[Request]:
    ids = Workload("repeated", shape.vocab_size)
    return [
        Request(ids._prompt(size.prompt_tokens), size.new_tokens, size.num_samples)
        for _ in range(size.num_prompts)
    ]


def _flags(device: str, size: Size, directory: Path, setup: Setup) -> dict[str, object]:
    return {
        "model": str(directory),
        "device": device,
        "dtype": size.dtype,
        "load_format": "dummy",
        "kv_cache_num_tokens": size.kv_tokens,
        "page_size": _PAGE,
        "max_seqs_per_forward": size.max_seqs,
        "max_tokens_per_forward": size.batch_tokens,
        "attention": setup.attention,
        "torch_compile": setup.compiles,
        "use_hydragen": None if setup.shares else False,
        "max_n": size.num_samples,
    }


def _measure(
    engine: LoadedEngine,
    device: str,
    setup: Setup,
    load: str,
    requests: list[Request],
    bound: float,
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
        name=setup.name_of(load),
        tokens_per_s=num_tokens / seconds,
        roofline=bound / seconds,
        idle=idle,
        manager_us=1e6 * cpu_s / num_batches,
        num_batches=num_batches,
        num_recompiles=after.num_recompiles,
        setup=setup.name,
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
    words = [
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        f"--loop-ms={_SAMPLE_MS}",
    ]
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
