"""Panels of lines over a scale of doublings as an SVG, two in a row.

Needs no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Lines", "write_routing_plot"]

_COLOURS = ("#2a6fbb", "#66a182", "#8d6a9f", "#d1495b")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 300, 180, 60, 64, 86
_NUM_MARKS = 4  # on the upright axis


@dataclass(frozen=True)
class Lines:
    """A panel.

    Attributes:
        title: what is drawn.
        axis: what is counted below.
        lines: counts and values of each line, by its name.
    """

    title: str
    axis: str
    lines: Mapping[str, Sequence[tuple[int, float]]]


def write_routing_plot(path: str, panels: Sequence[Lines]) -> None:
    """Writes the file. Lines of one name have one colour in all panels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    width = 2 * (_LEFT + _WIDTH) + 24
    height = _TOP + -(-len(panels) // 2) * (_HEIGHT + _GAP) - 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, (name, colour) in enumerate(colours.items()):
        parts.append(_text(_LEFT + 110 * index, 18, f"\N{BLACK SQUARE} {name}", colour=colour))
    for index, panel in enumerate(panels):
        row, column = divmod(index, 2)
        left, top = _LEFT + column * (_LEFT + _WIDTH), _TOP + row * (_HEIGHT + _GAP)
        parts += _panel(panel, left, top, colours)
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def _panel(panel: Lines, left: int, top: int, colours: Mapping[str, str]) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    low, high = (math.log2(choose(count for count, _ in points)) for choose in (min, max))
    mark = _mark(max(value for _, value in points) / _NUM_MARKS)
    bottom = top + _HEIGHT

    def x(count: int) -> float:
        return left + _WIDTH * (math.log2(count) - low) / ((high - low) or 1)

    def y(value: float) -> float:
        return bottom - _HEIGHT * value / (mark * _NUM_MARKS)

    parts = [_text(left, top - 14, panel.title, weight="bold")]
    for step in range(_NUM_MARKS + 1):
        value = step * mark
        parts.append(f'<path d="M{left} {y(value):.1f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y(value) + 4, f"{value:,g}", anchor="end"))
    for count in sorted({count for count, _ in points}):
        parts.append(_text(x(count), bottom + 16, f"{count:,}", anchor="middle"))
    parts.append(_text(left + _WIDTH / 2, bottom + 34, panel.axis, anchor="middle"))
    for name, line in reversed(list(panel.lines.items())):  # the first one on top
        where = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in line)
        parts.append(
            f'<polyline points="{where}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
        )
    return parts


def _mark(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below a value."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "", colour: str = ""
) -> str:
    style = f' font-weight="{weight}"' if weight else ""
    style += f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
