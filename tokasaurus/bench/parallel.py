"""``toka-bench parallel``: an engine of several processes against one with the same cores.

    toka-bench parallel                                  dp, pp and tp against one, five pairs each
    toka-bench parallel grids=1x2x1 repetitions=1 size=0.2

A grid is replicas x stages x ranks that share each layer. Every process computes with one thread,
and the engine that they are compared with has a thread for each of the largest grid's processes.
All engines load the model once, and then they take turns: in each repetition all of them run the
same requests, which no engine has seen before. A ratio is the median of the ratios of the
repetitions.

The model has random weights, so nothing is downloaded. Its heads can be shared by two ranks.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from tokasaurus.bench.flags import scale
from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.peers.checkpoint import SHAPES, cache_directory, make_checkpoint, make_once
from tokasaurus.bench.peers.processes import EngineProcess
from tokasaurus.bench.peers.workloads import WORKLOADS, Workload
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError

__all__ = ["SCHEMA", "ParallelConfig", "run"]

_ONE = "1x1x1"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What to compare."""

    grids: tuple[str, ...] = flag(
        ("2x1x1", "1x2x1", "1x1x2"), help="Replicas x stages x ranks of a stage, such as 2x1x1."
    )
    workload: str = flag("mixed", choices=tuple(WORKLOADS), help="What the engines run.")
    dtype: str = flag("float32", choices=("float32", "bfloat16"), help="Of weights and products.")
    repetitions: int = flag(5, minimum=1, help="How often each engine runs the workload.")
    size: float = flag(1.0, help="The number of requests, as a multiple of the usual number.")
    shape: str = flag(
        "smollm2-8-heads", choices=tuple(SHAPES), help="The model's shape; its weights are random."
    )
    kv_cache_num_tokens: int = flag(
        65536, minimum=1, help="Tokens of the KV cache of the one engine. Replicas share them."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        scale(self.size)
        for grid in self.grids:
            _sizes(grid)


SCHEMA = Schema(
    target=ParallelConfig,
    program="toka-bench parallel",
    summary="An engine of several processes against one, on the same cores.",
    examples=("toka-bench parallel", "toka-bench parallel grids=1x2x1 repetitions=1 size=0.2"),
)


def run(config: ParallelConfig) -> None:
    """Measures and prints the results."""
    checkpoint = cache_directory() / config.shape / "checkpoint"
    if not checkpoint.is_dir():
        progress(f"making a checkpoint in {checkpoint}")
        make_once(checkpoint, partial(make_checkpoint, SHAPES[config.shape]))
    names = (_ONE, *config.grids)
    num_threads = max(prod(_sizes(grid)) for grid in config.grids)
    with contextlib.ExitStack() as stack:
        engines = []
        for name in names:
            progress(f"starting {name}")
            settings = _settings(config, name, num_threads, checkpoint)
            engine = stack.enter_context(EngineProcess(sys.executable, settings))
            engine.await_ready()
            engines.append(engine)
        seconds, tokens = _measure(config, names, engines)
    _report(names, seconds, tokens)


def _sizes(grid: str) -> tuple[int, ...]:
    """Replicas, stages and ranks. Raises ConfigError if that cannot be read."""
    sizes = grid.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"grids={grid}: expected replicas x stages x ranks, such as 2x1x1")
    return tuple(map(int, sizes))


def _settings(
    config: ParallelConfig, grid: str, num_threads: int, checkpoint: Path
) -> dict[str, Any]:
    dp, pp, tp = _sizes(grid)
    return {
        "engine": "tokasaurus",
        "model": str(checkpoint),
        "device": "cpu",
        "dtype": config.dtype,
        "max_seqs": 256,
        "batch_tokens": 2048,
        "cache_tokens": config.kv_cache_num_tokens // dp // 16 * 16,
        "flags": {
            "dp_size": dp,
            "pp_size": pp,
            "tp_size": tp,
            "cpu_threads": num_threads if grid == _ONE else 1,
        },
        "products": False,
    }


def _measure(
    config: ParallelConfig, names: Sequence[str], engines: Sequence[EngineProcess]
) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of each engine, and tokens, of each repetition."""
    workload = Workload(config.workload, SHAPES[config.shape].vocab_size, config.size)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens = []
    pairs = list(zip(names, engines, strict=True))
    for repetition in range(config.repetitions):
        requests = workload.requests()
        tokens.append(sum(each.max_tokens * each.n for each in requests))
        # Each engine is first, and each is last, about equally often.
        shift = repetition % len(pairs)
        for name, engine in (*pairs[shift:], *pairs[:shift]):
            seconds[name].append(engine.run(requests))
            progress(
                f"{repetition + 1}/{config.repetitions}: {name}"
                f" {tokens[-1] / seconds[name][-1]:,.0f} tokens/s"
            )
    return seconds, tokens


def _report(names: Sequence[str], seconds: dict[str, list[float]], tokens: Sequence[int]) -> None:
    rows, ratios = [], {}
    for name in names:
        rates = [count / each for count, each in zip(tokens, seconds[name], strict=True)]
        each_ratio = [one / own for one, own in zip(seconds[_ONE], seconds[name], strict=True)]
        ratios[name] = statistics.median(each_ratio)
        rows.append(
            (
                name,
                f"{statistics.median(rates):,.0f}",
                f"{ratios[name]:.2f}",
                f"{min(each_ratio):.2f} to {max(each_ratio):.2f}",
            )
        )
    print(markdown_table(("replicas x stages x ranks", "tokens/s", "of one", "range"), rows))
    print_json({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}})
