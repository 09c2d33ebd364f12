"""What a language model is to an agent's program: a prompt goes in, a text comes out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from tokasaurus.client.lm.call_log import CallLog
from tokasaurus.client.lm.config import LMConfig

__all__ = ["LLMResponseMetrics", "LanguageModel"]


class LLMResponseMetrics(BaseModel):
    """What one call cost.

    Attributes:
        duration: seconds since the call began, all attempts and waits included.
        input_tokens, output_tokens, total_tokens: as the server counts them.
        thinking_tokens: those of the output that were reasoning; None if the server does not say.
        retries: attempts before the one that succeeded.
        throughput: output tokens per second of the duration.
        temperature: of the request.
    """

    duration: float
    input_tokens: int = 0
    thinking_tokens: int | None = None
    output_tokens: int = 0
    total_tokens: int = 0
    retries: int = 0
    throughput: float = 0.0
    temperature: float | None = None


class LanguageModel(ABC):
    """A language model.

    Args:
        config: its configuration.
        logger: default is the logger named ``language_model``.
    """

    config: LMConfig

    def __init__(self, config: LMConfig, logger: logging.Logger | None = None) -> None:
        self.config = config
        self.logger = logger or logging.getLogger("language_model")
        self._log = CallLog(config.model, self.logger)

    @abstractmethod
    def call(self, system_prompt: str, user_prompt: str) -> str:
        """Answers a prompt."""

    def _begin_call(
        self, system_prompt: str, user_prompt: str, messages: Sequence[Any] | None = None
    ) -> str | None:
        """Logs that a call begins; None if calls are not logged."""
        if not self.config.log_calls:
            return None
        return self._log.begin(system_prompt, user_prompt, messages)

    def _end_call(
        self, call_id: str | None, output: str, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Logs what came of a call."""
        if call_id is not None:
            self._log.end(call_id, output, extra)
