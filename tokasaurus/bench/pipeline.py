"""``toka-bench pipeline``: how busy the stages of a pipeline are, in virtual time.

    toka-bench pipeline                             1 to 8 stages, 0 to 2 buffer stages; minutes
    toka-bench pipeline pp_sizes=4 hop_ms=0.5       with a slow way between the stages
    toka-bench pipeline pp_sizes=4 last_stage=1.3   with a last stage that takes longer

The real manager plans for simulated devices. Each of them brings its part of the KV cache and of
the seats, so a pipeline runs more sequences than one device. What counts is the steady part of a
replay, while sequences wait for room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokasaurus.bench.flags import counts, scale
from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.pool import in_processes
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.named_costs import cost_model
from tokasaurus.planner.pipeline import Stages
from tokasaurus.planner.replay import Timing, replay
from tokasaurus.planner.report import SteadyPart
from tokasaurus.planner.workloads import WORKLOADS

__all__ = ["SCHEMA", "PipelineConfig", "run"]

_STEPS_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What to replay."""

    pp_sizes: tuple[str, ...] = flag(
        tuple("12345678"), help="Numbers of stages; one device is always the measure."
    )
    buffers: tuple[str, ...] = flag(
        ("0", "1", "2"), help="Values of pp_num_buffer_stages: lanes beyond one for each stage."
    )
    trace: str = flag("chat", choices=tuple(WORKLOADS), help="The workload; see toka-bench trace.")
    cost: str = flag("llama-8b-h100", help="The cost model of all stages together.")
    kv_cache_num_tokens: int = flag(65536, minimum=1, help="What each device adds to the KV cache.")
    max_seqs_per_forward: int = flag(128, minimum=1, help="What each device adds to the seats.")
    hop_ms: float = flag(0.0, minimum=0, help="The way from one stage to another.")
    last_stage: float = flag(
        1.0, minimum=0, help="How long the last stage takes, as a multiple of another one."
    )
    manager_ms: float = flag(0.0, minimum=0, help="How long a turn of the manager takes.")
    seed: int = flag(0, minimum=0, help="The seed of the trace.")
    size: float = flag(1.0, help="The size of the trace, as a multiple of the usual size.")
    jobs: int | None = flag(
        None,
        minimum=1,
        help="How many replays run at the same time.",
        adapts="the number of cores",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        scale(self.size)
        cost_model(self.cost)
        counts("pp_sizes", self.pp_sizes)
        if not all(text.isdecimal() for text in self.buffers):
            raise ConfigError(f"buffers={','.join(self.buffers)}: expected numbers such as 0,1,2")

    @property
    def cells(self) -> list[_Cell]:
        """What to replay: one device, then every pipeline with every number of buffer stages."""
        sizes = [size for size in counts("pp_sizes", self.pp_sizes) if size > 1]
        return [_Cell(1, 0)] + [_Cell(size, int(each)) for size in sizes for each in self.buffers]


SCHEMA = Schema(
    target=PipelineConfig,
    program="toka-bench pipeline",
    summary="Throughput and bubble of pipelines, in virtual time.",
    examples=(
        "toka-bench pipeline",
        "toka-bench pipeline pp_sizes=4,8 buffers=1 hop_ms=0.2 size=0.5",
    ),
)


@dataclass(frozen=True)
class _Cell:
    """One replay."""

    pp_size: int
    buffer_stages: int


@dataclass(frozen=True)
class _Task:
    """One replay, for a process of its own."""

    cell: _Cell
    config: PipelineConfig

    @property
    def name(self) -> str:
        return f"{self.cell.pp_size} stages, {self.cell.buffer_stages} buffer stages"


def run(config: PipelineConfig) -> None:
    """Replays everything and prints the results."""
    tasks = [_Task(cell, config) for cell in config.cells]
    parts: dict[_Cell, SteadyPart] = {}
    for task, part in in_processes(_replay, tasks, config.jobs):
        parts[task.cell] = part
        progress(f"{len(parts)}/{len(tasks)}: {task.name}")
    base = parts[_Cell(1, 0)].tokens_per_s
    rows = [_row(cell, parts[cell], base) for cell in config.cells]
    print(_table(rows))
    print_json({"pipelines": rows})


def _replay(task: _Task) -> SteadyPart:
    config, pp_size = task.config, task.cell.pp_size
    flags = EngineConfig.from_flags(
        kv_cache_num_tokens=pp_size * config.kv_cache_num_tokens,
        max_seqs_per_forward=pp_size * config.max_seqs_per_forward,
        pp_size=pp_size,
        pp_num_buffer_stages=task.cell.buffer_stages,
        # A replay measures no turns, so the manager always plans this far ahead.
        scheduling_steps_ahead=_STEPS_AHEAD,
    )
    last = [config.last_stage] if pp_size > 1 else []
    stages = Stages.of([1.0] * (pp_size - len(last)) + last, config.hop_ms / 1e3)
    timing = Timing(cost_model(config.cost), config.manager_ms / 1e3, stages=stages)
    manager = simulated_slices(flags).replicas[0].manager
    report = replay(WORKLOADS[config.trace](config.seed, config.size), manager, timing)
    if report.steady is None or not report.steady.tokens_per_s:
        raise ConfigError(
            f"size={config.size:g}: no sequence waits for room with {task.name};"
            " pass a larger size, or less room"
        )
    return report.steady


def _row(cell: _Cell, part: SteadyPart, base: float) -> dict[str, Any]:
    return {
        "pp_size": cell.pp_size,
        "buffer_stages": cell.buffer_stages,
        "tokens_per_s": round(part.tokens_per_s, 1),
        "of_one_device": round(part.tokens_per_s / base, 3),
        "bubble": round(part.bubble, 4),
        "slowest_stage_busy": round(max(part.stage_busy), 4),
        "steady_s": round(part.end_s - part.start_s, 2),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("stages", "buffer stages", "tokens/s", "of one device", "bubble", "slowest stage busy")
    return markdown_table(
        heads,
        [
            (
                row["pp_size"],
                row["buffer_stages"] if row["pp_size"] > 1 else "",
                f"{row['tokens_per_s']:.0f}",
                f"{row['of_one_device']:.2f}",
                f"{row['bubble']:.1%}",
                f"{row['slowest_stage_busy']:.1%}",
            )
            for row in rows
        ],
    )
