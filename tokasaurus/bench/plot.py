"""Cache use over time as an SVG: a panel for each trace, a line for each policy.

Needs no plotting library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from tokasaurus.errors import ConfigError
from tokasaurus.planner.report import Moment

__all__ = ["Panel", "check_plot", "write_plot"]

_COLOURS = ("#2a6fbb", "#d1495b", "#66a182", "#8d6a9f")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 640, 150, 52, 44, 52
_MAX_POINTS = 400


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the share of the cache in use, against seconds."""

    title: str
    lines: Mapping[str, Sequence[Moment]]  # by name


def check_plot(path: str) -> None:
    """Raises ConfigError if the file cannot be written, before the minutes that a plot may take."""
    try:
        Path(path).open("ab").close()
    except OSError as error:
        raise ConfigError(f"plot={path}: {error.strerror}") from None


def write_plot(path: str, panels: Sequence[Panel]) -> None:
    """Writes the file."""
    height = _TOP + len(panels) * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_legend(list(panels[0].lines)),
    ]
    for index, panel in enumerate(panels):
        parts += _axes(panel, _TOP + index * (_HEIGHT + _GAP))
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def _legend(names: list[str]) -> list[str]:
    return [
        f'<text x="{_LEFT + 150 * index}" y="16" fill="{colour}">&#9632; {escape(name)}</text>'
        for index, (name, colour) in enumerate(zip(names, _COLOURS, strict=False))
    ]


def _axes(panel: Panel, top: int) -> list[str]:
    end_s = max(moments[-1].time_s for moments in panel.lines.values()) or 1.0
    highest = max(moment.used for moments in panel.lines.values() for moment in moments) or 1.0
    parts = [f'<text x="{_LEFT}" y="{top - 6}" font-weight="bold">{escape(panel.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = top + _HEIGHT * (1 - share)
        parts.append(f'<path d="M{_LEFT} {y}h{_WIDTH}" stroke="#ddd"/>')
        label = f"{share * highest:.0%}"
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, label = _LEFT + _WIDTH * share, f"{share * end_s:.3g} s"
        parts.append(f'<text x="{x}" y="{top + _HEIGHT + 16}" text-anchor="middle">{label}</text>')
    for moments, colour in zip(panel.lines.values(), _COLOURS, strict=False):
        times, used = _thinned(moments, end_s)
        points = " ".join(
            f"{_LEFT + _WIDTH * time / end_s:.1f},{top + _HEIGHT * (1 - share / highest):.1f}"
            for time, share in zip(times, used, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    return parts


def _thinned(moments: Sequence[Moment], end_s: float) -> tuple[list[float], list[float]]:
    """The highest use in each column of pixels, so that no peak is lost."""
    times = np.array([moment.time_s for moment in moments])
    used = np.array([moment.used for moment in moments])
    columns = np.minimum((times / end_s * _MAX_POINTS).astype(int), _MAX_POINTS - 1)
    firsts = np.flatnonzero(np.diff(columns, prepend=-1))
    return times[firsts].tolist(), np.maximum.reduceat(used, firsts).tolist()
