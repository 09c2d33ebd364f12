"""``--help``: every flag with its default and its meaning, in groups, as wide as the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tokasaurus.config.reference import Row, Section, sections
from tokasaurus.config.schema import Schema

__all__ = ["print_help"]

_MAX_WIDTH = 110
_MIN_WIDTH = 60

_GRAMMAR = (
    ("key=value", "sets a flag; later ones win. --key=value and --key value do the same"),
    ("key='(2 * 1024)'", "arithmetic stands in parentheses"),
    ("key=T, key=F", "true and false, also yes/no, on/off, 1/0; key=None unsets"),
    ("a.b=value", "a nested key; --in a b=value in-- does the same"),
    ("--list key x y list--", "a list; key=x,y does the same"),
    ("--show", "print the configuration as YAML and exit"),
    ("--help, -h", "print this and exit"),
)


def print_help(schema: Schema[Any]) -> None:
    """Prints to standard output; plain text where that is no terminal."""
    columns = shutil.get_terminal_size((100, 24)).columns
    width = max(_MIN_WIDTH, min(columns, _MAX_WIDTH))
    console = Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)
    console.print(Text(f"{schema.program}: {schema.summary}"))
    if schema.examples:
        _print_title(console, "Examples")
        for example in schema.examples:
            console.print(Text(f"  {example}"))
    _print_title(console, "Grammar")
    _print_pairs(console, _GRAMMAR)
    for section in sections(schema):
        _print_section(console, section)


def _print_section(console: Console, section: Section) -> None:
    _print_title(console, section.title)
    _print_pairs(console, ((f"{row.name}={row.default}", _meaning(row)) for row in section.rows))


def _meaning(row: Row) -> str:
    aliases = f" Also called {', '.join(row.aliases)}." if row.aliases else ""
    choices = f" One of {', '.join(row.choices)}." if row.choices else ""
    return f"{row.meaning}{choices}{aliases}"


def _print_title(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", style="bold"))


def _print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(ratio=2, overflow="fold")
    table.add_column(ratio=3)
    table.expand = True
    for name, meaning in pairs:
        table.add_row(Text(name), Text(meaning))
    console.print(Padding(table, (0, 0, 0, 2)))
