"""The engine's own protocol for ``POST /generate``.

Text or ids go in; text, ids, logprobs, usage and a finish reason come out. The simplest request is
``{"prompt": "...", "system": "..."}``, and its answer has the ``text``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import WithJsonSchema

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.heavy_work import takes_long
from tokasaurus.server.operations.logprobs import finite
from tokasaurus.server.operations.prompts import TOKEN_IDS
from tokasaurus.server.operations.receipts import receipt_field
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.server.operations.usage import usage
from tokasaurus.server.operations.versions import versions_field
from tokasaurus.server.operations.writer import DONE, StreamWriter, event
from tokasaurus.text.generation import Generation
from tokasaurus.text.preparation import CHAT_TEMPERATURE, PreparedRequest, Preparer
from tokasaurus.text.samples import SampleOutput, TokenLogprobs
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["NativeRequest", "NativeWriter", "prepare_native"]


class NativeRequest(GenerationRequest):
    """``POST /generate`` with a ``prompt``."""

    key_fields: ClassVar[tuple[str, ...]] = ("prompt",)
    streams_prompt_logprobs: ClassVar[bool] = True

    prompt: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, TOKEN_IDS]})]
    """The user's message, for the model's chat template; or the prompt's token ids as they are."""
    system: str | None = None
    """The system message before it."""
    logprobs: int | None = None
    """Of generated tokens: 0 is the chosen token's, k also those of the k likeliest tokens."""

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def field_names(self) -> Mapping[str, str]:
        return {**super().field_names(), "messages": "prompt"}

    def check(self) -> None:
        super().check()
        if isinstance(self.prompt, list):
            if not all(type(each) is int for each in self.prompt):
                raise _wrong_prompt()
            if self.system is not None:
                raise RequestError("system has no place in a prompt of token ids", "system")
        elif not isinstance(self.prompt, str):
            raise _wrong_prompt()
        if self.logprobs_in_fingerprint:
            raise RequestError(
                "logprobs_in_fingerprint has no fingerprint to go into here: ask for logprobs",
                "logprobs_in_fingerprint",
            )
        if self.return_token_ids:
            raise RequestError(
                "return_token_ids has no effect here: the ids are always in output_ids and"
                " prompt_ids",
                "return_token_ids",
            )
        if self.stream_options is not None:
            raise RequestError(
                "stream_options has no effect here: every event of a stream tells the usage so far",
                "stream_options",
            )

    def ids(self, tokenizer: Tokenizer, *, behind_cartridge: bool = False) -> list[int]:
        """The prompt's tokens. Raises RequestError."""
        if isinstance(self.prompt, list):
            return self.prompt
        messages = [{"role": "user", "content": self.prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return tokenizer.render_chat(messages, behind_cartridge=behind_cartridge)


class NativeWriter(StreamWriter):
    """Writes the answer.

    Args:
        request: what was asked.
        model: the name in the answer if the request names none.
    """

    def __init__(self, request: NativeRequest, model: str) -> None:
        self._request = request
        self._num_streamed_tokens = 0
        self._has_begun = False
        self.answer_id = request.answer_id("gen-")
        self._head = {
            "id": self.answer_id,
            "created": int(time.time()),
            "model": model if request.model is None else request.model,
            **request.echoed(),
        }

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return takes_long(generations, self._request.num_logprobs is not None)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        (generation,) = generations
        outputs = generation.take_all()
        body = {
            **self._head,
            **self._sample(generation, outputs[0]),
            "prompt_ids": generation.request.prompt_ids.tolist(),
            "prompt_logprobs": _prompt_logprobs(generation),
            **receipt_field(generations),
            "usage": usage(generations, generation.num_generated_tokens),
        }
        if len(outputs) > 1:
            body["samples"] = [self._sample(generation, output) for output in outputs]
        return msgspec.json.encode(body)

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        self._num_streamed_tokens += len(output.token_ids)
        body = {
            **self._head,
            **self._sample(generations[position], output),
            "usage": usage(generations, self._num_streamed_tokens),
        }
        if not self._has_begun:
            body["prompt_ids"] = generations[position].request.prompt_ids.tolist()
            body["prompt_logprobs"] = _prompt_logprobs(generations[position])
            self._has_begun = True
        return event(body)

    def end(self, generations: Sequence[Generation]) -> bytes:
        receipt = receipt_field(generations)
        if not receipt:
            return DONE
        counts = usage(generations, self._num_streamed_tokens)
        return event({**self._head, **receipt, "usage": counts}) + DONE

    def _sample(self, generation: Generation, output: SampleOutput) -> dict[str, Any]:
        """One sample, or the next piece of it."""
        sample = {
            "index": output.index,
            "text": output.text,
            "output": output.text,  # clients look for either name
            "output_ids": output.token_ids,
            "logprobs": None if output.logprobs is None else _logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
        }
        return {
            **sample,
            **versions_field(generation, output, self._request.return_weights_versions),
        }


def prepare_native(request: NativeRequest, preparer: Preparer) -> PreparedRequest:
    """The prompt, ready to run. Raises RequestError."""
    ids = request.ids(preparer.tokenizer, behind_cartridge=preparer.prefix is not None)
    return preparer.prepare(ids, request.params(), default_temperature=CHAT_TEMPERATURE)


def _prompt_logprobs(generation: Generation) -> Mapping[str, list[Any]] | None:
    logprobs = generation.prompt_logprobs
    return None if logprobs is None else _logprobs(logprobs, after_first=True)


def _logprobs(values: TokenLogprobs, *, after_first: bool = False) -> Mapping[str, list[Any]]:
    """One column of each kind, over tokens; a prompt's first token has no logprob."""
    first: list[None] = [None] if after_first else []
    return {
        "token_logprobs": [*first, *finite(values.logprobs)],
        "top_ids": [*first, *values.top_ids.tolist()],
        "top_logprobs": [*first, *finite(values.top_logprobs)],
    }


def _wrong_prompt() -> RequestError:
    return RequestError("prompt must be a string or a list of token ids", "prompt")
