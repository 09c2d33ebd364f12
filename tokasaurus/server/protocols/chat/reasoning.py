"""How much a request wants the model to reason, and what the chat template hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from tokasaurus.server.operations.strict import StrictSchema

__all__ = ["Effort", "Reasoning", "effort_arguments"]

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Reasoning(StrictSchema):
    """OpenAI's ``reasoning``."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    """Only auto: the reasoning is returned whole, and nothing summarizes it."""
    generate_summary: Literal["auto"] | None = None
    """The older name of ``summary``."""
    context: Literal["auto"] | None = None
    """Only auto: the chat template decides which reasoning of earlier messages it keeps."""
    mode: Literal["standard"] | None = None
    """There is one mode."""


def effort_arguments(effort: Effort | None) -> Mapping[str, Any]:
    """Arguments of the chat template. One of a model that does not reason ignores them.

    Templates ask for ``enable_thinking`` (Qwen3), ``thinking`` (DeepSeek) or ``reasoning_effort``.
    """
    if effort is None:
        return {}
    thinks = effort != "none"
    return {"enable_thinking": thinks, "thinking": thinks, "reasoning_effort": effort}
