"""Writes ``text_completion``, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokasaurus.server.operations.logprobs import CompletionLogprobs
from tokasaurus.server.protocols.choices import ChoicesWriter
from tokasaurus.server.protocols.completions.request import CompletionRequest
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["CompletionWriter"]


class CompletionWriter(ChoicesWriter):
    """Writes the answer.

    Args:
        request: what was asked.
        model: the name in the answer if the request names none.
        tokenizer: spells tokens for logprobs.
        echoes: the text of each prompt, if the answer repeats it.
    """

    request: CompletionRequest
    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        request: CompletionRequest,
        model: str,
        tokenizer: Tokenizer,
        echoes: Sequence[str] | None,
    ) -> None:
        super().__init__(request, model, tokenizer)
        self._echoes = echoes
        self._prompt_logprobs: dict[int, list[Any]] = {}  # by prompt
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def _shown(self, output: SampleOutput) -> SampleOutput:
        if not self.request.echoes_only:
            return output
        logprobs = None if output.logprobs is None else output.logprobs[:0]
        reason = None if output.finish_reason is None else "length"
        return SampleOutput(output.index, "", [], logprobs, reason)

    def _num_tokens(self, generation: Generation) -> int:
        return 0 if self.request.echoes_only else super()._num_tokens(generation)

    def _choice(self, index: int, generation: Generation, output: SampleOutput) -> dict[str, Any]:
        choice = self._delta(index, generation, output, first=True)
        if self.request.prompt_logprobs is not None:
            position = index // self.request.num_samples
            if position not in self._prompt_logprobs:
                self._prompt_logprobs[position] = self._written_prompt_logprobs(generation)
            choice["prompt_logprobs"] = self._prompt_logprobs[position]
        return choice

    def _delta(
        self, index: int, generation: Generation, output: SampleOutput, *, first: bool
    ) -> dict[str, Any]:
        text = output.text
        if first and self._echoes is not None:
            text = self._echoes[index // self.request.num_samples] + text
        return {
            "index": index,
            "text": text,
            "logprobs": self._render_logprobs(index, generation, output, first=first),
            "finish_reason": output.finish_reason,
            **self._token_ids.of_prompt(generation, first=first),
        }

    def _render_logprobs(
        self, index: int, generation: Generation, output: SampleOutput, *, first: bool
    ) -> dict[str, Any] | None:
        if output.logprobs is None or self._packs_logprobs:
            return None
        if first:
            self._logprobs[index] = CompletionLogprobs(self.tokenizer)
        writer = self._logprobs[index]
        if output.finish_reason is not None:
            del self._logprobs[index]
        prompt = generation.prompt_logprobs
        if first and self._echoes is not None and prompt is not None:
            prompt = prompt.narrowed(self.request.num_logprobs or 0)
            prompt_ids = generation.request.prompt_ids.tolist()
            return writer.prompt_and_generated(
                prompt_ids, prompt, output.token_ids, output.logprobs
            )
        return writer.generated(output.token_ids, output.logprobs)
