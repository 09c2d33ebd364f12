"""``toka-bench peers``: ours against other engines, on the same workloads, in the same run.

    toka-bench peers vllm=~/vllm/bin/python openvino=~/openvino/bin/python
    toka-bench peers vllm=~/vllm/bin/python workloads=mixed dtypes=bfloat16 size=0.3
    toka-bench peers int8=T workloads=mixed            ours alone, with and without int8 weights
    toka-bench peers output=peers.json repetitions=0 plot=docs/images/peers.svg   draws a file only
    toka-bench peers device=cuda vllm=~/vllm/bin/python sglang=~/sglang/bin/python size=64
    toka-bench peers device=cuda vllm=~/vllm/bin/python dry_run=T                 what it would do

=========  ======================================================================================
mixed      96 prompts with nothing in common, log-normal lengths
repeated   4 long prompts with a common prefix, 32 samples of each, asked for as n=32
separate   the same as 128 requests
single     one request alone, 128 tokens in and 128 out: its latency
=========  ======================================================================================

Each peer has a Python of its own. Each engine loads the model once in each dtype, and then the
engines take turns: in each repetition all of them run the same requests, which no engine has seen
before. A ratio is the median of the ratios of the repetitions. All engines sample at temperature 1,
use all cores, hold at most 256 sequences, 2,048 tokens a batch and caches of the same size.

*What products alone allow*: after the last repetition, the matrix products of the batches that
just ran are replayed alone in the same process; their share is that time divided by the run's.

With device=cuda ours runs in its own processes, the products alone are those of a roofline that is
measured on the spot (``loads.bound_s``), and all engines hold more sequences.
docs/performance.md says how to install a peer.

The model has random weights, so nothing is downloaded. It is kept, with its export for OpenVINO, in
``$XDG_CACHE_HOME/tokasaurus/bench``.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tokasaurus.bench.flags import scale
from tokasaurus.bench.output import print_json, progress
from tokasaurus.bench.peers.checkpoint import (
    SHAPES,
    cache_directory,
    make_checkpoint,
    make_once,
)
from tokasaurus.bench.peers.loads import Rates, bound_s
from tokasaurus.bench.peers.processes import EngineProcess, driver_command, export_openvino
from tokasaurus.bench.peers.results import Measurement, Results
from tokasaurus.bench.peers.workloads import WORKLOADS, Workload
from tokasaurus.bench.plot import check_plot
from tokasaurus.bench.roofline import RooflineConfig, matrix_gflop_per_s, memory_gb_per_s
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError

__all__ = ["SCHEMA", "PeersConfig", "run"]

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}

# Sequences, and tokens of a batch, of every engine: on a CPU as in the engines' defaults.
_LIMITS = {"cpu": (256, 2048), "cuda": (4096, 16384)}
_OURS, _INT8 = "tokasaurus", "int8"


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """What to compare."""

    device: str = flag("cpu", choices=tuple(_DTYPES), help="That all engines run on.")
    vllm: str | None = flag(None, help="The Python that vLLM is installed in. None: without it.")
    openvino: str | None = flag(
        None,
        help=(
            "The Python that OpenVINO GenAI and optimum-intel are installed in. None: without them."
        ),
    )
    sglang: str | None = flag(
        None, help="The Python that SGLang is installed in, with device=cuda. None: without it."
    )
    int8: bool = flag(False, help="Also run ours with quantization=int8, as one more engine.")
    workloads: tuple[str, ...] = flag(
        tuple(WORKLOADS), choices=tuple(WORKLOADS), help="What the engines run."
    )
    dtypes: tuple[str, ...] | None = flag(
        None,
        choices=tuple(_ELEMENT_BYTES),
        help="Of weights and products.",
        usually="float32,bfloat16",
        adapts="bfloat16 with device=cuda",
    )
    repetitions: int = flag(
        5, minimum=0, help="How often each engine runs each workload. 0: show what output has."
    )
    size: float = flag(1.0, help="The number of requests, as a multiple of the usual number.")
    shape: str | None = flag(
        None,
        choices=tuple(SHAPES),
        help="The model's shape; its weights are random.",
        usually="smollm2-135m",
        adapts="llama-1b with device=cuda",
    )
    cache_gib: int | None = flag(
        None,
        minimum=1,
        help="GiB of each engine's KV cache.",
        usually="4",
        adapts="64 with device=cuda",
    )
    dry_run: bool = flag(False, help="Print what would be run, and run nothing.")
    flags: tuple[str, ...] = flag(
        (), help="Further flags of our engine, such as flags=linear=plain,use_hydragen=F."
    )
    output: str = flag(
        "",
        may_be_empty=True,
        help=(
            "A file of JSON for the results. What it already has of other workloads and dtypes"
            " stays there."
        ),
    )
    plot: str = flag(
        "", may_be_empty=True, help="The file of an SVG with a bar for each engine and workload."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        scale(self.size)
        for text in self.flags:
            if "=" not in text:
                raise ConfigError(f"flags={text}: expected key=value")
        if self.device == "cuda":
            for name in ("openvino", "int8"):
                if getattr(self, name):
                    raise ConfigError(f"{name} runs on device=cpu only; leave it or device out")
        elif self.sglang is not None:
            raise ConfigError(
                "sglang is compared with device=cuda only; set it, or leave sglang out"
            )
        if not self.repetitions and not self.output:
            raise ConfigError("repetitions=0 shows the results of a file; name it with output=FILE")


SCHEMA = Schema(
    target=PeersConfig,
    program="toka-bench peers",
    summary="Ours against other engines, on the same workloads, in the same run.",
    examples=(
        "toka-bench peers vllm=~/vllm/bin/python openvino=~/openvino/bin/python",
        "toka-bench peers vllm=~/vllm/bin/python workloads=mixed dtypes=bfloat16 size=0.3",
        "toka-bench peers output=peers.json repetitions=0 plot=peers.svg",
        "toka-bench peers device=cuda vllm=~/vllm/bin/python sglang=~/sglang/bin/python size=64",
    ),
)


@dataclass(frozen=True)
class _Installed:
    """An engine to run.

    Attributes:
        name: of the engine.
        python: that it is installed in.
        model: the directory that it loads.
    """

    name: str
    python: str
    model: Path


def run(config: PeersConfig) -> None:
    """Measures and prints the results."""
    if config.plot:
        check_plot(config.plot)
    config = _adapted(config)
    engines = list(_installed(config))
    if config.dry_run:
        print("\n".join(_plan(config, engines)))
        return
    results = Results.read(config.output)
    if config.repetitions:
        rates = _rates(config)
        _make_models(config, engines)
        for dtype in config.dtypes or ():
            _measure(config, dtype, engines, results, rates.get(dtype))
    print(results.tables())
    if config.plot:
        results.plot(config.plot)
    print_json(results.as_json())


def _adapted(config: PeersConfig) -> PeersConfig:
    """The same, with what adapts to the device."""
    on_cuda = config.device == "cuda"
    return replace(
        config,
        dtypes=config.dtypes or _DTYPES[config.device],
        shape=config.shape or ("llama-1b" if on_cuda else "smollm2-135m"),
        cache_gib=config.cache_gib or (64 if on_cuda else 4),
    )


def _plan(config: PeersConfig, engines: Sequence[_Installed]) -> Iterator[str]:
    """The commands, and how often each engine runs each workload."""
    for dtype in config.dtypes or ():
        for engine in engines:
            yield shlex.join(driver_command(engine.python, _settings(config, engine, dtype)))
        for name in config.workloads:
            workload = Workload(name, SHAPES[config.shape or ""].vocab_size, config.size)
            requests = workload.requests()
            tokens = sum(each.max_tokens * each.n for each in requests)
            yield (
                f"{config.repetitions} times each: {name} in {dtype}, {len(requests):,} requests,"
                f" {sum(each.n for each in requests):,} completions, {tokens:,} tokens"
            )


def _rates(config: PeersConfig) -> dict[str, Rates]:
    """Of the device in each dtype; none on a CPU, where the products are measured."""
    if config.device == "cpu":
        return {}
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; dry_run=T needs none")
    progress("measuring the device")
    roofline = RooflineConfig(device=config.device)
    read = 1e9 * memory_gb_per_s(roofline)
    return {
        dtype: Rates(1e9 * matrix_gflop_per_s(roofline, dtype), read)
        for dtype in config.dtypes or ()
    }


def _installed(config: PeersConfig) -> Iterator[_Installed]:
    """The engines that the flags name, ours first. Raises ConfigError if one is not there."""
    directory = cache_directory() / (config.shape or "")
    yield _Installed(_OURS, sys.executable, directory / "checkpoint")
    if config.int8:
        yield _Installed(_INT8, sys.executable, directory / "checkpoint")
    models = {"vllm": "checkpoint", "sglang": "checkpoint", "openvino": "openvino"}
    for name, model in models.items():
        path = getattr(config, name)
        if path is None:
            continue
        python = Path(path).expanduser()
        if not python.is_file():
            raise ConfigError(f"{name}={path}: there is no such file; give the path of a Python")
        yield _Installed(name, str(python), directory / model)


def _make_models(config: PeersConfig, engines: Sequence[_Installed]) -> None:
    """Makes what the engines load, if it is not there yet."""
    checkpoint = engines[0].model
    if not checkpoint.is_dir():
        progress(f"making a checkpoint in {checkpoint}")
        make_once(checkpoint, partial(make_checkpoint, SHAPES[config.shape or ""]))
    for engine in engines:
        if engine.name == "openvino" and not engine.model.is_dir():
            progress(f"exporting it for OpenVINO to {engine.model}")
            make_once(engine.model, partial(export_openvino, engine.python, checkpoint))


def _measure(
    config: PeersConfig,
    dtype: str,
    engines: Sequence[_Installed],
    results: Results,
    rates: Rates | None,
) -> None:
    """Runs all workloads in one dtype, and adds them to the results."""
    with contextlib.ExitStack() as stack:
        running = []
        # One after the other: two compilers at a time take more memory and no less time.
        for engine in engines:
            compiles = ", which compiles" if engine.name == "vllm" else ""
            progress(f"{dtype}: starting {engine.name}{compiles}")
            settings = _settings(config, engine, dtype)
            process = stack.enter_context(EngineProcess(engine.python, settings))
            process.await_ready()
            results.versions[process.name] = process.version
            running.append(process)
        for name in config.workloads:
            workload = Workload(name, SHAPES[config.shape or ""].vocab_size, config.size)
            results.add(_measure_workload(config, dtype, workload, running, rates))
            results.write(config.output)


def _measure_workload(
    config: PeersConfig,
    dtype: str,
    workload: Workload,
    engines: Sequence[EngineProcess],
    rates: Rates | None,
) -> Measurement:
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    ours = engines[0]
    for repetition in range(config.repetitions):
        requests = workload.requests()
        tokens = sum(each.max_tokens * each.n for each in requests)
        # Each engine is first, and each is last, about equally often.
        shift = repetition % len(engines)
        for engine in (*engines[shift:], *engines[:shift]):
            seconds[engine.name].append(engine.run(requests))
            progress(
                f"{dtype} {workload.name} {repetition + 1}/{config.repetitions}: {engine.name}"
                f" {tokens / seconds[engine.name][-1]:,.0f} tokens/s"
            )
    progress(f"{dtype} {workload.name}: the products alone")
    # Directly before them, so that both meet the same machine.
    requests = workload.requests()
    run_s = ours.run(requests)
    if rates is None:
        products_s = ours.products(5)
    else:
        shape, max_seqs = SHAPES[config.shape or ""], _LIMITS[config.device][0]
        products_s = bound_s(shape, _ELEMENT_BYTES[dtype], requests, max_seqs, rates, shares=True)
    return Measurement(
        dtype=dtype,
        workload=workload.name,
        size=config.size,
        shape=config.shape or "",
        tokens=tokens,
        seconds=seconds,
        products_s=products_s,
        products_run_s=run_s,
        flags=config.flags,
        date=time.strftime("%Y-%m-%d"),
    )


def _settings(config: PeersConfig, engine: _Installed, dtype: str) -> dict[str, object]:
    cache_gib = config.cache_gib or 0
    cache_bytes = cache_gib << 30
    token_bytes = SHAPES[config.shape or ""].kv_bytes(_ELEMENT_BYTES[dtype])
    max_seqs, batch_tokens = _LIMITS[config.device]
    flags = dict(text.split("=", 1) for text in config.flags)
    if engine.name == _INT8:
        flags["quantization"] = "int8"
    return {
        "engine": engine.name,
        "model": str(engine.model),
        "dtype": dtype,
        "device": config.device,
        "max_seqs": max_seqs,
        "batch_tokens": batch_tokens,
        "cache_gib": cache_gib,
        "cache_tokens": cache_bytes // token_bytes // 16 * 16,
        "flags": flags,
        "products": config.device == "cpu",
    }
