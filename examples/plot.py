"""The examples' plots."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokasaurus.errors import ConfigError

__all__ = ["check_plot", "draw"]

_MEAN_OF = 10  # steps


def check_plot(path: str | None) -> None:
    """Raises ConfigError if no plot can be drawn there, before minutes of training."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib: pip install 'tokasaurus[train]'")
    directory = Path(path).expanduser().parent
    if not directory.is_dir():
        raise ConfigError(f"plot={path}: there is no directory {directory}")


def draw(
    path: str,
    label: str,
    values: Sequence[float],
    other_label: str,
    others: Mapping[int, float],
    **axes_options: Any,
) -> None:
    """Draws a figure of each step with its mean over ten steps, and another one by step.

    Args:
        path: of the PNG.
        label: of the figure of each step.
        values: of the steps, from step 1 on.
        other_label: of the other figure.
        others: by step.
        axes_options: of matplotlib's ``Axes.set``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = min(_MEAN_OF, len(values))
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(values) + 1), values, linewidth=0.6, color="C0", alpha=0.6)
    axes.plot(range(window, len(values) + 1), means, color="C0", label=label)
    axes.plot(list(others), list(others.values()), "o-", color="C1", label=other_label)
    axes.set(xlabel="step", **axes_options)
    axes.legend()
    figure.savefig(Path(path).expanduser(), format="png", dpi=120)
    pyplot.close(figure)
