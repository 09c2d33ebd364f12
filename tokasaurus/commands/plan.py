"""``toka plan``: predicts how fast a model runs a workload on a device that need not be here.

    toka plan model=meta-llama/Llama-3.1-8B workload=prompt=1024,output=256,n=64 device=h200
    toka plan model=my_directory workload=trace.jsonl device=l4 gpus=4 price_per_hour=0.8

Of the model it reads config.json and, if they are there, the headers of the weights. ``planner``
does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tokasaurus.bench.output import table
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.launch.model_files import find_description
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.candidates import Candidate, Layout, Question, fitting
from tokasaurus.planner.demand import Demand, demand_of_shape
from tokasaurus.planner.devices import find_device

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
        help="prompt=1024,output=256,n=64,requests=100: the shape of a workload (also prefix,"
        " spread, max, rate)."
    )
    device: str = flag(help="Its name, such as h200, or a file that describes it, FILE.yaml.")
    gpus: int = flag(1, minimum=1, help="How many of these devices a machine has.")
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
    demand = demand_of_shape(config.workload, config.seed)
    facts = model_facts(find_description(config.model))
    question = Question(facts, device, config.gpus, config.flags, config.sizes)
    found = fitting(question)
    print(_what(question, demand))
    print(_fits(found))


def _what(question: Question, demand: Demand) -> str:
    facts, device = question.facts, question.device
    return (
        f"model: {facts.num_parameters / 1e9:.3g} billion parameters, {facts.num_layers} layers\n"
        f"workload: {demand.num_requests:,} requests, {demand.num_sequences:,} samples,"
        f" {demand.num_prompt_tokens:,} prompt tokens, {demand.num_output_tokens:,} to generate\n"
        f"device: {question.num_devices} x {device.name}\n"
    )


def _fits(found: dict[Layout, Candidate]) -> str:
    rows = [
        (str(layout), f"{each.kv_tokens:,}", each.slices.memory_plan.line.removeprefix("memory: "))
        for layout, each in found.items()
    ]
    return table(("layout", "KV tokens of a replica", "each device"), rows)
