"""What the answers of completions and chat have in common: choices, usage, and chunks of a stream.

A choice's index is ``prompt_index * n + sample_index``, also where choices are missing because
``first_k`` others ended before them. Bodies are one line each, since some clients read even whole
answers line by line.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from tokasaurus.server.operations.heavy_work import takes_long
from tokasaurus.server.operations.logprobs import fingerprint, prompt_logprobs
from tokasaurus.server.operations.receipts import receipt_field
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.server.operations.token_ids import TokenIds
from tokasaurus.server.operations.usage import usage
from tokasaurus.server.operations.versions import versions_field
from tokasaurus.server.operations.writer import DONE, StreamWriter, event
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["ChoicesWriter"]


class ChoicesWriter(StreamWriter):
    """Writes OpenAI's answers with choices.

    Args:
        request: what was asked.
        model: the name in the answer if the request names none.
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
        self._token_ids = TokenIds(request.return_token_ids)
        self._num_streamed_tokens = 0
        self._begun: set[int] = set()  # choices that have had a chunk
        self.answer_id = request.answer_id(f"{self.id_prefix}-")
        self._head = {
            "id": self.answer_id,
            "created": int(time.time()),
            "model": model if request.model is None else request.model,
            **request.echoed(),
        }

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        is_long = takes_long(generations, self.request.num_logprobs is not None)
        return is_long or self._token_ids.take_long(generations)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        choices, outputs = [], []
        for position, generation in enumerate(generations):
            for output in map(self._shown, generation.take_all()):
                index = position * self.request.num_samples + output.index
                choice = self._choice(index, generation, output)
                choices.append(self._completed(choice, generation, output))
                outputs.append(output)
        num_tokens = sum(map(self._num_tokens, generations))
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole_object,
                "choices": choices,
                **self._more(generations, first=True),
                **receipt_field(generations),
                "usage": usage(generations, num_tokens, self._num_reasoning_tokens()),
                "system_fingerprint": fingerprint(
                    outputs, packed=self._packs_logprobs, input_ids=self._input_ids(generations)
                ),
            }
        )

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        output = self._shown(output)
        # The fingerprint carries the ids in this chunk.
        index = position * self.request.num_samples + output.index
        first = index not in self._begun
        choice = self._delta(index, generations[position], output, first=first)
        choice = self._completed(choice, generations[position], output)
        self._begun.add(index)
        self._num_streamed_tokens += len(output.token_ids)
        body = {
            **self._head,
            "object": self.chunk_object,
            "choices": [choice],
            **self._more([generations[position]], first=first),
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
        last = receipt_field(generations)
        if self._includes_usage:
            last["usage"] = self._streamed_usage(generations)
        if not last:
            return DONE
        return event({**self._head, "object": self.chunk_object, "choices": [], **last}) + DONE

    def _completed(
        self, choice: dict[str, Any], generation: Generation, output: SampleOutput
    ) -> dict[str, Any]:
        """A choice with the fields that all protocols have."""
        return {
            **choice,
            **self._token_ids.of(output),
            **versions_field(generation, output, self.request.return_weights_versions),
        }

    def _streamed_usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        return usage(generations, self._num_streamed_tokens, self._num_reasoning_tokens())

    def _written_prompt_logprobs(self, generation: Generation) -> list[Any]:
        values, ranks = generation.prompt_logprobs, generation.prompt_ranks
        assert values is not None
        assert ranks is not None
        values = values.narrowed(self.request.prompt_logprobs or 0)
        ids = generation.request.prompt_ids.tolist()
        return prompt_logprobs(self.tokenizer, ids, values, ranks)

    def _shown(self, output: SampleOutput) -> SampleOutput:
        """What the client gets of the output of a sample."""
        return output

    def _num_tokens(self, generation: Generation) -> int:
        """The generated tokens that the usage of a whole answer counts."""
        return generation.num_generated_tokens

    def _more(self, generations: Sequence[Generation], *, first: bool) -> dict[str, Any]:
        """Fields beside the choices that only this protocol has; ``first`` where one begins."""
        return {}

    def _num_reasoning_tokens(self) -> int | None:
        """The reasoning tokens among all tokens so far; None leaves the field out."""
        return None

    def _input_ids(self, generations: Sequence[Generation]) -> list[list[int]] | None:
        """The ids of the prompts for the fingerprint; None leaves them out."""
        return None

    @abstractmethod
    def _choice(self, index: int, generation: Generation, output: SampleOutput) -> dict[str, Any]:
        """One choice of a whole answer."""

    @abstractmethod
    def _delta(
        self, index: int, generation: Generation, output: SampleOutput, *, first: bool
    ) -> dict[str, Any]:
        """One choice of a chunk; ``first`` if it is the choice's first chunk."""
