"""Tokasaurus: a high-throughput LLM inference engine.

    from tokasaurus import LLM, SamplingParams

The names below are loaded on first use, so importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokasaurus.version import __version__

if TYPE_CHECKING:
    from tokasaurus.config.engine import EngineConfig
    from tokasaurus.launch.async_llm import AsyncLLM
    from tokasaurus.launch.llm import LLM
    from tokasaurus.launch.outputs import CompletionOutput, RequestOutput
    from tokasaurus.text.params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "tokasaurus.launch.llm",
    "AsyncLLM": "tokasaurus.launch.async_llm",
    "CompletionOutput": "tokasaurus.launch.outputs",
    "RequestOutput": "tokasaurus.launch.outputs",
    "EngineConfig": "tokasaurus.config.engine",
    "SamplingParams": "tokasaurus.text.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokasaurus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
