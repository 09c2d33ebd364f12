"""Programs of several commands, such as ``toka-bench`` and ``toka-cartridge``.

A command is a module of the program's package with a ``SCHEMA``, and a ``run(config)`` that raises
what went wrong.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from tokasaurus.config.parser import answer_question, parse_or_exit, with_keys
from tokasaurus.errors import ConfigError, TokasaurusError

__all__ = ["run_command"]


def run_command(
    program: str,
    summary: str,
    package: str,
    commands: Mapping[str, str],
    arguments: Sequence[str] | None,
) -> int:
    """Runs the command that the first word names.

    Args:
        program: its name.
        summary: what it does, in a sentence.
        package: of the commands' modules.
        commands: what each does, by name.
        arguments: default those of this process.

    Returns:
        The exit status: 0 for success, 2 if the command line is wrong or a ConfigError was raised,
        130 after Ctrl-C, 1 for any other error of ours.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if answer_question(words[:1] or ["help"], lambda: print(_help(program, summary, commands))):
        return 0
    name, *words = words
    if name not in commands:
        message = f"{name!r} is not a command; the commands are {', '.join(commands)}"
        print(f"{program}: error: {message}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"{package}.{name}")
    config = parse_or_exit(command.SCHEMA, with_keys(words, command.SCHEMA))
    try:
        command.run(config)
    except TokasaurusError as error:
        print(f"{program} {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _help(program: str, summary: str, commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    return (
        f"{program}: {summary}\n\n{lines}\n\n{program} COMMAND --help lists the flags of a command."
    )
