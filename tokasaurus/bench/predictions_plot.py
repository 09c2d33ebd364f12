"""Predicted against measured throughput as an SVG, both on a scale of doublings.

Needs no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Point", "write_predictions_plot"]

_COLOURS = ("#2a6fbb", "#d1495b", "#66a182", "#8d6a9f", "#e09f3e", "#5c6672", "#00798c", "#b56576")
_SIZE, _LEFT, _TOP, _LEGEND = 380, 70, 20, 230
_BAND = 0.2


@dataclass(frozen=True)
class Point:
    """One workload.

    Attributes:
        name: for the legend.
        measured: tokens/s, the median of runs.
        measured_range: of the slowest and the fastest run.
        predicted: tokens/s.
        error: of the prediction's time, as a share.
    """

    name: str
    measured: float
    measured_range: tuple[float, float]
    predicted: float
    error: float

    @property
    def predicted_range(self) -> tuple[float, float]:
        """Tokens/s if the time is that much longer or shorter; an error of 1 or more has no end."""
        shortest = max(1 - self.error, 0.01)
        return self.predicted / (1 + self.error), self.predicted / shortest


def write_predictions_plot(path: str, points: Sequence[Point]) -> None:
    """Writes the file."""
    ends = [end for each in points for end in (*each.measured_range, *each.predicted_range)]
    low, high = math.floor(math.log2(min(ends))), math.ceil(math.log2(max(ends)))

    def x(rate: float) -> float:
        return _LEFT + _SIZE * (math.log2(rate) - low) / (high - low)

    def y(rate: float) -> float:
        return _TOP + _SIZE * (high - math.log2(rate)) / (high - low)

    first, last = 2.0**low, 2.0**high
    corners = [
        (first, first * (1 - _BAND)),
        (first, first / (1 - _BAND)),
        (last, last / (1 - _BAND)),
        (last, last * (1 - _BAND)),
    ]
    band = " ".join(f"{x(across):.1f},{y(up):.1f}" for across, up in corners)
    parts = [
        f'<clipPath id="axes"><rect x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}"/>'
        "</clipPath>",
        f'<polygon points="{band}" fill="#eee" clip-path="url(#axes)"/>',
        f'<path d="M{x(first)} {y(first)}L{x(last)} {y(last)}" stroke="#999"/>',
    ]
    for power in range(low, high + 1):
        rate = 2.0**power
        lines = f"M{x(rate):.1f} {_TOP}v{_SIZE}M{_LEFT} {y(rate):.1f}h{_SIZE}"
        parts += [
            f'<path d="{lines}" stroke="#ddd"/>',
            _text(x(rate), _TOP + _SIZE + 16, f"{rate:,.0f}", "middle"),
            _text(_LEFT - 6, y(rate) + 4, f"{rate:,.0f}", "end"),
        ]
    for index, each in enumerate(points):
        parts += _point(each, index, x(each.measured), y(each.predicted))
        (slowest, fastest), (lowest, highest) = each.measured_range, each.predicted_range
        parts += [
            _line(x(slowest), y(each.predicted), x(fastest), y(each.predicted), index),
            _line(x(each.measured), y(lowest), x(each.measured), y(highest), index),
        ]
    middle, bottom = _LEFT + _SIZE / 2, _TOP + _SIZE
    frame = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _SIZE + _LEGEND}"'
        f' height="{bottom + 46}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(middle, bottom + 36, "measured tokens/s, all runs", "middle"),
        f'<g transform="rotate(-90 14 {_TOP + _SIZE / 2})">'
        + _text(14, _TOP + _SIZE / 2, "predicted tokens/s, with its error", "middle")
        + "</g>",
        _text(_LEFT + _SIZE + 14, bottom, "grey: within 20%", "start"),
    ]
    Path(path).write_text("\n".join([*frame, *parts, "</svg>\n"]))


def _point(point: Point, index: int, x: float, y: float) -> list[str]:
    colour, at = _COLOURS[index % len(_COLOURS)], _TOP + 10 + 18 * index
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>',
        f'<circle cx="{_LEFT + _SIZE + 20}" cy="{at - 4}" r="4" fill="{colour}"/>',
        _text(_LEFT + _SIZE + 32, at, point.name, "start"),
    ]


def _line(x: float, y: float, to_x: float, to_y: float, index: int) -> str:
    path = f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"
    return f'<path d="{path}" stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
