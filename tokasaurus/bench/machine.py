"""The name of the machine that results were measured on."""

from __future__ import annotations

from typing import Any

from tokasaurus.launch.processor import num_cores
from tokasaurus.model.instruction_sets import processor_name

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """Its processor, and the cores that this process may use."""
    return {"processor": processor_name(), "cores": num_cores()}
