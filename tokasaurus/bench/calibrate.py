"""``toka-bench calibrate``: measures a cost model on this machine, for ``cost=FILE`` elsewhere.

    toka-bench calibrate model=DIR dtype=bfloat16 out=cost.yaml
    toka-bench replay chat.jsonl cost=cost.yaml

Batches of one kind at a time run in a worker of this process: few rows and many, short contexts
and long ones, prefix groups, kinds of draws. ``planner/cost_model.py`` has the formula. Then it
predicts batches that it was not fitted to, and says how far it is off.

Needs a machine that does nothing else, for about a minute with a small model on a CPU. The weights
do not matter: ``load_format=dummy`` makes random ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokasaurus.bench.machine import machine
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, flag
from tokasaurus.launch.processor import bound_spinning
from tokasaurus.planner.cost_file import CostFile, check_cost_file, write_cost

if TYPE_CHECKING:
    from tokasaurus.calibration.calibrate import Calibration

__all__ = ["SCHEMA", "CalibrateConfig", "CalibrateFlags", "calibrated", "print_held_out", "run"]


@dataclass(frozen=True, kw_only=True)
class CalibrateFlags:
    """The flags of a calibration besides those of an engine."""

    out: str = flag(group="Calibration", help="The file of YAML to write.")
    rounds: int = flag(
        3, group="Calibration", minimum=1, help="How often each batch is measured, twice in a row."
    )


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(EngineConfig, CalibrateFlags):
    """A calibration, and the engine whose batches are measured: its model, dtype and limits."""


SCHEMA = Schema(
    target=CalibrateConfig,
    program="toka-bench calibrate",
    summary="Measure a cost model on this machine.\n\nTakes the engine's flags, too.",
    examples=(
        "toka-bench calibrate out=cost.yaml",
        "toka-bench calibrate model=DIR dtype=bfloat16 load_format=dummy out=cost.yaml",
    ),
)


def run(config: CalibrateConfig) -> None:
    """Measures, writes the file and prints how good it is."""
    check_cost_file(config.out)
    result = calibrated(config, config.rounds)
    about = {
        "model": config.model or "the bundled model",
        "dtype": config.dtype,
        **machine(),
        "threads": config.cpu_threads or "torch's choice",
        "date": time.strftime("%Y-%m-%d"),
        "rounds": config.rounds,
        "spread": round(result.spread, 4),
        "other_work": round(result.other_work, 4),
    }
    write_cost(config.out, CostFile(about, result.cost))
    print_held_out(result)
    print_json(
        {
            "out": config.out,
            "error": round(result.cost.error, 4),
            "spread": round(result.spread, 4),
            "held_out": {each.name: round(each.wrong, 4) for each in result.held_out},
        }
    )


def calibrated(config: EngineConfig, rounds: int) -> Calibration:
    """Measures what batches of this engine cost.

    Raises:
        ConfigError: the engine has several workers, or its flags contradict one another.
        ModelError: the model cannot be served.
    """
    bound_spinning()  # as the workers of an engine do; before torch is imported
    from tokasaurus.calibration.calibrate import calibrate
    from tokasaurus.launch.assemble import assemble

    return calibrate(assemble(config).replicas[0], rounds, progress)


def print_held_out(result: Calibration) -> None:
    """Prints a table of the batches that the cost model was not fitted to."""
    rows = [
        (
            each.name,
            f"{each.measured_s * 1e3:.2f}",
            f"{each.predicted_s * 1e3:.2f}",
            f"{each.wrong:+.0%}",
        )
        for each in result.held_out
    ]
    print(table(("batch that was not fitted to", "ms", "predicted", "wrong by"), rows))
    print(f"error: {result.cost.error:.0%}; other work: {result.other_work:.0%} of the cores")
