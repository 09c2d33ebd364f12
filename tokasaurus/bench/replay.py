"""``toka-bench replay``: runs a trace in virtual time, on a device that a cost model describes.

    toka-bench trace kind=chat out=chat.jsonl
    toka-bench replay chat.jsonl kv_cache_num_tokens='(64 * 1024)'
    toka-bench replay chat.jsonl cost=llama-8b-h100 max_seqs_per_forward=256 plot=use.svg
    toka-bench replay chat.jsonl cost=llama-8b-h100 pp_size=4 hop_ms=0.1

``planner.trace`` describes the lines of a trace, and ``planner.cost_model`` the formula of a cost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokasaurus.bench.output import print_json, table
from tokasaurus.bench.plot import Panel, check_plot, write_plot
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, flag
from tokasaurus.errors import ConfigError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.named_costs import cost_model
from tokasaurus.planner.pipeline import Stages
from tokasaurus.planner.replay import Timing, replay
from tokasaurus.planner.report import Report
from tokasaurus.planner.trace import TraceRequest, read_trace

__all__ = ["SCHEMA", "ReplayConfig", "ReplayFlags", "run", "summary"]


@dataclass(frozen=True, kw_only=True)
class ReplayFlags:
    """The flags of a replay besides those of an engine."""

    trace: str = flag(group="Replay", help="The file of the trace; see toka-bench trace.")
    cost: str = flag(
        "llama-1b-h100",
        group="Replay",
        help="The device's cost model: llama-1b-h100, llama-8b-h100, instant, fixed:SECONDS for"
        " each batch, or a file that toka-bench calibrate has written.",
    )
    manager_ms: float | None = flag(
        0.0,
        group="Replay",
        minimum=0,
        help="How long a turn of the manager takes.",
        adapts="as long as it takes here, which differs from run to run",
    )
    server_ms: float = flag(
        0.0,
        group="Replay",
        minimum=0,
        help="How long the server takes to acknowledge an update.",
    )
    hop_ms: float = flag(
        0.0,
        group="Replay",
        minimum=0,
        help="With pp_size over 1: the way from one of the equal stages to another.",
    )
    plot: str = flag(
        "",
        group="Replay",
        may_be_empty=True,
        help="The file of an SVG that draws cache use over time.",
    )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(EngineConfig, ReplayFlags):
    """A replay, and the engine that it runs on. The flags of the model have no effect."""


SCHEMA = Schema(
    target=ReplayConfig,
    program="toka-bench replay",
    summary="Run a trace in virtual time: the real manager, a simulated device.\n\n"
    "Takes the engine's flags, too.",
    examples=(
        "toka-bench replay chat.jsonl",
        "toka-bench replay chat.jsonl cost=llama-8b-h100 kv_cache_num_tokens='(64 * 1024)'",
    ),
)


def run(config: ReplayConfig) -> None:
    """Replays and prints the results."""
    timing = Timing(
        cost=cost_model(config.cost),
        manager_s=None if config.manager_ms is None else config.manager_ms / 1e3,
        server_s=config.server_ms / 1e3,
        stages=Stages.equal(config.pp_size, config.hop_ms / 1e3),
    )
    if config.plot:
        check_plot(config.plot)
    report = replay(_trace(config.trace), simulated_slices(config).replicas[0].manager, timing)
    values = summary(report)
    print(table(("", ""), list(values.items())))
    if config.plot:
        panel = Panel(config.trace, {"held by sequences": report.timeline})
        write_plot(config.plot, [panel])
    print_json(values)


def summary(report: Report) -> dict[str, Any]:
    """A report without its timeline, rounded to six digits."""
    values = {
        item.name: getattr(report, item.name)
        for item in dataclasses.fields(report)
        if item.name not in ("steady", "timeline")
    }
    if report.steady is not None:
        values |= {
            "steady_tokens_per_s": report.steady.tokens_per_s,
            "steady_bubble": report.steady.bubble,
        }
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in values.items()
    }


def _trace(name: str) -> list[TraceRequest]:
    try:
        with Path(name).open("rb") as file:
            return read_trace(file)
    except OSError as error:
        raise ConfigError(f"trace={name}: {error.strerror}") from None
