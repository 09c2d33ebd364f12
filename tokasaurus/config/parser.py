"""The command lines of ``toka`` and of the other commands, whose flags are dataclasses too.

Owns everything around the grammar: help, ``--version``, ``--show`` and other questions, the
environment variable ``OVERRIDES``, warnings, and the exit status of a wrong command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import yaml

from tokasaurus.config.builder import Builder
from tokasaurus.config.engine import ENGINE, EngineConfig
from tokasaurus.config.schema import Schema, flags_of
from tokasaurus.config.syntax import Reader
from tokasaurus.errors import ConfigError
from tokasaurus.version import __version__

__all__ = [
    "answer_question",
    "drop_warning",
    "log_format_of",
    "parse",
    "parse_command_line",
    "parse_or_exit",
    "print_help",
    "with_keys",
]

C = TypeVar("C")


Explain: TypeAlias = Callable[[C], Sequence[str]]
"""Lines about a configuration that ``--show`` adds as comments."""

Answers: TypeAlias = Mapping[str, Callable[[C], str]]
"""Words that ask about a configuration, such as ``--show-memory``, and what answers them."""

Warn: TypeAlias = Callable[[str], None]
"""Takes one warning."""


def parse_command_line(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    explain: Explain[EngineConfig] | None = None,
    commands: Mapping[str, str] | None = None,
    answers: Answers[EngineConfig] | None = None,
    warn: Warn | None = None,
) -> EngineConfig:
    """Reads the command line of ``toka``.

    The words of the environment variable OVERRIDES, split as a shell splits them, count as if they
    followed the arguments. Warnings go to ``warn``, or to standard error. ``--show`` adds what
    ``explain`` says; its errors come after the flags are printed. ``--help`` lists the program's
    ``commands``.

    Raises:
        ConfigError: one line for each thing that is wrong.
        SystemExit: with status 0, after printing what ``--help``, ``--version``, ``--show`` or a
            word of ``answers`` asked for.
    """
    schema = dataclasses.replace(ENGINE, commands=commands or {})
    overrides = environment.get("OVERRIDES", "")
    return parse(schema, arguments, overrides, explain, answers, warn)


def drop_warning(line: str) -> None:
    """Takes a warning in a program whose engine reads the same words, and logs it."""


def log_format_of(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What ``log_format`` is in a command line of ``toka``, though other flags may be wrong."""
    builder = Builder(ENGINE)
    reader = Reader(ENGINE, builder, ())
    reader.read(arguments)
    with contextlib.suppress(ValueError):
        reader.read(shlex.split(environment.get("OVERRIDES", "")))
    return str(builder.value_of("log_format"))


def parse_or_exit(schema: Schema[C], arguments: Sequence[str]) -> C:
    """Reads a command line; if it is wrong, the process ends with status 2."""
    try:
        return parse(schema, arguments)
    except ConfigError as error:
        print(f"{schema.program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(
    schema: Schema[C],
    arguments: Sequence[str],
    overrides: str = "",
    explain: Explain[C] | None = None,
    answers: Answers[C] | None = None,
    warn: Warn | None = None,
) -> C:
    """Reads a command line of any schema; see :func:`parse_command_line`."""
    if answer_question(arguments, partial(print_help, schema)):
        raise SystemExit(0)
    builder = Builder(schema)
    answers = answers or {}
    reader = Reader(schema, builder, {"--show", *answers})
    reader.read(arguments)
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        # The message does not show the variable, which may hold a secret.
        raise ConfigError(f"OVERRIDES: {str(error).lower()}") from None
    with builder.reading("OVERRIDES"):
        reader.read(words)
    parsed = builder.finish()
    for line in parsed.warnings:
        if warn is None:
            print(f"{schema.program}: warning: {line}", file=sys.stderr)
        else:
            warn(line)
    if not reader.asked:
        return parsed.value
    if "--show" in reader.asked:
        print(show(parsed.value), end="")
        for line in explain(parsed.value) if explain is not None else ():
            print(f"# {line}")
    for word, answer in answers.items():
        if word in reader.asked:
            print(answer(parsed.value))
    raise SystemExit(0)


def with_keys(words: Sequence[str], schema: Schema[Any]) -> list[str]:
    """Adds keys to first words that have none: those of the flags that a command requires."""
    required = [flag.name for flag in schema if flag.required]
    named = []
    for name, word in zip(required, words, strict=False):
        if "=" in word or word.startswith("-"):
            break
        named.append(f"{name}={word}")
    return [*named, *words[len(named) :]]


def answer_question(words: Sequence[str], show_help: Callable[[], None]) -> bool:
    """Prints help or the version if a command line asks for it; says whether it did.

    ``--help``, ``-h`` and ``--version`` count anywhere, ``help`` only as the single word.
    """
    if list(words) == ["help"] or not {"--help", "-h"}.isdisjoint(words):
        show_help()
    elif "--version" in words:
        print(f"tokasaurus {__version__}")
    else:
        return False
    return True


def print_help(schema: Schema[Any]) -> None:
    """Prints the help of a command."""
    from tokasaurus.config.help import print_page  # rich is slow to import

    print_page(schema)


def show(value: Any) -> str:
    """An instance as YAML that ``config=FILE`` reads back; secrets are mentioned but not shown."""
    plain = _plain(dataclasses.asdict(value))
    secrets = [flag.name for flag in flags_of(type(value)).values() if flag.notes.secret]
    notes = [f"# {name} is set, and not shown\n" for name in secrets if plain[name] is not None]
    for name in secrets:
        del plain[name]
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) + "".join(notes)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
