"""``toka-bench grammar``: the same batch without a grammar, with one, and with one per sequence.

    toka-bench grammar num_sequences=64

Runs the embedded engine on the bundled model, or on another one. All sequences generate the same
number of tokens, since no grammar allows an end before that. The three kinds take turns, so that
other work on the machine slows all of them; it hardly affects CPU time, which counts all threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.text.params import SamplingParams

__all__ = ["SCHEMA", "GrammarConfig", "run"]

_KINDS = ("free", "one grammar", "a grammar each")


@dataclass(frozen=True, kw_only=True)
class GrammarConfig:
    """The batch."""

    model: str | None = flag(
        None, help="The directory of the model.", adapts="the small bundled model"
    )
    num_sequences: int = flag(64, minimum=1, help="How many sequences run together.")
    num_tokens: int = flag(128, minimum=1, help="How many tokens each sequence generates.")
    rounds: int = flag(3, minimum=1, help="How often each kind of batch runs.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=GrammarConfig,
    program="toka-bench grammar",
    summary="What structured output costs, compared with the same batch without.",
    examples=("toka-bench grammar num_sequences=256",),
)


def run(config: GrammarConfig) -> None:
    """Measures and prints the results."""
    from tokasaurus.launch.llm import LLM  # imports torch, which --help does not need

    seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    cpu: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    with LLM(config.model, max_seqs_per_forward=config.num_sequences) as llm:
        for kind in _KINDS:  # loads and compiles what the first batch needs
            llm.generate(["A"], _params(config, kind, 0), use_tqdm=False)
        for number in range(config.rounds):
            progress(f"round {number + 1} of {config.rounds}")
            for kind in _KINDS:
                params = [_params(config, kind, i) for i in range(config.num_sequences)]
                prompts = [f"Number {i}:" for i in range(config.num_sequences)]
                started, cpu_started = time.perf_counter(), time.process_time()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds[kind].append(time.perf_counter() - started)
                cpu[kind].append(time.process_time() - cpu_started)
                assert all(len(o.outputs[0].token_ids) == config.num_tokens for o in outputs)
    num_tokens = config.num_sequences * config.num_tokens
    rates = {kind: num_tokens / min(times) for kind, times in seconds.items()}
    cpu_us = {kind: 1e6 * min(times) / num_tokens for kind, times in cpu.items()}
    rows = [
        (kind, f"{rate:,.0f}", f"{rate / rates['free']:.0%}", f"{cpu_us[kind]:.1f}")
        for kind, rate in rates.items()
    ]
    print(table(("batch", "tokens/s", "of free", "CPU us a token"), rows))
    print_json({"tokens": num_tokens, "tokens_per_s": rates, "cpu_us_per_token": cpu_us})


def _params(config: GrammarConfig, kind: str, number: int) -> SamplingParams:
    schema: dict[str, Any] | None = None
    if kind != "free":
        # An array with more items than there are tokens, so that it is never complete before.
        item = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
            "required": ["name", "n"],
            "additionalProperties": False,
        }
        own = number if kind == "a grammar each" else 0
        schema = {"type": "array", "items": item, "minItems": config.num_tokens + 1 + own}
    return SamplingParams(
        max_tokens=config.num_tokens,
        temperature=1.0,
        seed=number,
        ignore_eos=schema is None,
        structured_outputs=None if schema is None else {"json": schema},
    )
