"""What a program needs of an engine, however many processes it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from tokasaurus.config.slices import ServerConfig
from tokasaurus.protocol.messages import Pooling
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import CHAT_TEMPERATURE, PreparedRequest, Preparer
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["Conversation", "ProgramEngine", "Prompt"]

Prompt: TypeAlias = str | Sequence[int]
"""A text, or its token ids."""
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages, each ``{"role": ..., "content": ...}``."""


class ProgramEngine:
    """Prepares requests, and holds those in flight.

    Attributes:
        config: the server's slice.
        preparer: checks requests, in any thread.
        generations: the table of prompts in flight.
    """

    config: ServerConfig
    preparer: Preparer
    generations: Generations

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.preparer.tokenizer

    def prepare(self, prompt: Prompt, params: SamplingParams) -> PreparedRequest:
        """Checks a prompt, in any thread. Raises RequestError if it cannot run."""
        return self.preparer.prepare(self._ids(prompt), params)

    def prepare_chat(
        self,
        conversation: Conversation,
        params: SamplingParams,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> PreparedRequest:
        """Writes a conversation with the chat template and checks it, in any thread.

        Raises:
            RequestError: it cannot run, or the template refuses it.
        """
        ids = self.tokenizer.render_chat(conversation, template_arguments)
        return self.preparer.prepare(ids, params, default_temperature=CHAT_TEMPERATURE)

    def prepare_embedding(self, prompt: Prompt, pooling: Pooling) -> PreparedRequest:
        """The same as ``prepare``, for a prompt that is made into a vector."""
        return self.preparer.prepare_pooling(self._ids(prompt), pooling)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
