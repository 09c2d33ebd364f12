"""``toka-bench``: one command, and what to do as its first word."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from tokasaurus.config.parser import answer_question, parse_or_exit
from tokasaurus.config.schema import Schema
from tokasaurus.config.suggestions import nearest
from tokasaurus.errors import ConfigError, TokasaurusError

__all__ = ["COMMANDS", "main"]

# Each is a module of this package with a SCHEMA and run(config).
COMMANDS = {
    "manager": "what the manager costs in CPU time, its real process against a simulated device",
    "server": "what the server costs in CPU time: a request, a token, an event of a stream",
    "grammar": "what structured output costs, beside the same batch without (runs a model)",
    "lookahead": "whether a device ever waits for the manager, and what that costs in wasted tokens",
    "trace": "write a workload to a file",
    "replay": "run a workload of a file in virtual time",
    "compare": "forecast admission against two simpler policies, in virtual time",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0, 2 if the command line or a file is wrong, 1 for any other error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if answer_question(words[:1] or ["help"], lambda: print(_help())):
        return 0
    name, *words = words
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        print(f"toka-bench: error: {name!r} is no command; the nearest is {near}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"tokasaurus.bench.{name}")
    config = parse_or_exit(command.SCHEMA, _with_keys(words, command.SCHEMA))
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
        f"{lines}\n\ntoka-bench COMMAND --help names the flags of one."
    )


def _with_keys(words: list[str], schema: Schema[Any]) -> list[str]:
    """The first word may leave out its key, where a command needs one thing: a file."""
    first = next(iter(schema))
    if first.required and words and "=" not in words[0] and not words[0].startswith("-"):
        return [f"{first.name}={words[0]}", *words[1:]]
    return words


if __name__ == "__main__":
    sys.exit(main())
