"""The name of the machine that results were measured on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokasaurus.launch.processor import num_cores

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """Its processor, and the cores that this process may use."""
    return {"processor": _processor(), "cores": num_cores()}


def _processor() -> str:
    return next(_model_names(), platform.processor() or platform.machine())


def _model_names() -> Iterator[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("model name"):
            yield line.split(":", 1)[1].strip()
