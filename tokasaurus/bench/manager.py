"""``toka-bench manager``: what the manager costs, in CPU time.

    toka-bench manager                    three sizes, easy mix; takes a minute
    toka-bench manager mix=full           with stop strings, logprobs, shared prefixes and aborts
    toka-bench manager quick=T            small and rough; takes seconds

Needs two quiet cores. ``manager_cost`` describes what is measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tokasaurus.bench.admission import measure_admission_ms
from tokasaurus.bench.cpu_time import loop_turn_ns, machine_line
from tokasaurus.bench.flags import counts
from tokasaurus.bench.manager_cost import (
    Effort,
    Setting,
    measure_reference,
    measure_start_finish,
    measure_steady,
)
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.bench.requests import MIXES
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.planner.named_costs import cost_model

__all__ = ["SCHEMA", "ManagerBenchConfig", "run"]

_PARTS = ("steady", "start_finish", "reference", "admission")
# Of admission.
_NUM_RUNNING, _NUM_WAITING, _HORIZONS = 4096, 10_000, (8_000, 131_072)

_QUICK_RUNNING = (64,)
_EFFORT = Effort(num_windows=3, steps=400, num_starts=2048, num_waves=4)
_QUICK_EFFORT = Effort(num_windows=1, steps=40, num_starts=64, num_waves=2)


@dataclass(frozen=True, kw_only=True)
class ManagerBenchConfig:
    """What to measure."""

    running: tuple[str, ...] = flag(
        ("1024", "4096", "8192"), help="How many sequences run together in steady decode."
    )
    reference_running: tuple[str, ...] = flag(
        ("1024", "4096"), help="How many sequences run together in the reference workload."
    )
    mix: str = flag(
        "easy",
        choices=MIXES,
        help="In the full mix, one of four requests has stop strings, one asks for logprobs and"
        " one for top logprobs. In steady decode, each of its prompts also begins with one of 16"
        " headers, which form prefix groups, and some requests are aborted.",
    )
    cost: str = flag("instant", help="The device's cost model: instant, fixed:SECONDS, ...")
    scheduling_steps_ahead: int = flag(8, minimum=1, help="The engine's flag of this name.")
    pp_size: int = flag(
        1,
        minimum=1,
        help="Stages of the device. With several, a batch serves one of pp_size + 1 lanes.",
    )
    parts: tuple[str, ...] = flag(_PARTS, choices=_PARTS, help="What to measure.")
    quick: bool = flag(False, help="Measure roughly: one small size and short windows.")

    def __post_init__(self) -> None:
        check_fields(self)
        cost_model(self.cost)
        self.sizes()
        self.reference_sizes()

    def sizes(self) -> tuple[int, ...]:
        """The sizes of steady decode."""
        return _QUICK_RUNNING if self.quick else counts("running", self.running)

    def reference_sizes(self) -> tuple[int, ...]:
        """The sizes of the reference workload."""
        sizes = counts("reference_running", self.reference_running)
        return _QUICK_RUNNING if self.quick else sizes


SCHEMA = Schema(
    target=ManagerBenchConfig,
    program="toka-bench manager",
    summary="CPU time of the real manager process, against a simulated device.",
    examples=(
        "toka-bench manager",
        "toka-bench manager mix=full running=4096 parts=steady",
        "toka-bench manager quick=T",
    ),
)


def run(config: ManagerBenchConfig) -> None:
    """Measures and prints the results."""
    setting = Setting(
        mix=config.mix,
        cost=config.cost,
        steps_ahead=config.scheduling_steps_ahead,
        effort=_QUICK_EFFORT if config.quick else _EFFORT,
        pp_size=config.pp_size,
    )
    turns = [loop_turn_ns()]
    results: dict[str, object] = {"mix": config.mix}
    if "steady" in config.parts:
        results["steady"] = _steady(setting, config.sizes())
    if "reference" in config.parts:
        results |= _reference(setting, config.reference_sizes())
    if "start_finish" in config.parts:
        results |= _start_finish(setting)
    if "admission" in config.parts:
        results |= _admission()
    turns.append(loop_turn_ns())
    print(f"\n{machine_line(turns)}")
    print_json({**results, "loop_turn_ns": [round(turn, 1) for turn in turns]})


def _steady(setting: Setting, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    rows = []
    for num_running in sizes:
        progress(f"steady decode of {num_running} sequences ...")
        rows.append(measure_steady(setting, num_running))
    print(f"\nSteady decode, {setting.mix} mix\n")
    print(
        table(
            ("running", "mean batch", "us/token", "lowest", "ms/batch", "batches/s"),
            [
                (
                    row.running,
                    f"{row.batch:.0f}",
                    f"{row.us_per_token:.3f}",
                    f"{row.lowest_us_per_token:.3f}",
                    f"{row.ms_per_step:.2f}",
                    f"{row.steps_per_s:.0f}",
                )
                for row in rows
            ],
        )
    )
    return [_rounded(dataclasses.asdict(row)) for row in rows]


def _reference(setting: Setting, sizes: tuple[int, ...]) -> dict[str, object]:
    costs = {}
    for num_running in sizes:
        progress(f"reference workload, {num_running} sequences at a time ...")
        costs[num_running] = measure_reference(setting, num_running)
    print("\nReference workload, 128 + 128 tokens, everything counted\n")
    rows = [
        (size, f"{cost.median_us:.3f}", f"{cost.lowest_us:.3f}") for size, cost in costs.items()
    ]
    print(table(("running", "us/token", "lowest"), rows))
    results = [
        {"running": size, "us_per_token": cost.median_us, "lowest_us_per_token": cost.lowest_us}
        for size, cost in costs.items()
    ]
    return {
        "reference_workload_us_per_token": round(max(cost.median_us for cost in costs.values()), 4),
        "reference_workload": [_rounded(result) for result in results],
    }


def _start_finish(setting: Setting) -> dict[str, object]:
    progress("starting and finishing sequences ...")
    separate, samples = measure_start_finish(setting)
    print("\nStart and finish of a sequence, prompt of 1,024 tokens\n")
    rows = [("separate requests", separate), ("samples of one", samples)]
    print(
        table(
            ("arriving as", "us/sequence", "lowest"),
            [(name, f"{cost.median_us:.1f}", f"{cost.lowest_us:.1f}") for name, cost in rows],
        )
    )
    return {
        "start_finish_us": round(max(separate.median_us, samples.median_us), 2),
        "start_finish_separate_us": round(separate.median_us, 2),
        "lowest_start_finish_separate_us": round(separate.lowest_us, 2),
        "start_finish_samples_us": round(samples.median_us, 2),
        "lowest_start_finish_samples_us": round(samples.lowest_us, 2),
    }


def _admission() -> dict[str, object]:
    progress("admission by forecast ...")
    costs = {
        horizon: measure_admission_ms(_NUM_RUNNING, _NUM_WAITING, horizon) for horizon in _HORIZONS
    }
    print(f"\nA round of admission: {_NUM_RUNNING} sequences running, {_NUM_WAITING} waiting\n")
    print(
        table(("horizon, steps", "ms"), [(steps, f"{cost:.2f}") for steps, cost in costs.items()])
    )
    return {
        "admission_ms": round(costs[_HORIZONS[0]], 3),
        "admission": [{"horizon": steps, "ms": round(cost, 3)} for steps, cost in costs.items()],
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
