"""Writes ``chat.completion``, and its chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokasaurus.server.operations.logprobs import chat_logprobs
from tokasaurus.server.protocols.chat.request import ChatRequest
from tokasaurus.server.protocols.choices import ChoicesWriter
from tokasaurus.server.protocols.tools.answer import AnswerDeltas
from tokasaurus.server.protocols.tools.parsing import AnswerParser
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["ChatWriter"]


class ChatWriter(ChoicesWriter):
    """Writes the answer.

    Args:
        request: what was asked.
        model: the name in the answer if the request names none.
        tokenizer: spells tokens for logprobs.
        make_parser: makes the parser of an answer that may hold calls or reasoning; None if answers
            are plain text.
    """

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        request: ChatRequest,
        model: str,
        tokenizer: Tokenizer,
        make_parser: Callable[[], AnswerParser] | None = None,
    ) -> None:
        super().__init__(request, model, tokenizer)
        self._ids = request.ids
        self._make_parser = make_parser
        self._answers: dict[int, AnswerDeltas] = {}  # by choice, while it is streamed
        self._num_thought = 0

    def whole(self, generations: Sequence[Generation]) -> bytes:
        if self._make_parser is not None:  # the reasoning of cancelled samples counts, too
            for generation in generations:
                for sample in generation.left_out:
                    self._message(sample.take())
        return super().whole(generations)

    def _num_reasoning_tokens(self) -> int | None:
        return None if self._make_parser is None else self._num_thought

    def _message(self, output: SampleOutput) -> tuple[dict[str, Any], str | None]:
        """The message of a whole answer, and its finish reason."""
        if self._make_parser is None:
            return {"role": "assistant", "content": output.text}, output.finish_reason
        answer = AnswerDeltas(self._make_parser())
        message = answer.message(output.text, output.token_ids)
        self._num_thought += answer.num_reasoning_tokens
        return message, answer.finish_reason(output.finish_reason)

    def _more(self, generations: Sequence[Generation], *, first: bool) -> dict[str, Any]:
        (generation,) = generations
        more = self._token_ids.of_prompt(generation, first=first)
        if self.request.prompt_logprobs is not None:  # and no stream has those
            more["prompt_logprobs"] = self._written_prompt_logprobs(generation)
        return more

    def _choice(self, index: int, generation: Generation, output: SampleOutput) -> dict[str, Any]:
        message, reason = self._message(output)
        return {
            "index": index,
            "message": message,
            "logprobs": self._render_logprobs(output),
            "finish_reason": reason,
        }

    def _delta(
        self, index: int, generation: Generation, output: SampleOutput, *, first: bool
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        reason = output.finish_reason
        if self._make_parser is not None:
            answer = self._answers.get(index)
            if answer is None:
                answer = self._answers[index] = AnswerDeltas(self._make_parser())
            num_before = answer.num_reasoning_tokens
            delta |= answer.delta(output.text, output.token_ids, final=reason is not None)
            self._num_thought += answer.num_reasoning_tokens - num_before
            if reason is not None:
                reason = answer.finish_reason(reason)
                del self._answers[index]
        elif first or output.text:
            delta["content"] = output.text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._render_logprobs(output),
            "finish_reason": reason,
        }

    def _input_ids(self, generations: Sequence[Generation]) -> list[list[int]] | None:
        if self._ids is None:
            return None
        return [self._ids] * len(generations)

    def _render_logprobs(self, output: SampleOutput) -> dict[str, Any] | None:
        if output.logprobs is None or self._packs_logprobs:
            return None
        return chat_logprobs(self.tokenizer, output.token_ids, output.logprobs)
