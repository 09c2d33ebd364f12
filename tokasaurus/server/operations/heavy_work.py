"""Heavy work, which would hold up the event loop for over a millisecond, runs in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from tokasaurus.text.generation import Generation

__all__ = ["MANY_CHARACTERS", "in_thread_if", "takes_long"]

T = TypeVar("T")

MANY_CHARACTERS = 4_000
"""Tokenizing more than this takes longer than about a millisecond."""

# Turning more than this into text and JSON takes as long.
_MANY_TOKENS = 8_000
_MANY_LOGPROBS = 200


async def in_thread_if(heavy: bool, function: Callable[[], T]) -> T:
    """Calls a function: in a thread if it is heavy, else at once."""
    return await asyncio.to_thread(function) if heavy else function()


def takes_long(generations: Sequence[Generation], with_logprobs: bool) -> bool:
    """Whether it is heavy to write down everything that was generated."""
    size = sum(generation.num_generated_tokens for generation in generations)
    if generations[0].prompt_logprobs is not None:
        size += sum(generation.num_prompt_tokens for generation in generations)
        with_logprobs = True
    return size > (_MANY_LOGPROBS if with_logprobs else _MANY_TOKENS)
