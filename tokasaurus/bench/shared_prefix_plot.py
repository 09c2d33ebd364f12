"""What attention over shared prefixes saves, as an SVG: how it works, then a panel of lines each.

Needs no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Curves", "write_shared_prefix_plot"]

_COLOURS = ("#2a6fbb", "#d1495b", "#66a182", "#8d6a9f")
_SHARED, _OWN, _GREY = "#9ec3e6", "#f4c095", "#ddd"
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 250, 190, 46, 40, 60
_ROWS = 4  # of the drawing


@dataclass(frozen=True)
class Curves:
    """A panel: how often faster a batch is as a group, against a count on a scale of doublings.

    Attributes:
        title: of the panel.
        axis: what is counted.
        lines: counts and ratios of each line, by its name.
    """

    title: str
    axis: str
    lines: Mapping[str, Sequence[tuple[int, float]]]


def write_shared_prefix_plot(path: str, panels: Sequence[Curves]) -> None:
    """Writes the file."""
    step = _WIDTH + _LEFT + _GAP
    width = _LEFT + (1 + len(panels)) * step - _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_TOP + _HEIGHT + 70}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_drawing(_LEFT),
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, _LEFT + (index + 1) * step)
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def _drawing(left: float) -> list[str]:
    """Which keys and values each row of a batch reads, alone and as a group."""
    parts = []
    height = 16
    for title, top, is_group in (
        ("Row by row: the prefix is read for each", _TOP, False),
        ("As a group: it is read once for all rows", _TOP + 110, True),
    ):
        parts.append(_text(left, top - 8, title, weight="bold"))
        prefix, own = 0.68 * _WIDTH, 0.24 * _WIDTH
        for row in range(_ROWS):
            y = top + row * (height + 3)
            if not is_group:
                parts.append(_box(left, y, prefix, height, _SHARED))
            parts.append(_box(left + prefix + 8, y, own, height, _OWN))
        if is_group:
            parts.append(_box(left, top, prefix, _ROWS * (height + 3) - 3, _SHARED))
            parts.append(_text(left + prefix / 2, top + 41, "queries x prefix", anchor="middle"))
    y = _TOP + _HEIGHT + 16
    parts += [
        _text(left, y, "A row goes on from the state that"),
        _text(left, y + 15, "its group has left."),
        f'<text x="{left + 112}" y="{y + 15}"><tspan fill="{_SHARED}">&#9632;</tspan> prefix '
        f'<tspan fill="{_OWN}">&#9632;</tspan> own</text>',
    ]
    return parts


def _panel(panel: Curves, left: float) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    low, high = (math.log2(choose(count for count, _ in points)) for choose in (min, max))
    top = max(2, math.ceil(max(ratio for _, ratio in points)))
    bottom = _TOP + _HEIGHT

    def x(count: int) -> float:
        return left + _WIDTH * (math.log2(count) - low) / ((high - low) or 1)

    def y(ratio: float) -> float:
        return bottom - _HEIGHT * ratio / top

    parts = [_text(left, _TOP - 22, panel.title, weight="bold")]
    for ratio in range(top + 1):
        stroke = "#999" if ratio == 1 else _GREY
        parts.append(f'<path d="M{left} {y(ratio):.1f}h{_WIDTH}" stroke="{stroke}"/>')
        parts.append(_text(left - 6, y(ratio) + 4, f"{ratio}x", anchor="end"))
    for count in sorted({count for count, _ in points}):
        parts.append(_text(x(count), bottom + 16, str(count), anchor="middle"))
    parts.append(_text(left + _WIDTH / 2, bottom + 34, panel.axis, anchor="middle"))
    # The names stand in the corner that falling, or rising, lines leave free.
    falls = sum(line[0][1] - line[-1][1] for line in panel.lines.values()) > 0
    at, anchor = (left + _WIDTH - 4, "end") if falls else (left + 8, "start")
    for index, (name, line) in enumerate(panel.lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        where = " ".join(f"{x(count):.1f},{y(ratio):.1f}" for count, ratio in line)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(at, _TOP + 14 + 15 * index, name, anchor=anchor, colour=colour))
    return parts


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "", colour: str = ""
) -> str:
    style = f' font-weight="{weight}"' if weight else ""
    style += f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
