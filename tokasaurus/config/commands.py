"""Programs of several commands, such as ``toka-bench`` and ``toka-cartridge``.

A command is a module of the program's package with a ``SCHEMA``, and a ``run(config)`` that raises
what went wrong. If it has ``PASSES_ON = True``, it takes flags of another program as well, and gets
them as they are: ``run(config, words)``.
"""

from __future__ import annotations

import importlib
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tokasaurus.config.parser import answer_question, parse_or_exit, with_keys
from tokasaurus.config.schema import Schema
from tokasaurus.errors import ConfigError, TokasaurusError

__all__ = ["run_command"]

_QUESTIONS = ("help", "--help", "-h", "--version")


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
    passes_on = getattr(command, "PASSES_ON", False)
    passed_on: list[str] = []
    if passes_on:
        words, passed_on = _own_words(words, command.SCHEMA)
    config = parse_or_exit(command.SCHEMA, with_keys(words, command.SCHEMA))
    try:
        command.run(config, *([passed_on] if passes_on else ()))
    except TokasaurusError as error:
        print(f"{program} {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _own_words(words: Sequence[str], schema: Schema[Any]) -> tuple[list[str], list[str]]:
    """The words that are questions or flags of a schema, and the others."""
    names = {flag.name for flag in schema}
    own: list[str] = []
    others: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        key, has_value, _ = word.partition("=")
        is_own = word in _QUESTIONS or key.lstrip("-") in names
        taken = own if is_own else others
        taken.append(word)
        if is_own and word not in _QUESTIONS and not has_value and left:  # --key value
            taken.append(left.popleft())
    return own, others


def _help(program: str, summary: str, commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    return (
        f"{program}: {summary}\n\n{lines}\n\n{program} COMMAND --help lists the flags of a command."
    )
