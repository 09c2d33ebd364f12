"""How fast a device serves, and how fast it could: part of ``make gpu-check``.

A model with random weights runs in the engine's own processes: a manager, a worker, and the text
core here. Two loads run one after the other:

repeated   8 prompts, many samples of each: once with prefixes read once, and once without
chat       prompts with nothing in common, of log-normal lengths

*Roofline*: the seconds that a device would take which multiplies and reads all the time, one after
the other, each at the rate that was measured on the spot. Products are those of all rows, attention
is over all positions. Reading is the weights once for each step, keys and values of each sequence
once for each of its steps, and those of a shared prompt once for all of its samples. Steps are as
few as the number of sequences that may run allows.

*Idle*: the share of the time with batches in flight in which no batch was on the device, by the
device's own clock. A batch counts from the moment its first work is enqueued. Where nvidia-smi
runs, it says how long kernels ran, and the larger share counts.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokasaurus import SamplingParams
from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.peers.checkpoint import SHAPES, Shape, make_without_weights
from tokasaurus.bench.peers.workloads import Request, Workload
from tokasaurus.bench.roofline import RooflineConfig, matrix_gflop_per_s, memory_gb_per_s
from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.replicated import ReplicatedEngine
from tokasaurus.protocol.messages import Statistics
from tokasaurus.rounding import ceil_div

__all__ = ["SIZES", "Rates", "Size", "Speed", "bound_s", "measure_rates", "measure_speeds"]

_WIDTHS = {"float32": 4, "bfloat16": 2}
_PAGE = 16
_LONGEST_CHAT = 1024
_STATISTICS_S = 5.0
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
class Rates:
    """Of a device.

    Attributes:
        flops: a second, of products.
        bytes: a second.
    """

    flops: float
    bytes: float


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


def bound_s(
    shape: Shape,
    width: int,
    requests: list[Request],
    max_seqs: int,
    rates: Rates,
    *,
    shares: bool,
) -> float:
    """The seconds of the roofline.

    Args:
        shape: of the model.
        width: bytes of a number.
        requests: what runs.
        max_seqs: sequences that may run together.
        rates: of the device.
        shares: the keys and values of a prompt are read once for all of its samples.
    """
    head = shape.hidden_size * shape.vocab_size
    parameters = sum(a * b for a, b, *_ in (each for each in shape.tensors().values() if each[1:]))
    layers = parameters - head  # the head has the embedding's weights
    rows = draws = pairs = positions = 0
    for request in requests:
        prompt, new, n = len(request.prompt), request.max_tokens, request.n
        rows += prompt + n * (new - 1)
        draws += n * new
        own = n * new * (new - 1) // 2
        pairs += prompt * (prompt + 1) // 2 + n * (new - 1) * prompt + own
        positions += own + (1 if shares else n) * (new - 1) * prompt
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
    flops = 2 * (layers * rows + head * draws) + attention
    sequences = sum(request.n for request in requests)
    steps = max(
        ceil_div(draws, min(sequences, max_seqs)), max(each.max_tokens for each in requests)
    )
    num_bytes = steps * parameters * width + positions * shape.kv_bytes(width)
    return flops / rates.flops + num_bytes / rates.bytes


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
        with _engine(device, size, directory, shares=shares) as engine:
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


@contextmanager
def _engine(
    device: str, size: Size, directory: Path, *, shares: bool
) -> Iterator[ReplicatedEngine]:
    config = EngineConfig(
        model=str(directory),
        device=device,
        dtype=size.dtype,
        load_format="dummy",
        kv_cache_num_tokens=size.kv_tokens,
        page_size=_PAGE,
        max_seqs_per_forward=size.max_seqs,
        max_tokens_per_forward=size.batch_tokens,
        torch_compile=size.compiles,
        use_hydragen=None if shares else False,
        max_n=size.num_samples,
        log_level="WARNING",
    )
    engine = ReplicatedEngine(assemble(config))
    try:
        yield engine
    finally:
        engine.close()


def _measure(
    engine: ReplicatedEngine, device: str, name: str, requests: list[Request], bound: float
) -> Speed:
    # What the first requests load is no part of it.
    _run(engine, [Request(requests[0].prompt[:8], 2, 2)])
    before, pid = _statistics(engine, 0), _manager_pid(engine)
    cpu_s = process_cpu_s(pid)
    with _busy_shares(device) as shares:
        seconds, num_tokens = _run(engine, requests)
    after = _statistics(engine, before.num_generated_tokens + num_tokens)
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


def _run(engine: ReplicatedEngine, requests: list[Request]) -> tuple[float, int]:
    """Runs requests that all come at once. Returns seconds, and generated tokens."""
    prepared = [
        engine.prepare(
            request.prompt,
            SamplingParams(
                max_tokens=request.max_tokens, n=request.n, temperature=1.0, ignore_eos=True
            ),
        )
        for request in requests
    ]
    started = time.perf_counter()
    changed: list[int] = []
    generations = [
        engine.generations.start(each, on_change=partial(changed.append, number))
        for number, each in enumerate(prepared)
    ]
    unfinished = set(range(len(generations)))
    while unfinished:
        engine.step()
        for number in changed:
            if (error := generations[number].error) is not None:
                raise error
            if generations[number].finished:
                unfinished.discard(number)
        changed.clear()
    seconds = time.perf_counter() - started
    return seconds, sum(request.max_tokens * request.n for request in requests)


def _statistics(engine: ReplicatedEngine, least_tokens: int) -> Statistics:
    """The manager's last figures of a load, which it sends when it rests."""
    deadline = time.monotonic() + _STATISTICS_S
    while time.monotonic() < deadline:
        engine.step()
        found = engine.generations.statistics
        is_late = found is None or found.num_generated_tokens < least_tokens
        if found is not None and not is_late and not found.num_running:
            return found
    raise TimeoutError(f"the manager did not report {least_tokens} tokens")


def _manager_pid(engine: ReplicatedEngine) -> int:
    for member in engine._supervisor._members:
        if member.role.kind == "manager" and member.process is not None:
            return member.process.pid
    raise AssertionError("there is no process of the manager")


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
