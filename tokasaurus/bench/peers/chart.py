"""Speeds as an SVG: a panel for each dtype, in it a group of bars for each workload.

Needs no plotting library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Bar", "Group", "write_chart"]

_COLOURS = {
    "tokasaurus": "#2a6fbb",
    "int8": "#7fb2e5",
    "vllm": "#d1495b",
    "openvino": "#66a182",
    "products alone": "#cccccc",
}
_WIDTH, _LEFT, _RIGHT, _TOP = 420, 170, 110, 30
_BAR, _GAP, _TITLE = 16, 14, 26


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: an engine.
        rate: tokens/s.
    """

    name: str
    rate: float


@dataclass(frozen=True)
class Group:
    """The bars of one workload; the longest is as long as the panel is wide."""

    title: str
    bars: Sequence[Bar]


def write_chart(path: str, panels: Mapping[str, Sequence[Group]]) -> None:
    """Writes the file.

    Args:
        path: of the SVG.
        panels: the groups of each panel, by its title.
    """
    parts, y = [], float(_TOP)
    for title, groups in panels.items():
        parts.append(f'<text x="{_LEFT}" y="{y + 8}" font-weight="bold">{escape(title)}</text>')
        y += _TITLE
        for group in groups:
            parts += _bars(group, y)
            y += _BAR * len(group.bars) + _GAP
        y += _GAP
    names = dict.fromkeys(
        bar.name for groups in panels.values() for group in groups for bar in group.bars
    )
    frame = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}"'
        f' height="{y:.0f}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_legend(list(names)),
    ]
    Path(path).write_text("\n".join([*frame, *parts, "</svg>\n"]))


def _legend(names: Sequence[str]) -> list[str]:
    return [
        f'<text x="{_LEFT + 120 * index}" y="16">'
        f'<tspan fill="{_COLOURS[name]}">&#9632;</tspan> {escape(name)}</text>'
        for index, name in enumerate(names)
    ]


def _bars(group: Group, top: float) -> list[str]:
    middle = top + _BAR * len(group.bars) / 2 + 4
    parts = [f'<text x="{_LEFT - 10}" y="{middle}" text-anchor="end">{escape(group.title)}</text>']
    longest = max(bar.rate for bar in group.bars)
    for index, bar in enumerate(group.bars):
        y, width = top + _BAR * index, _WIDTH * bar.rate / longest
        parts += [
            f'<rect x="{_LEFT}" y="{y + 1}" width="{width:.1f}" height="{_BAR - 2}"'
            f' fill="{_COLOURS[bar.name]}"/>',
            f'<text x="{_LEFT + width + 5:.1f}" y="{y + 12}">{bar.rate:,.0f} tokens/s</text>',
        ]
    return parts
