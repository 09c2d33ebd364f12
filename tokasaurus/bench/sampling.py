"""``toka-bench sampling``: what drawing a token costs, for each kind of row.

    toka-bench sampling num_rows=64 vocab_size=128256

Draws from random logits in this process, and computes logprobs: in torch and by the kernels of the
CPU, in turn. The logits are peaked, as those of
a trained model mostly are: ten tokens hold 94% of the probability. For one kind of row they are
flat, so that top_p keeps most of the vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.schema import Schema, check_fields, flag

if TYPE_CHECKING:
    from torch import Tensor

    from tokasaurus.model.backend.base import SamplingKernels
    from tokasaurus.model.sampling.parameters import SamplingParameters

__all__ = ["SCHEMA", "SamplingConfig", "run"]

# The columns that differ from the default; lists are repeated over the rows.
_DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "top_k 5000": {"top_k": 5000},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.9, flat": {"top_p": 0.9},
    "mixed": {"temperature": [0, 1, 1, 1], "top_k": [0, 0, 50, 0], "top_p": [1, 1, 1, 0.9]},
}
_LOGPROBS: dict[str, dict[str, Any]] = {
    "logprobs 0": {"num_logprobs": 0},
    "logprobs 5": {"num_logprobs": 5},
    "logprobs 20, temperature 0.7": {
        "num_logprobs": 20,
        "temperature": 0.7,
        "logprobs_mode": 1,
    },
    "logprobs 5, one row of 8": {"num_logprobs": [5, -1, -1, -1, -1, -1, -1, -1]},
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The batch."""

    num_rows: int = flag(64, minimum=1, help="How many rows draw a token.")
    vocab_size: int = flag(49152, minimum=1, help="How many tokens there are.")
    rounds: int = flag(7, minimum=1, help="How often each kind is measured.")
    dtype: str = flag(
        "float32",
        choices=("float32", "bfloat16"),
        help="Of the logits, for the kernels. Torch takes float32.",
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=SamplingConfig,
    program="toka-bench sampling",
    summary="What drawing a token costs, for each kind of row.",
    examples=("toka-bench sampling num_rows=256",),
)


def run(config: SamplingConfig) -> None:
    """Measures and prints the results. The kinds take turns."""
    import torch  # which --help does not need

    from tokasaurus.host_memory import keep_freed_memory
    from tokasaurus.model.backend.base import BackendOptions
    from tokasaurus.model.backend.cpu.compiled import CompiledBackend

    keep_freed_memory()
    options = BackendOptions()
    kernels = CompiledBackend.sampling(options) if not CompiledBackend.why_not(options) else None
    torch.manual_seed(0)
    flat = torch.randn(config.num_rows, config.vocab_size)
    ranks = torch.rand_like(flat).argsort(dim=-1) + 1
    peaked = -2 * ranks.log()
    works: dict[tuple[str, str], Callable[[], None]] = {}
    dtypes = {"torch": torch.float32, "kernels": getattr(torch, config.dtype)}
    for sampler, own in {"torch": None, "kernels": kernels}.items():
        if own is None and sampler == "kernels":
            continue
        for name, columns in _DRAWS.items():
            logits = (flat if "flat" in name else peaked).to(dtypes[sampler])
            works[name, sampler] = _draw(logits, _parameters(config, columns), own)
        for name, columns in _LOGPROBS.items():
            logits = peaked.to(dtypes[sampler])
            works[name, sampler] = _compute_logprobs(logits, _parameters(config, columns), own)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in works}
    for number in range(config.rounds + 1):
        progress(f"round {number} of {config.rounds}" if number else "warming up")
        for name in (*_DRAWS, *_LOGPROBS):
            for sampler in ("torch", "kernels"):
                if (name, sampler) not in works:
                    continue
                started = time.perf_counter()
                works[name, sampler]()
                if number:
                    times[name, sampler].append(time.perf_counter() - started)
    costs: dict[str, dict[str, float]] = {}
    for (name, sampler), each in times.items():
        us = statistics.median(each) / config.num_rows * 1e6
        costs.setdefault(name, {})[sampler] = us
    samplers = list(costs["greedy"])
    rows = [
        (name, *(f"{us:,.1f}" for us in each.values()), f"{each['torch'] / each[samplers[-1]]:.1f}")
        for name, each in costs.items()
    ]
    print(
        table(
            ("rows", *(f"{each}, us a row" for each in samplers), f"torch / {samplers[-1]}"), rows
        )
    )
    print_json(
        {
            "rows": config.num_rows,
            "us_per_row": {name: each[samplers[-1]] for name, each in costs.items()},
            "torch_us_per_row": {name: each["torch"] for name, each in costs.items()},
        }
    )


def _parameters(config: SamplingConfig, columns: dict[str, Any]) -> SamplingParameters:
    import numpy as np

    from tokasaurus.model.sampling.parameters import SamplingParameters

    parameters = SamplingParameters.neutral(config.num_rows)
    for name, values in columns.items():
        parameters[name][:] = np.resize(values, config.num_rows)
    parameters["seed"][:] = np.arange(config.num_rows)
    return parameters


def _draw(
    logits: Tensor, parameters: SamplingParameters, kernels: SamplingKernels | None
) -> Callable[[], None]:
    from tokasaurus.model.sampling.draws import plan_row_draws
    from tokasaurus.model.upload import Staging

    def work() -> None:
        staging = Staging(logits.device)
        draws = plan_row_draws(parameters, logits.shape[1], staging, kernels)
        staging.send()
        draws.draw(logits)

    return work


def _compute_logprobs(
    logits: Tensor, parameters: SamplingParameters, kernels: SamplingKernels | None
) -> Callable[[], None]:
    from tokasaurus.model.sampling.logprobs import logprobs_of, plan_logprobs
    from tokasaurus.model.upload import Staging

    token_ids = logits.argmax(dim=-1)
    width = int(parameters["num_logprobs"].max())

    def work() -> None:
        staging = Staging(logits.device)
        plan = plan_logprobs(parameters, logits.shape[1], staging, kernels)
        staging.send()
        logprobs_of(logits, token_ids, plan, width)

    return work
