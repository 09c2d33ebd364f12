"""``toka-bench``: runs the benchmark that its first word names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tokasaurus.config.parser import answer_question, parse_or_exit, with_keys
from tokasaurus.errors import ConfigError, TokasaurusError

__all__ = ["COMMANDS", "main"]

# Each is a module of this package with a SCHEMA and run(config).
COMMANDS = {
    "manager": "what the manager costs in CPU time, its real process against a simulated device",
    "server": "what the server costs in CPU time: a request, a token, an event of a stream",
    "grammar": "what structured output costs, compared with the same batch without (runs a model)",
    "sampling": "what drawing a token costs, for each kind of row (needs no model)",
    "attention": "what one layer of attention takes on this processor",
    "peers": "ours against other engines on the same workloads, in the same run",
    "parallel": "several processes of this machine against one, on the same workload",
    "training": "what a trained cartridge knows of a document, with the bundled model",
    "cartridges": "requests behind a cartridge against the same text in their prompts",
    "quantization": "what int8 weights change: perplexity and greedy answers",
    "roofline": "how fast this machine multiplies matrices and reads memory",
    "lookahead": "how long the device waits for the manager, and how many tokens are wasted",
    "trace": "write a workload to a file",
    "replay": "run a workload from a file in virtual time",
    "scaling": "the throughput of many replicas behind one router, in virtual time",
    "routing": "the router against simpler ways to deal out conversations, in virtual time",
    "pipeline": "throughput and bubble of pipelines of simulated devices, in virtual time",
    "compare": "admission by forecast against two simpler policies, in virtual time",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 for success, 2 if the command line or a file is wrong, 130 after Ctrl-C,
        1 for any other error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if answer_question(words[:1] or ["help"], lambda: print(_help())):
        return 0
    name, *words = words
    if name not in COMMANDS:
        message = f"{name!r} is not a command; the commands are {', '.join(COMMANDS)}"
        print(f"toka-bench: error: {message}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"tokasaurus.bench.{name}")
    config = parse_or_exit(command.SCHEMA, with_keys(words, command.SCHEMA))
    try:
        command.run(config)
    except TokasaurusError as error:
        print(f"toka-bench {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "toka-bench: benchmarks that need no GPU.\n\n"
        f"{lines}\n\ntoka-bench COMMAND --help lists the flags of a command."
    )


if __name__ == "__main__":
    sys.exit(main())
