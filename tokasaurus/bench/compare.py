"""``toka-bench compare``: admission by forecast against two simpler policies, in virtual time.

    toka-bench compare                                 3 traces, 5 cache sizes, 3 policies
    toka-bench compare plot=docs/images/cache_use.svg  draws cache use at the middle size, too
    toka-bench compare policies=forecast,greedy traces=chat caches=65536 size=0.5

=========  ======================================================================================
forecast   the engine's defaults
reserve    admits a sequence only if its largest possible length fits, so it never preempts
greedy     admits whatever fits now, and preempts when the cache then runs out
=========  ======================================================================================

The same trace and flags give the same numbers on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokasaurus.bench.flags import counts, scale
from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.plot import Panel, check_plot, write_plot
from tokasaurus.bench.pool import in_processes
from tokasaurus.bench.replay import summary
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.named_costs import cost_model
from tokasaurus.planner.replay import Timing, replay
from tokasaurus.planner.report import Report
from tokasaurus.planner.trace import max_request_tokens
from tokasaurus.planner.workloads import WORKLOADS

__all__ = ["POLICIES", "SCHEMA", "CompareConfig", "run"]

# The engine's flags of each policy.
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "forecast": {},
    "reserve": {"use_spec_allocation": False},
    "greedy": {"spec_allocation_target_kv_cache_utilization": 1000.0},
}

# In tokens. The smallest holds a few of a trace's longest requests, the largest nearly all of it.
_CACHES = {
    "sampling": (16384, 32768, 65536, 131072, 262144),
    "chat": (16384, 32768, 65536, 131072, 262144),
    "reasoning": (32768, 65536, 131072, 262144, 524288),
}
_PAGE = 16


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare."""

    traces: tuple[str, ...] = flag(
        tuple(WORKLOADS), choices=tuple(WORKLOADS), help="Workloads; see toka-bench trace."
    )
    policies: tuple[str, ...] = flag(
        tuple(POLICIES), choices=tuple(POLICIES), help="How sequences are admitted."
    )
    caches: tuple[str, ...] | None = flag(
        None, help="Sizes of the KV cache, in tokens.", adapts="five for each trace"
    )
    cost: str = flag("llama-1b-h100", help="The device's cost model.")
    manager_ms: float = flag(0.0, minimum=0, help="How long a turn of the manager takes.")
    max_seqs_per_forward: int = flag(1024, minimum=1, help="The engine's flag of this name.")
    seed: int = flag(0, minimum=0, help="The seed of the traces.")
    size: float = flag(1.0, help="The size of each trace, as a multiple of the usual size.")
    jobs: int | None = flag(
        None,
        minimum=1,
        help="How many replays run at the same time.",
        adapts="the number of cores",
    )
    plot: str = flag(
        "",
        may_be_empty=True,
        help="The file of an SVG that draws cache use over time, at the middle size.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        scale(self.size)
        counts("caches", self.caches or ())
        cost_model(self.cost)

    def sizes(self, trace: str) -> tuple[int, ...]:
        """The cache sizes for a trace, in tokens."""
        return _CACHES[trace] if self.caches is None else counts("caches", self.caches)


SCHEMA = Schema(
    target=CompareConfig,
    program="toka-bench compare",
    summary="Admission by forecast against two simpler policies, in virtual time.",
    examples=(
        "toka-bench compare plot=docs/images/cache_use.svg",
        "toka-bench compare policies=forecast,greedy traces=chat size=0.1",
    ),
)


@dataclass(frozen=True, order=True)
class _Cell:
    """One replay."""

    trace: str
    cache_tokens: int
    policy: str


def run(config: CompareConfig) -> None:
    """Replays everything and prints the results."""
    cells = [
        _Cell(trace, tokens, policy)
        for trace in config.traces
        for tokens in config.sizes(trace)
        for policy in config.policies
    ]
    for cell in cells:
        _engine_flags(cell, config)  # if a flag is wrong, this raises before anything runs
    if config.plot:
        check_plot(config.plot)
    reports = _replay_all(cells, config)
    print(_table(config, reports))
    if config.plot:
        write_plot(config.plot, _panels(config, reports))
    print_json(
        {
            "cells": [
                {
                    "trace": cell.trace,
                    "cache_tokens": cell.cache_tokens,
                    "policy": cell.policy,
                    **summary(reports[cell]),
                }
                for cell in cells
            ],
            **_verdict(config, reports),
        }
    )


def _engine_flags(cell: _Cell, config: CompareConfig) -> EngineConfig:
    flags = {
        "kv_cache_num_tokens": cell.cache_tokens,
        "page_size": _PAGE,
        "max_seqs_per_forward": config.max_seqs_per_forward,
        **POLICIES[cell.policy],
    }
    try:
        return EngineConfig.from_flags(**flags)
    except ConfigError as error:
        raise ConfigError(f"policy {cell.policy}, cache of {cell.cache_tokens}: {error}") from None


@dataclass(frozen=True)
class _Task:
    """One replay, for a process of its own."""

    cell: _Cell
    config: CompareConfig


def _replay_all(cells: Sequence[_Cell], config: CompareConfig) -> dict[_Cell, Report]:
    """Replays all cells, in several processes if there are several cores."""
    tasks = [_Task(cell, config) for cell in cells]
    reports: dict[_Cell, Report] = {}
    for task, report in in_processes(_replay, tasks, config.jobs):
        cell = task.cell
        reports[cell] = report
        name = f"{cell.trace}, {cell.cache_tokens} tokens, {cell.policy}"
        progress(f"{len(reports)}/{len(cells)}: {name}")
    return reports


def _replay(task: _Task) -> Report:
    cell, config = task.cell, task.config
    trace = WORKLOADS[cell.trace](config.seed, config.size)
    longest = max_request_tokens(trace)
    if longest > cell.cache_tokens:
        raise ConfigError(
            f"caches={cell.cache_tokens}: the longest request of {cell.trace} has {longest} tokens"
        )
    manager = simulated_slices(_engine_flags(cell, config)).replicas[0].manager
    return replay(trace, manager, Timing(cost_model(config.cost), config.manager_ms / 1e3))


def _table(config: CompareConfig, reports: Mapping[_Cell, Report]) -> str:
    heads = ["trace", "cache tokens"]
    for policy in config.policies:
        heads += [f"{policy}: batch", "preempted", "makespan s"]
    rows: list[list[object]] = []
    for trace in config.traces:
        for tokens in config.sizes(trace):
            row: list[object] = [trace, tokens]
            for policy in config.policies:
                report = reports[_Cell(trace, tokens, policy)]
                row += [
                    f"{report.mean_batch_size:.1f}",
                    report.num_preemptions,
                    f"{report.makespan_s:.2f}",
                ]
            rows.append(row)
    return markdown_table(heads, rows)


def _verdict(config: CompareConfig, reports: Mapping[_Cell, Report]) -> dict[str, Any]:
    """How the makespans of the forecast compare with the best of the other policies."""
    others = [policy for policy in config.policies if policy != "forecast"]
    if not others or len(others) == len(config.policies):
        return {}
    worst = 0.0
    num_ahead = dict.fromkeys(config.traces, 0)
    for trace in config.traces:
        for tokens in config.sizes(trace):
            own = reports[_Cell(trace, tokens, "forecast")].makespan_s
            rivals = [reports[_Cell(trace, tokens, policy)].makespan_s for policy in others]
            worst = max(worst, own / min(rivals) - 1)
            num_ahead[trace] += own < min(rivals)
    return {"forecast_behind": round(worst, 5), "sizes_ahead_of_all": num_ahead}


def _panels(config: CompareConfig, reports: Mapping[_Cell, Report]) -> list[Panel]:
    panels = []
    for trace in config.traces:
        sizes = config.sizes(trace)
        tokens = sizes[len(sizes) // 2]
        lines = {
            policy: reports[_Cell(trace, tokens, policy)].timeline for policy in config.policies
        }
        panels.append(Panel(f"{trace}, {tokens} tokens", lines))
    return panels
