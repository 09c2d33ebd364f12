"""``toka plan``: predicts how fast a model runs a workload on a device that need not be here.

    toka plan model=meta-llama/Llama-3.1-8B workload=prompt=1024,output=256,n=64 device=h200
    toka plan model=my_directory workload=trace.jsonl device=l4 gpus=4 price_per_hour=0.8

Of the model it reads config.json and, if they are there, the headers of the weights. ``planner``
does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.commands.batch_demand import batch_demand, is_batch_file
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.config.slices import ModelFacts
from tokasaurus.errors import ConfigError
from tokasaurus.launch.model_files import find_description
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.candidates import Question
from tokasaurus.planner.cost_file import read_cost
from tokasaurus.planner.demand import Demand, demand_of_shape, is_shape
from tokasaurus.planner.devices import find_device
from tokasaurus.planner.plan_report import PlanReport
from tokasaurus.planner.search import Search
from tokasaurus.planner.trace import read_trace

__all__ = ["SCHEMA", "PlanConfig", "run"]

_SIZES = ("dp_size", "tp_size", "pp_size")
# Flags of the engine that are taken as they are, if they are set.
_ENGINE = (
    "dtype",
    "page_size",
    "max_seqs_per_forward",
    "max_tokens_per_forward",
    "kv_cache_num_tokens",
    "max_num_tokens_per_request",
)
_DECIDED = "Decided already (a flag of the engine; otherwise the plan decides)"


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to plan."""

    model: str | None = flag(
        None,
        help="A directory, or a repository id, of which only the small files are downloaded.",
        adapts="the small bundled model",
    )
    workload: str = flag(
        help="A shape such as prompt=1024,output=256,n=64,requests=100 (also prefix, max, spread,"
        " rate); or the file of a trace (toka-bench trace), or of requests for toka-batch."
    )
    device: str = flag(help="Its name, such as h200, or a file that describes it, FILE.yaml.")
    gpus: int = flag(1, minimum=1, help="How many of these devices a machine has.")
    output_tokens: int | None = flag(
        None,
        minimum=1,
        help="What a sample generates, in the mean, if workload is a file of requests.",
        adapts="as many tokens as it may have",
    )
    cost: str | None = flag(
        None,
        help="A file of toka-bench calibrate: what batches cost on one device.",
        adapts="arithmetic with the numbers of the device",
    )
    price_per_hour: float | None = flag(
        None, minimum=0, help="Of one device, in any currency.", adapts="no prices"
    )
    output: str = flag("table", choices=("table", "json"), help="What to print.")
    simulations: int = flag(8, minimum=1, help="How many configurations are simulated, at most.")
    max_s: float = flag(60.0, minimum=1, help="Seconds after which no simulation begins.")
    manager_ms: float = flag(
        0.5, minimum=0, help="A turn of the manager, while the device runs the batch before."
    )
    seed: int = flag(0, minimum=0, help="The seed of lengths and arrivals.")
    dtype: str | None = flag(
        None, group=_DECIDED, choices=("float32", "bfloat16", "float16"), help="Precision."
    )
    dp_size: int | None = flag(None, group=_DECIDED, minimum=1, help="Replicas.")
    tp_size: int | None = flag(
        None, group=_DECIDED, minimum=1, help="Devices that share each layer."
    )
    pp_size: int | None = flag(None, group=_DECIDED, minimum=1, help="Stages of a pipeline.")
    page_size: int | None = flag(None, group=_DECIDED, minimum=1, help="Tokens of a page.")
    max_seqs_per_forward: int | None = flag(
        None, group=_DECIDED, minimum=1, help="Sequences that a replica runs at a time."
    )
    max_tokens_per_forward: int | None = flag(
        None, group=_DECIDED, minimum=1, help="Tokens of a batch."
    )
    kv_cache_num_tokens: int | Literal["auto"] | None = flag(
        None, group=_DECIDED, minimum=1, help="Tokens of a replica's KV cache."
    )
    max_num_tokens_per_request: int | None = flag(
        None, group=_DECIDED, minimum=1, help="Prompt and completion together."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cost is not None and self.gpus != 1:
            raise ConfigError(f"cost={self.cost} is for one device; leave out gpus={self.gpus}")

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the engine that are decided."""
        return {name: value for name in _ENGINE if (value := getattr(self, name)) is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layout that are decided."""
        return {name: size for name in _SIZES if (size := getattr(self, name)) is not None}


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
    facts = model_facts(find_description(config.model))
    demand = _demand(config, facts)
    cost = None if config.cost is None else read_cost(config.cost)
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


def _demand(config: PlanConfig, facts: ModelFacts) -> Demand:
    name = config.workload
    if is_shape(name):
        return demand_of_shape(name, config.seed)
    if is_batch_file(Path(name)):
        return batch_demand(Path(name), facts, config.output_tokens)
    try:
        with Path(name).open("rb") as file:
            return Demand(read_trace(file), name)
    except ConfigError as error:
        raise ConfigError(f"workload={name}: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"workload={name}: {error.strerror}; name a file, or give a shape such as"
            " prompt=1024,output=256"
        ) from None
