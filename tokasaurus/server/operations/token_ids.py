"""The ids of a prompt and of what follows it, for clients that ask with ``return_token_ids``.

The fields are vLLM's: ``token_ids`` in every choice, and ``prompt_token_ids`` where the protocol
puts it. In a stream, each chunk has the ids of its own tokens, and the first chunk of each choice
has the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput

__all__ = ["TokenIds"]

_MANY_PROMPT_TOKENS = 50_000
"""Writing down more than these takes longer than about a millisecond."""


class TokenIds:
    """The fields of one request's answer that have ids; none unless the client asked for them.

    Args:
        wanted: what the client says.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = bool(wanted)
        self._written: dict[int, msgspec.Raw] = {}  # prompts of several samples, by request id

    def take_long(self, generations: Sequence[Generation]) -> bool:
        """Whether it is heavy to write down the ids of the prompts, once for each sample."""
        if not self._wanted:
            return False
        size = sum(each.num_prompt_tokens * len(each.samples) for each in generations)
        return size > _MANY_PROMPT_TOKENS

    def of_prompt(self, generation: Generation, *, first: bool) -> dict[str, Any]:
        """``prompt_token_ids``, which is null except where a choice begins.

        Args:
            generation: of the prompt.
            first: whether a choice begins here.
        """
        if not self._wanted:
            return {}
        return {"prompt_token_ids": self._prompt(generation) if first else None}

    def of(self, output: SampleOutput) -> dict[str, Any]:
        """``token_ids``: all that were generated, also those that a choice's text leaves out."""
        return {"token_ids": output.token_ids} if self._wanted else {}

    def _prompt(self, generation: Generation) -> msgspec.Raw:
        written = self._written.get(generation.request_id)
        if written is None:
            written = msgspec.Raw(msgspec.json.encode(generation.request.prompt_ids.tolist()))
            if len(generation.samples) > 1:  # each of them has the same ids
                self._written[generation.request_id] = written
        return written
