"""The output of a benchmark: a table for people, and a last line of JSON for programs.

Progress goes to standard error, so that standard output holds the results alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown_table", "print_json", "progress", "table"]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is aligned to the left, and the others to the right."""
    lines = _aligned([[str(cell) for cell in row] for row in (heads, *rows)])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same table in Markdown."""
    first, *others = _aligned([[str(cell) for cell in row] for row in (heads, *rows)])
    left, *right = (len(cell) for cell in first)
    rule = ["-" * left, *("-" * (width - 1) + ":" for width in right)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (first, rule, *others))


def _aligned(rows: list[list[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(pairs)
        ]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def print_json(values: Mapping[str, Any]) -> None:
    """Prints the last line."""
    print(json.dumps(values), flush=True)
