"""``toka-bench``: runs the benchmark that its first word names."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokasaurus.config.commands import run_command
from tokasaurus.config.pipes import ends_with_its_reader

__all__ = ["COMMANDS", "main"]

# Modules of this package.
COMMANDS = {
    "manager": "what the manager costs in CPU time, its real process against a simulated device",
    "server": "what the server costs in CPU time: a request, a token, an event of a stream",
    "client": "what the Python client costs with thousands of requests under way",
    "grammar": "what structured output costs, compared with the same batch without (runs a model)",
    "sampling": "what drawing a token costs, for each kind of row (needs no model)",
    "attention": "what one layer of attention takes on this processor",
    "peers": "ours against other engines on the same workloads, in the same run",
    "parallel": "several processes of this machine against one, on the same workload",
    "training": "what a trained cartridge knows of a document, with the bundled model",
    "cartridges": "requests behind a cartridge against the same text in their prompts",
    "quantization": "what 8 bits change, in weights or the KV cache: perplexity and greedy answers",
    "calibrate": "a cost model of this machine, for predictions in virtual time",
    "predict": "what a calibrated cost model predicts, against real runs of the same workloads",
    "roofline": "how fast this machine multiplies matrices and reads memory",
    "lookahead": "how long the device waits for the manager, and how many tokens are wasted",
    "trace": "write a workload to a file",
    "replay": "run a workload from a file in virtual time",
    "scaling": "the throughput of many replicas behind one router, in virtual time",
    "routing": "the router against simpler ways to deal out conversations, in virtual time",
    "pipeline": "throughput and bubble of pipelines of simulated devices, in virtual time",
    "compare": "admission by forecast against two simpler policies, in virtual time",
}


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit status, as ``run_command`` does."""
    return run_command(
        "toka-bench", "benchmarks that need no GPU.", "tokasaurus.bench", COMMANDS, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
