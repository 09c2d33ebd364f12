"""What ``toka plan`` and ``toka tune`` ask: a model, a workload, and flags that are decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokasaurus.commands.batch_demand import batch_demand, is_batch_file
from tokasaurus.config.schema import flag
from tokasaurus.config.slices import ModelFacts
from tokasaurus.errors import ConfigError
from tokasaurus.planner.demand import Demand, demand_of_shape, is_shape
from tokasaurus.planner.trace import read_trace

__all__ = ["WorkloadFlags"]

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
_DECIDED = "Decided already (flags of the engine; otherwise they are chosen)"


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """A model and a workload, and what is decided."""

    model: str | None = flag(
        None, help="A directory, or a repository id.", adapts="the small bundled model"
    )
    workload: str = flag(
        help="A shape such as prompt=1024,output=256,n=64,requests=100 (also prefix, max, spread,"
        " rate); or the file of a trace (toka-bench trace), or of requests for toka-batch."
    )
    output_tokens: int | None = flag(
        None,
        minimum=1,
        help="What a sample generates, if workload is a file of requests.",
        adapts="as many tokens as it may have",
    )
    seed: int = flag(0, minimum=0, help="The seed of lengths and arrivals of a shape.")
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

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the engine that are decided."""
        return {name: value for name in _ENGINE if (value := getattr(self, name)) is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layout that are decided."""
        return {name: size for name in _SIZES if (size := getattr(self, name)) is not None}

    def demand(self, facts: ModelFacts) -> Demand:
        """The workload.

        Args:
            facts: of the model, whose tokenizer measures a file of requests.

        Raises:
            ConfigError: it is not a shape, and not a file that can be read; names the line.
            ModelError: the model has no tokenizer, and the workload is a file of requests.
        """
        name = self.workload
        if is_shape(name):
            return demand_of_shape(name, self.seed)
        if is_batch_file(Path(name)):
            return batch_demand(Path(name), facts, self.output_tokens)
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
