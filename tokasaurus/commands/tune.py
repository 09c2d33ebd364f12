"""``toka tune``: finds good flags for a workload on this machine, by short runs of real engines.

    toka tune model=my_directory workload=prompt=512,output=128,n=16,requests=50 out=tuned.yaml
    toka config=tuned.yaml

It begins with the planner's best configuration, by rates that it measures here. What it has
measured lies beside the file, so that the same command goes on where another one was stopped.
"""

from __future__ import annotations

import datetime
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tokasaurus.bench.output import progress, table
from tokasaurus.calibration.other_work import QUIET
from tokasaurus.commands.workload_flags import WorkloadFlags
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.launch.model_files import find_model
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.candidates import Question
from tokasaurus.planner.demand import Demand
from tokasaurus.planner.search import Search
from tokasaurus.tuning.machine import Here, look_here
from tokasaurus.tuning.sizing import sized
from tokasaurus.tuning.space import coordinates_of, layouts_here, planned, start_of
from tokasaurus.tuning.trial_log import TrialLog
from tokasaurus.tuning.tuned_file import check_tuned, write_tuned
from tokasaurus.tuning.tuner import Result, Row, Tuner
from tokasaurus.version import __version__

__all__ = ["SCHEMA", "TuneConfig", "run"]

_PLAN_S = 30.0  # for simulations
_NUM_SIMULATIONS = 8


@dataclass(frozen=True, kw_only=True)
class TuneConfig(WorkloadFlags):
    """What to tune."""

    out: str = flag("tuned.yaml", help="The file to write, for toka config=FILE.")
    run_s: float = flag(
        10.0, minimum=0.1, help="Seconds that a run should take: a part of the workload that long."
    )
    repetitions: int = flag(2, minimum=1, help="Runs of each setting; the fastest counts.")
    max_s: float = flag(900.0, minimum=1, help="Seconds after which no trial begins.")
    fresh: bool = flag(False, help="Measure everything anew.")
    device: str = flag("auto", choices=("auto", "cpu", "cuda"), help="Where the model runs.")
    load_format: str = flag(
        "auto", choices=("auto", "dummy"), help="dummy: random weights; config.json is enough."
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=TuneConfig,
    program="toka tune",
    summary="Find good flags for a workload on this machine, by short runs of real engines.",
    examples=(
        "toka tune workload=prompt=512,output=128,n=16,requests=50",
        "toka tune model=my_directory workload=requests.jsonl out=tuned.yaml run_s=20",
        "toka config=tuned.yaml",
    ),
)


def run(config: TuneConfig) -> None:
    """Tunes, writes the file and prints a table."""
    out = Path(config.out)
    check_tuned(out)
    facts = model_facts(find_model(config.model), load_format=config.load_format)
    demand = config.demand(facts)
    progress("measuring how fast this machine multiplies and reads memory")
    here = look_here(EngineConfig.from_flags(device=config.device))
    decided = {**config.flags, "load_format": config.load_format}
    question = Question(facts, here.device, here.num_devices, decided, config.sizes)
    search = Search(planned(question), demand, _NUM_SIMULATIONS, _PLAN_S, progress=progress)
    plan = search.run()
    start = start_of(plan.best, here, {**decided, **config.sizes})
    tuner = Tuner(
        question=question,
        demand=demand,
        model=config.model,
        repetitions=config.repetitions,
        run_s=config.run_s,
        max_s=config.max_s,
        progress=progress,
    )
    path = out.with_name(f"{out.name}.trials")
    premises = _premises(config, here, demand)
    try:
        size = sized(path, premises, tuner, start, plan.best.tokens_per_s, fresh=config.fresh)
        log = TrialLog(path, {**premises, "num_sequences": size}, fresh=config.fresh)
        if log.num_found:
            progress(f"{path} has {log.num_found} trials of an earlier run")
        layouts = layouts_here(question, plan, here)
        coordinates = coordinates_of(start, layouts, here)
        part = demand.first(size)
        result = tuner.tune(start, coordinates, part, log)
    except KeyboardInterrupt:
        print("toka tune: stopped; the same command goes on from here", file=sys.stderr)
        raise
    _conclude(config, here, part, result)


def _conclude(config: TuneConfig, here: Here, part: Demand, result: Result) -> None:
    flags = {name: value for name, value in result.flags.items() if value is not None}
    if flags.get("load_format") == "auto":
        del flags["load_format"]
    if config.model is not None:
        flags = {"model": config.model, **flags}
    lines = _comments(config, here, part, result)
    write_tuned(Path(config.out), flags, lines)
    print(
        table(
            ("setting", "tokens/s", "of the defaults", "other work", "seconds of runs"),
            _rows(result),
        )
    )
    print("\n" + "\n".join(lines))
    print(f"\ntoka config={config.out}")


def _premises(config: TuneConfig, here: Here, demand: Demand) -> dict[str, Any]:
    """What measurements depend on, besides the flags of a trial."""
    trace = msgspec.json.encode(list(demand.trace))
    return {
        "version": __version__,
        "model": config.model,
        "load_format": config.load_format,
        "trace": hashlib.sha256(trace).hexdigest(),
        "machine": f"{here.num_devices} x {here.device.name}, {here.num_cores} cores",
        "repetitions": config.repetitions,
        "run_s": config.run_s,
    }


def _comments(config: TuneConfig, here: Here, part: Demand, result: Result) -> list[str]:
    """What the file says about itself."""
    today = datetime.date.today().isoformat()
    lines = [
        f"Measured by toka tune of version {__version__} on {today}.",
        f"machine: {here.line}",
        f"workload: {config.workload}; each run took {part.num_requests} requests,"
        f" {part.num_sequences} samples, {part.num_output_tokens} tokens to generate",
        f"measured: {result.best.measured.tokens_per_s:,.0f} generated tokens/s",
    ]
    own = result.defaults.measured
    rate = f"{own.tokens_per_s:,.0f}" if own.seconds else f"none ({own.problem})"
    lines.append(f"the engine's defaults: {rate}")
    other_work = max(result.best.measured.other_work, own.other_work)
    if other_work > QUIET:
        lines.append(
            f"other work took {other_work:.0%} of the cores meanwhile, so this may be chance;"
            " fresh=T measures anew"
        )
    if not result.is_complete:
        lines.append("the search has not ended: time ran out; the same command goes on")
    return lines


def _rows(result: Result) -> Sequence[Sequence[str]]:
    """The trials, the fastest first."""
    base = result.defaults.measured.tokens_per_s
    rows = sorted(result.rows, key=lambda row: -row.measured.tokens_per_s)
    return [_row(row, base) for row in rows]


def _row(row: Row, base: float) -> tuple[str, ...]:
    measured = row.measured
    if not measured.seconds:
        return row.name, "", "", "", measured.problem.partition("\n")[0][:80]
    share = f"{measured.tokens_per_s / base:.2f}" if base else ""
    seconds = ", ".join(f"{each:.2f}" for each in measured.seconds)
    other_work = f"{measured.other_work:.0%}"
    return row.name, f"{measured.tokens_per_s:,.0f}", share, other_work, seconds
