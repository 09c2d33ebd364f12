"""``toka-bench replay``: a trace in virtual time, on a device that a cost model describes.

    toka-bench trace kind=chat out=chat.jsonl
    toka-bench replay chat.jsonl kv_cache_num_tokens='(64 * 1024)'
    toka-bench replay chat.jsonl cost=llama-8b-h100 max_seqs_per_forward=256 plot=use.svg

What a line of a trace may say stands in ``planner.trace``, the formula of a cost in ``planner.cost_model``.
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
from tokasaurus.planner.cost_model import cost_model
from tokasaurus.planner.replay import Timing, replay
from tokasaurus.planner.report import Report
from tokasaurus.planner.trace import TraceRequest, read_trace

__all__ = ["SCHEMA", "ReplayConfig", "ReplayFlags", "run", "summary"]


@dataclass(frozen=True, kw_only=True)
class ReplayFlags:
    """What a replay needs besides an engine's flags."""

    trace: str = flag(group="Replay", help="The file; toka-bench trace writes one.")
    cost: str = flag(
        "llama-1b-h100",
        group="Replay",
        help="The device: llama-1b-h100, llama-8b-h100, instant, or fixed:SECONDS a batch.",
    )
    manager_ms: float | None = flag(
        0.0,
        group="Replay",
        minimum=0,
        help="How long a step of the manager takes.",
        adapts="as long as it takes here, which differs from run to run",
    )
    server_ms: float = flag(
        0.0, group="Replay", minimum=0, help="From an update to the server's acknowledgement."
    )
    plot: str = flag(
        "", group="Replay", may_be_empty=True, help="An SVG of cache use over time to write."
    )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(EngineConfig, ReplayFlags):
    """A replay, and the engine it runs on; the model's flags mean nothing here."""


SCHEMA = Schema(
    target=ReplayConfig,
    program="toka-bench replay",
    summary="Run a trace in virtual time: the real manager, a simulated device. Takes the engine's flags too.",
    examples=(
        "toka-bench replay chat.jsonl",
        "toka-bench replay chat.jsonl cost=llama-8b-h100 kv_cache_num_tokens='(64 * 1024)'",
    ),
)


def run(config: ReplayConfig) -> None:
    """Replays and prints."""
    timing = Timing(
        cost=cost_model(config.cost),
        manager_s=None if config.manager_ms is None else config.manager_ms / 1e3,
        server_s=config.server_ms / 1e3,
    )
    if config.plot:
        check_plot(config.plot)
    report = replay(_trace(config.trace), simulated_slices(config).manager, timing)
    values = summary(report)
    print(table(("", ""), list(values.items())))
    if config.plot:
        panel = Panel(config.trace, {"held by sequences": report.timeline})
        write_plot(config.plot, [panel])
    print_json(values)


def summary(report: Report) -> dict[str, Any]:
    """A report without its timeline, rounded to what is worth reading."""
    values = {
        item.name: getattr(report, item.name)
        for item in dataclasses.fields(report)
        if item.name != "timeline"
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
