"""``toka-bench trace``: writes a workload to a file that ``replay`` runs.

    toka-bench trace kind=chat out=chat.jsonl

The same seed writes the same file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokasaurus.bench.flags import scale
from tokasaurus.bench.output import print_json
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.planner.trace import max_request_tokens, write_trace
from tokasaurus.planner.workloads import WORKLOADS

__all__ = ["SCHEMA", "TraceConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """The workload, and its file."""

    kind: str = flag(
        choices=tuple(WORKLOADS),
        help="sampling: 1,024 samples of each of a few problems. chat: log-normal lengths, a common"
        " system prompt. reasoning: lengths with a long tail.",
    )
    out: str = flag(help="The file to write: a line of JSON for each request.")
    seed: int = flag(0, minimum=0, help="The seed of all random numbers.")
    size: float = flag(
        1.0, help="The number of requests, or samples, as a multiple of the usual number."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        scale(self.size)


SCHEMA = Schema(
    target=TraceConfig,
    program="toka-bench trace",
    summary="Write a workload to a file.",
    examples=("toka-bench trace kind=chat out=chat.jsonl",),
)


def run(config: TraceConfig) -> None:
    """Writes the trace and prints what it holds."""
    trace = WORKLOADS[config.kind](config.seed, config.size)
    try:
        with Path(config.out).open("wb") as file:
            write_trace(trace, file)
    except OSError as error:
        raise ConfigError(f"out={config.out}: {error.strerror}") from None
    print_json(
        {
            "out": config.out,
            "requests": len(trace),
            "sequences": sum(len(request.output_tokens) for request in trace),
            "output_tokens": sum(sum(request.output_tokens) for request in trace),
            "longest_request": max_request_tokens(trace),
        }
    )
