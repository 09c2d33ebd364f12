"""``toka plan``: predicts how fast a model runs a workload on a device that need not be here.

    toka plan model=meta-llama/Llama-3.1-8B workload=prompt=1024,output=256,n=64 device=h200
    toka plan model=my_directory workload=trace.jsonl device=l4 gpus=4 price_per_hour=0.8

Of the model it reads config.json and, if they are there, the headers of the weights. ``planner``
does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.commands.workload_flags import WorkloadFlags
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.launch.model_files import find_description
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.candidates import Question
from tokasaurus.planner.cost_file import read_cost
from tokasaurus.planner.cost_model import BatchWork, CostModel
from tokasaurus.planner.devices import find_device
from tokasaurus.planner.plan_report import PlanReport
from tokasaurus.planner.search import Search

__all__ = ["SCHEMA", "PlanConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig(WorkloadFlags):
    """What to plan. Of a repository, only the small files are downloaded."""

    device: str = flag(help="Its name, such as h200, or a file that describes it, FILE.yaml.")
    gpus: int = flag(1, minimum=1, help="How many of these devices a machine has.")
    cost: str | None = flag(
        None,
        help="A file of toka-bench calibrate: what batches cost on one device.",
        adapts="arithmetic with the numbers of the device",
    )
    price_per_hour: float | None = flag(
        None, minimum=0, help="Of one device, in any currency.", adapts="no prices"
    )
    output: str = flag("table", choices=("table", "json"), help="What to print.")
    simulations: int = flag(
        8,
        minimum=1,
        help="How many configurations are simulated, at most, besides the engine's defaults.",
    )
    max_s: float = flag(60.0, minimum=1, help="Seconds after which no simulation begins.")
    manager_ms: float = flag(
        0.5, minimum=0, help="A turn of the manager, while the device runs the batch before."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cost is not None and self.gpus != 1:
            raise ConfigError(f"cost={self.cost} is for one device; leave out gpus={self.gpus}")


SCHEMA = Schema(
    target=PlanConfig,
    program="toka plan",
    summary="Predict how fast a model would run a workload on a device, and with which flags.",
    examples=(
        "toka plan model=meta-llama/Llama-3.1-8B workload=prompt=512,output=256 device=h200",
        "toka plan workload=prompt=1024,output=512,n=64,requests=100 device=l4 gpus=4",
    ),
)


def run(config: PlanConfig) -> None:
    """Plans and prints."""
    device = find_device(config.device)
    if device.kind == "cpu" and config.gpus > 1:
        raise ConfigError(
            f"device={config.device} is a whole machine (kind: cpu); leave out gpus={config.gpus}"
        )
    facts = model_facts(find_description(config.model))
    demand = config.demand(facts)
    cost = None if config.cost is None else _measured_cost(config.cost)
    question = Question(facts, device, config.gpus, config.flags, config.sizes, cost)
    search = Search(
        question,
        demand,
        config.simulations,
        config.max_s,
        config.manager_ms / 1e3,
        progress,
    )
    report = PlanReport(search.run(), question, demand, config.model, config.price_per_hour)
    if config.output == "json":
        print_json(report.json)
    else:
        print("\n".join([*report.premises, ""]))
        print(table(report.heads, report.rows))
        print("\n".join(["", *report.notes, "", *report.conclusion, "", report.command]))


def _measured_cost(path: str) -> CostModel:
    cost = read_cost(path)
    if not cost.batch_s(BatchWork(num_decodes=1, num_decode_positions=1, num_draws=1)):
        raise ConfigError(
            f"cost={path}: a batch takes no time there; write it anew with toka-bench calibrate"
        )
    return cost
