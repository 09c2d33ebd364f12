"""``toka-cartridge``: runs the command that its first word names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tokasaurus.config.parser import answer_question, parse_or_exit, with_keys
from tokasaurus.errors import ConfigError, TokasaurusError

__all__ = ["COMMANDS", "main"]

# Each is a module of this package with a SCHEMA and run(config), which raises what went wrong.
COMMANDS = {
    "inspect": "say what is in a cartridge's file",
    "verify": "check a file whole, and whether it fits a model",
    "convert": "write a cartridge in the other format: .pt as safetensors, or the reverse",
    "create": "make a cartridge of a text: the KV cache that a model has after reading it",
    "train": "train a short cartridge that stands for a long document",
    "list": "list the cartridges of a running engine",
    "upload": "give a running engine a cartridge",
    "delete": "let a running engine forget a cartridge",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0 for success, 2 if the command line is wrong, 130 after Ctrl-C, 1 for any
        other error, such as a file that is no cartridge.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if answer_question(words[:1] or ["help"], lambda: print(_help())):
        return 0
    name, *words = words
    if name not in COMMANDS:
        message = f"{name!r} is not a command; the commands are {', '.join(COMMANDS)}"
        print(f"toka-cartridge: error: {message}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"tokasaurus.launch.cartridges.{name}")
    config = parse_or_exit(command.SCHEMA, with_keys(words, command.SCHEMA))
    try:
        command.run(config)
    except TokasaurusError as error:
        print(f"toka-cartridge {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "toka-cartridge: makes, checks and converts cartridges.\n\n"
        f"{lines}\n\ntoka-cartridge COMMAND --help lists the flags of a command."
    )


if __name__ == "__main__":
    sys.exit(main())
