"""The usage in an answer: how many tokens the request took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokasaurus.text.generation import Generation

__all__ = ["cartridge_tokens", "usage"]


def cartridge_tokens(generations: Sequence[Generation]) -> dict[str, int]:
    """The field that counts the tokens of cartridges, before each prompt; none without any."""
    prefixes = [each.request.prefix for each in generations]
    if prefixes[0] is None:
        return {}
    return {"cartridge_tokens": sum(each.num_tokens for each in prefixes if each is not None)}


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
        "prompt_tokens_details": {
            "cached_tokens": num_cached_tokens,
            **cartridge_tokens(generations),
        },
    }
    if num_reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    return counts
