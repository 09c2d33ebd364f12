"""Throughput against the number of replicas as an SVG, on two scales of powers.

Needs no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["write_scaling_plot"]

_COLOURS = ("#2a6fbb", "#d1495b", "#66a182", "#8d6a9f")
_WIDTH, _HEIGHT, _LEFT, _TOP = 560, 300, 76, 60


def write_scaling_plot(path: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Writes the file.

    Args:
        path: of the file.
        lines: numbers of replicas, and tokens a second, by the name of a line. A dashed line
            multiplies the first point of the first one.
    """
    points = [point for line in lines.values() for point in line]
    first_count, first_rate = next(iter(lines.values()))[0]
    most = max(count for count, _ in points)
    ideal = first_rate * most / first_count
    low = math.floor(math.log10(min(rate for _, rate in points)))
    high = math.ceil(math.log10(ideal))
    span = math.log2(most / first_count) or 1.0

    def x(count: float) -> float:
        return _LEFT + _WIDTH * math.log2(count / first_count) / span

    def y(rate: float) -> float:
        return _TOP + _HEIGHT * (1 - (math.log10(rate) - low) / (high - low))

    width, height = _LEFT + _WIDTH + 24, _TOP + _HEIGHT + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(low, high + 1):
        level = y(10.0**power)
        parts.append(f'<path d="M{_LEFT} {level:.1f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, level + 4, f"{10**power:,}", "end"))
    for count in sorted({count for count, _ in points}):
        parts.append(_text(x(count), _TOP + _HEIGHT + 16, f"{count:,}", "middle"))
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 36, "replicas", "middle"))
    parts.append(_text(_LEFT - 66, _TOP - 10, "tokens/s", "start"))
    parts.append(
        f'<path d="M{x(first_count):.1f} {y(first_rate):.1f}L{x(most):.1f} {y(ideal):.1f}"'
        ' stroke="#999" stroke-dasharray="4 4" fill="none"/>'
    )
    for index, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        where = " ".join(f"{x(count):.1f},{y(rate):.1f}" for count, rate in line)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{_LEFT}" y="{16 + 16 * index}" fill="{colour}">&#9632; {escape(name)}</text>'
        )
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
