"""The page that ``--help`` prints: every flag with its default and meaning, in groups."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from tokasaurus.config.reference import Row, sections
from tokasaurus.config.schema import Schema

__all__ = ["print_page"]

_MAX_WIDTH = 110
_MIN_WIDTH = 60
_LEFT = 42  # columns before the meanings; at most a third of the terminal

_GRAMMAR = (
    ("key=value", "sets a flag; later values win; --key=value and --key value do the same"),
    ("key='(2 * 1024)'", "arithmetic, in parentheses"),
    ("key=T, key=F", "true and false; also yes/no, on/off, 1/0"),
    ("key=None", "resets a flag that adapts to its default"),
    ("a.b=value", "a nested key; --in a b=value in-- does the same"),
    ("--list key x y list--", "a list; key=x,y does the same"),
    ("--show", "prints the configuration as YAML and exits"),
    ("--version", "prints the version and exits"),
    ("--help, -h", "prints this help and exits"),
)


def print_page(schema: Schema[Any]) -> None:
    """Prints to standard output, as wide as the terminal: coloured there, plain text elsewhere."""
    columns = shutil.get_terminal_size((100, 24)).columns
    width = max(_MIN_WIDTH, min(columns, _MAX_WIDTH))
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(Text(f"{schema.program}: {schema.summary}"))
    if schema.examples:
        _print_title(console, "Examples")
    for example in schema.examples:
        console.print(Text(f"  {example}"))
    if schema.commands:
        _print_title(console, f"Commands ({schema.program} COMMAND --help lists their flags)")
        _print_pairs(console, width, schema.commands.items())
    _print_title(console, "Grammar")
    _print_pairs(console, width, _GRAMMAR)
    if schema.shortcuts:
        _print_title(console, "Shortcuts")
        pairs = ((f".{name}", call.__doc__ or "") for name, call in schema.shortcuts.items())
        _print_pairs(console, width, pairs)
    for section in sections(schema):
        _print_title(console, section.title)
        rows = ((f"{row.name}={row.default}", _meaning(row)) for row in section.rows)
        _print_pairs(console, width, rows)


def _meaning(row: Row) -> str:
    aliases = f" Also called {', '.join(row.aliases)}." if row.aliases else ""
    number = "Any" if row.takes_list else "One"
    choices = f" {number} of {', '.join(row.choices)}." if row.choices else ""
    return f"{row.meaning}{choices}{aliases}"


def _print_title(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", style="bold"))


def _print_pairs(console: Console, width: int, pairs: Iterable[tuple[str, str]]) -> None:
    left = min(_LEFT, width // 3)
    for name, meaning in pairs:
        lines = textwrap.wrap(meaning, width - left, break_on_hyphens=False) or [""]
        if len(name) + 4 > left:
            console.print(Text(f"  {name}", style="cyan"))
        else:
            first = Text.assemble((f"  {name}".ljust(left), "cyan"), lines.pop(0))
            first.rstrip()
            console.print(first)
        for line in lines:
            console.print(Text(" " * left + line))
