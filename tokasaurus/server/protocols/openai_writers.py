"""The JSON that clients get: whole answers and chunks of a stream. Knows nothing of sockets.

A choice's index is ``prompt_index * n + sample_index``, also where choices are missing because
``first_k`` others ended before them. Bodies are one line each, since some clients read even whole answers
line by line.
"""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tokasaurus.server.operations.logprobs import (
    CompletionLogprobs,
    chat_logprobs,
    fingerprint,
    prompt_logprobs,
)
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.server.operations.usage import usage
from tokasaurus.server.operations.writer import DONE, StreamWriter, event
from tokasaurus.server.protocols.chat import ChatRequest
from tokasaurus.server.protocols.completions import CompletionRequest
from tokasaurus.server.protocols.tools.answer import AnswerDeltas
from tokasaurus.server.protocols.tools.parsing import AnswerParser
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["ChatRenderer", "CompletionRenderer", "takes_long"]

# What takes longer than about a millisecond to turn into text and JSON.
_MANY_TOKENS = 8_000
_MANY_LOGPROBS = 200


class Renderer(StreamWriter):
    """Writes OpenAI's answers; what the two endpoints have in common.

    Args:
        request: what was asked.
        model: the name to answer with where the request has none.
        tokenizer: spells tokens for logprobs.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, request: GenerationRequest, model: str, tokenizer: Tokenizer) -> None:
        options = request.stream_options
        self.request = request
        self.tokenizer = tokenizer
        self._includes_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._packs_logprobs = bool(request.logprobs_in_fingerprint)
        self._num_streamed_tokens = 0
        self._begun: set[int] = set()  # choices of which a chunk was sent
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model if request.model is None else request.model,
            **request.echoed(),
        }

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return takes_long(generations, self.request.num_logprobs is not None)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        choices, outputs = [], []
        for position, generation in enumerate(generations):
            for output in generation.take_all():
                index = position * self.request.num_samples + output.index
                choices.append(self._choice(index, generation, output))
                outputs.append(output)
        num_tokens = sum(generation.num_generated_tokens for generation in generations)
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole_object,
                "choices": choices,
                **self._more(generations),
                "usage": usage(generations, num_tokens, self._num_reasoning_tokens()),
                "system_fingerprint": fingerprint(
                    outputs, packed=self._packs_logprobs, input_ids=self._input_ids(generations)
                ),
            }
        )

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        # Its fingerprint carries the ids that this chunk brings.
        index = position * self.request.num_samples + output.index
        first = index not in self._begun
        choice = self._delta(index, generations[position], output, first=first)
        self._begun.add(index)
        self._num_streamed_tokens += len(output.token_ids)
        body = {
            **self._head,
            "object": self.chunk_object,
            "choices": [choice],
            "system_fingerprint": fingerprint(
                [output],
                packed=self._packs_logprobs,
                input_ids=self._input_ids([generations[position]]) if first else None,
            ),
        }
        if self._continuous_usage:
            body["usage"] = self._streamed_usage(generations)
        elif self._includes_usage:
            body["usage"] = None
        return event(body)

    def end(self, generations: Sequence[Generation]) -> bytes:
        if not self._includes_usage:
            return DONE
        counts = self._streamed_usage(generations)
        body = {**self._head, "object": self.chunk_object, "choices": [], "usage": counts}
        return event(body) + DONE

    def _streamed_usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        return usage(generations, self._num_streamed_tokens, self._num_reasoning_tokens())

    def _written_prompt_logprobs(self, generation: Generation) -> list[Any]:
        values, ranks = generation.prompt_logprobs, generation.prompt_ranks
        assert values is not None
        assert ranks is not None
        values = values.narrowed(self.request.prompt_logprobs or 0)
        ids = generation.request.prompt_ids.tolist()
        return prompt_logprobs(self.tokenizer, ids, values, ranks)

    def _more(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """What only this endpoint's whole answers have beside the choices."""
        return {}

    def _num_reasoning_tokens(self) -> int | None:
        """Of all tokens so far; None where nothing is said of them."""
        return None

    def _input_ids(self, generations: Sequence[Generation]) -> list[list[int]] | None:
        """What the fingerprint says of the prompts; nothing but for the endpoint that takes their ids."""
        return None

    @abstractmethod
    def _choice(self, index: int, generation: Generation, output: SampleOutput) -> dict[str, Any]:
        """One of a whole answer's choices."""

    @abstractmethod
    def _delta(
        self, index: int, generation: Generation, output: SampleOutput, *, first: bool
    ) -> dict[str, Any]:
        """What a chunk brings of a choice; ``first`` if it is the first one of that."""


class CompletionRenderer(Renderer):
    """``text_completion``, whole and in chunks.

    Args:
        request: what was asked.
        model: the name to answer with where the request has none.
        tokenizer: spells tokens for logprobs.
        echoes: the text of each prompt, if it is to be repeated.
    """

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
        self._prompt_logprobs: dict[int, list[Any]] = {}  # of each prompt, for all its choices
        self._logprobs: dict[int, CompletionLogprobs] = {}  # of choices that are being streamed

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


class ChatRenderer(Renderer):
    """``chat.completion`` and its chunks.

    Args:
        request: what was asked.
        model: the name to answer with where the request has none.
        tokenizer: spells tokens for logprobs.
        make_parser: of each answer, for its calls and its reasoning; None if it is text and no more.
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
        self._answers: dict[int, AnswerDeltas] = {}  # of choices that are being streamed
        self._num_thought = 0

    def whole(self, generations: Sequence[Generation]) -> bytes:
        if self._make_parser is not None:  # what was cancelled counts, too
            for sample in (each for generation in generations for each in generation.samples):
                if sample.was_cancelled:
                    self._message(sample.take())
        return super().whole(generations)

    def _num_reasoning_tokens(self) -> int | None:
        return None if self._make_parser is None else self._num_thought

    def _message(self, output: SampleOutput) -> tuple[dict[str, Any], str | None]:
        """A whole answer, and why it ended."""
        if self._make_parser is None:
            return {"role": "assistant", "content": output.text}, output.finish_reason
        answer = AnswerDeltas(self._make_parser())
        message = answer.message(output.text, output.token_ids)
        self._num_thought += answer.num_reasoning_tokens
        return message, answer.finish_reason(output.finish_reason)

    def _more(self, generations: Sequence[Generation]) -> dict[str, Any]:
        if self.request.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": self._written_prompt_logprobs(generations[0])}

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


def takes_long(generations: Sequence[Generation], with_logprobs: bool) -> bool:
    """Whether it takes more than about a millisecond to write down all that was generated."""
    size = sum(generation.num_generated_tokens for generation in generations)
    if generations[0].prompt_logprobs is not None:
        size += sum(generation.num_prompt_tokens for generation in generations)
        with_logprobs = True
    return size > (_MANY_LOGPROBS if with_logprobs else _MANY_TOKENS)
