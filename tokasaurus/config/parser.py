"""Command lines: ``toka``'s, and those of the other commands, whose flags are dataclasses too.

Owns what happens around the grammar: help, ``--show``, the ``OVERRIDES`` environment variable,
warnings, and the exit status of a wrong command line.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml

from tokasaurus.config.builder import Builder
from tokasaurus.config.engine import ENGINE, EngineConfig
from tokasaurus.config.schema import Schema, flags_of
from tokasaurus.config.syntax import Reader
from tokasaurus.errors import ConfigError

__all__ = ["parse", "parse_command_line", "parse_or_exit"]

C = TypeVar("C")


def parse_command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> EngineConfig:
    """What ``toka`` was asked for.

    The words of the environment variable OVERRIDES, split as a shell would, count as if they stood
    behind the arguments. Warnings go to standard error.

    Raises:
        ConfigError: one line for each thing that is wrong.
        SystemExit: with status 0, after ``--help`` or ``--show`` have been printed.
    """
    return parse(ENGINE, arguments, environment.get("OVERRIDES", ""))


def parse_or_exit(schema: Schema[C], arguments: Sequence[str]) -> C:
    """What a command was asked for; a wrong command line ends the process with status 2."""
    try:
        return parse(schema, arguments)
    except ConfigError as error:
        print(f"{schema.program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(schema: Schema[C], arguments: Sequence[str], overrides: str = "") -> C:
    """Reads a command line of any schema; see :func:`parse_command_line`."""
    if any(token in ("--help", "-h") for token in arguments):
        from tokasaurus.config.help import print_help

        print_help(schema)
        raise SystemExit(0)
    builder = Builder(schema)
    reader = Reader(schema, builder)
    reader.read(arguments)
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        # Not what it holds: that may be a secret.
        raise ConfigError(f"OVERRIDES: {str(error).lower()}") from None
    with builder.reading("OVERRIDES"):
        reader.read(words)
    parsed = builder.finish()
    for line in parsed.warnings:
        print(f"{schema.program}: warning: {line}", file=sys.stderr)
    if reader.show:
        print(show(parsed.value), end="")
        raise SystemExit(0)
    return parsed.value


def show(value: Any) -> str:
    """An instance as YAML that ``config=FILE`` reads back; a secret is only said to be there."""
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
