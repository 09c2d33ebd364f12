"""``toka-bench peers``: ours against other engines, on the same workloads, in the same run.

    toka-bench peers vllm=~/vllm/bin/python openvino=~/openvino/bin/python
    toka-bench peers vllm=~/vllm/bin/python workloads=mixed dtypes=bfloat16 size=0.3
    toka-bench peers int8=T workloads=mixed            ours alone, with and without int8 weights
    toka-bench peers output=peers.json repetitions=0 plot=docs/images/peers.svg   draws a file only

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

The model has random weights, so nothing is downloaded. It is kept, with its export for OpenVINO, in
``$XDG_CACHE_HOME/tokasaurus/bench``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from tokasaurus.bench.peers.processes import EngineProcess, export_openvino
from tokasaurus.bench.peers.results import Measurement, Results
from tokasaurus.bench.peers.workloads import WORKLOADS, Workload
from tokasaurus.bench.plot import check_plot
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError

__all__ = ["SCHEMA", "PeersConfig", "run"]

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_OURS, _INT8 = "tokasaurus", "int8"


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """What to compare."""

    vllm: str | None = flag(None, help="The Python that vLLM is installed in. None: without it.")
    openvino: str | None = flag(
        None,
        help=(
            "The Python that OpenVINO GenAI and optimum-intel are installed in. None: without them."
        ),
    )
    int8: bool = flag(False, help="Also run ours with quantization=int8, as one more engine.")
    workloads: tuple[str, ...] = flag(
        tuple(WORKLOADS), choices=tuple(WORKLOADS), help="What the engines run."
    )
    dtypes: tuple[str, ...] = flag(
        tuple(_ELEMENT_BYTES), choices=tuple(_ELEMENT_BYTES), help="Of weights and products."
    )
    repetitions: int = flag(
        5, minimum=0, help="How often each engine runs each workload. 0: show what output has."
    )
    size: float = flag(1.0, help="The number of requests, as a multiple of the usual number.")
    shape: str = flag(
        "smollm2-135m", choices=tuple(SHAPES), help="The model's shape; its weights are random."
    )
    cache_gib: int = flag(4, minimum=1, help="GiB of each engine's KV cache.")
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
    engines = list(_installed(config))
    results = Results.read(config.output)
    if config.repetitions:
        _make_models(config, engines)
        for dtype in config.dtypes:
            _measure(config, dtype, engines, results)
    print(results.tables())
    if config.plot:
        results.plot(config.plot)
    print_json(results.as_json())


def _installed(config: PeersConfig) -> Iterator[_Installed]:
    """The engines that the flags name, ours first. Raises ConfigError if one is not there."""
    directory = cache_directory() / config.shape
    yield _Installed(_OURS, sys.executable, directory / "checkpoint")
    if config.int8:
        yield _Installed(_INT8, sys.executable, directory / "checkpoint")
    for name, model in (("vllm", "checkpoint"), ("openvino", "openvino")):
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
        make_once(checkpoint, partial(make_checkpoint, SHAPES[config.shape]))
    for engine in engines:
        if engine.name == "openvino" and not engine.model.is_dir():
            progress(f"exporting it for OpenVINO to {engine.model}")
            make_once(engine.model, partial(export_openvino, engine.python, checkpoint))


def _measure(
    config: PeersConfig, dtype: str, engines: Sequence[_Installed], results: Results
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
            workload = Workload(name, SHAPES[config.shape].vocab_size, config.size)
            results.add(_measure_workload(config, dtype, workload, running))
            results.write(config.output)


def _measure_workload(
    config: PeersConfig, dtype: str, workload: Workload, engines: Sequence[EngineProcess]
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
    return Measurement(
        dtype=dtype,
        workload=workload.name,
        size=config.size,
        shape=config.shape,
        tokens=tokens,
        seconds=seconds,
        products_s=ours.products(5),
        products_run_s=run_s,
        flags=config.flags,
        date=time.strftime("%Y-%m-%d"),
    )


def _settings(config: PeersConfig, engine: _Installed, dtype: str) -> dict[str, object]:
    cache_bytes = config.cache_gib << 30
    token_bytes = SHAPES[config.shape].kv_bytes(_ELEMENT_BYTES[dtype])
    flags = dict(text.split("=", 1) for text in config.flags)
    if engine.name == _INT8:
        flags["quantization"] = "int8"
    return {
        "engine": engine.name,
        "model": str(engine.model),
        "dtype": dtype,
        "cache_gib": config.cache_gib,
        "cache_tokens": cache_bytes // token_bytes // 16 * 16,
        "flags": flags,
        "products": True,
    }
