"""``TokenOutput`` where veRL is not installed, as in tests and plain loops of reinforcement."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

__all__ = ["TokenOutput"]


class TokenOutput(BaseModel):
    """Generated tokens, with the fields of veRL's class of this name.

    Attributes:
        token_ids: generated, the end-of-sequence token included.
        log_probs: of these tokens; None if they were not asked for.
        stop_reason: "completed", "aborted", or None if it is not known.
        extra_fields: what else is known of the answer.
    """

    token_ids: list[int]
    log_probs: list[float] | None = None
    routed_experts: Any | None = None
    stop_reason: str | None = None
    num_preempted: int | None = None
    extra_fields: dict[str, Any] = Field(default_factory=dict)
