"""``POST /v1/completions``: what clients send."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.prompts import Prompts, read_prompts
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.text.params import SamplingParams

__all__ = ["CompletionRequest"]

_MAX_TOKENS = 16  # OpenAI's default


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Prompts
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    """Only 1 or ``n``: every sample is returned."""
    add_special_tokens: bool | None = None
    """Add the special tokens that the model expects around a text. Default true, or false behind
    cartridges, which begin with them."""

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def token_limit(self) -> int | None:
        return 1 if self.echoes_only else self.max_tokens

    @property
    def echoes_only(self) -> bool:
        """Whether the answer is the prompt alone. The one token that the engine draws is dropped.

        This is how programs once asked for the logprobs of a text.
        """
        return bool(self.echo) and self.max_tokens == 0

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, 1, self.num_samples):
            raise RequestError(
                f"best_of is not supported with the value {self.best_of}: every sample is returned;"
                " ask for n samples",
                "best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1, or 0 with echo", "max_tokens")
        if self.echoes_only and self.min_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens, which is 0, not {self.min_tokens}",
                "min_tokens",
            )
        if self.echo and self.logprobs_in_fingerprint:
            raise RequestError(
                "logprobs_in_fingerprint has no place for the prompt's logprobs that echo asks for",
                "logprobs_in_fingerprint",
            )

    def prompts(self) -> list[str | list[int]]:
        """One or several, as text or as ids. Raises RequestError if the field has another shape."""
        return read_prompts("prompt", self.prompt, self.num_samples)

    def params_for(self, num_prompt_tokens: int, max_request_tokens: int) -> SamplingParams:
        """The parameters for one prompt, with a limit even if the client set none."""
        params = self.params()
        changes: dict[str, Any] = {}
        if params.max_tokens is None:
            room = max_request_tokens - num_prompt_tokens
            changes["max_tokens"] = max(1, min(_MAX_TOKENS, room))
        if self.echo and params.logprobs is not None:
            changes["prompt_logprobs"] = max(params.logprobs, params.prompt_logprobs or 0)
        return dataclasses.replace(params, **changes) if changes else params
