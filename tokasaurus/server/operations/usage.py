"""The usage in an answer: how many tokens the request took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokasaurus.text.generation import Generation

__all__ = ["usage"]


def usage(
    generations: Sequence[Generation],
    num_generated_tokens: int,
    num_reasoning_tokens: int | None = None,
) -> dict[str, Any]:
    """Counts each prompt once, however many samples it has.

    Args:
        generations: of all prompts.
        num_generated_tokens: so far.
        num_reasoning_tokens: of these; None leaves the field out.
    """
    num_prompt_tokens = sum(generation.num_prompt_tokens for generation in generations)
    num_cached_tokens = sum(generation.num_cached_tokens for generation in generations)
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }
    if num_reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    return counts
