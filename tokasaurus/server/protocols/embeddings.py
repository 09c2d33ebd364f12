"""``POST /v1/embeddings``: one vector of length 1 for each text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from pydantic import Field

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import ProtocolError, RequestError
from tokasaurus.protocol.arrays import Float32Array
from tokasaurus.protocol.messages import Pooling
from tokasaurus.server.operations.fields import HARMLESS
from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.operations.prompts import Prompts, read_prompts
from tokasaurus.server.operations.schemas import EngineRequest, check_priority
from tokasaurus.server.operations.writer import AnswerWriter
from tokasaurus.text.generation import Generation
from tokasaurus.text.preparation import Preparer

__all__ = ["EMBEDDINGS", "EmbeddingRequest", "embedding", "pooling_named"]

_BOTH = (True, False)
_MANY_VECTORS = 8  # take more than about a millisecond to write


class EmbeddingRequest(EngineRequest):
    """``POST /v1/embeddings``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **HARMLESS,
        "add_generation_prompt": _BOTH,  # there are no messages to add it to
        "chat_template_kwargs": ({},),
        "embed_dtype": ("float32",),
        "embed_override_token_id": (),
        "embed_overrides": (),
        "endianness": ("native", "little"),
        "messages": (),
        "metadata": ({},),
        "normalize": (True,),
        "padding": ("do_not_pad",),
        "service_tier": ("auto", "default"),
        "use_activation": (True,),
    }

    input: Prompts
    """One text or several, as strings or as token ids."""
    add_special_tokens: bool | None = None
    """Add the special tokens that the model expects around a text. Default true."""
    model: str | None = None
    """Any name will do: there is one model. The answer repeats the name."""
    encoding_format: Literal["float", "base64"] | None = None
    """``float``, the default: a list of numbers. ``base64``: little-endian fp32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Keep this many leading elements, and scale the vector to length 1 again. Useful with models
    that were trained for it."""
    pooling: Literal["mean", "last"] | None = None
    """The mean of the last hidden states of all tokens, or the last token's. Default: the engine's
    ``embedding_pooling``."""
    priority: int | None = None
    """Of all requests in the engine, lower runs first; from -1,000,000 to 1,000,000, default 0.

    How far below 0 a client may go is its ``max_request_priority``, by default 0.
    """

    def field_names(self) -> Mapping[str, str]:
        return {"prompt": "input"}

    def within(self, max_priority: int) -> EngineRequest:
        check_priority(self.priority, max_priority)
        return self


def pooling_named(name: str | None, config: ServerConfig) -> Pooling:
    """A kind of pooling by its name, or the default one.

    Raises:
        RequestError: no kind has this name.
    """
    if name is None:
        return config.embedding_pooling
    kinds = {"mean": Pooling.MEAN, "last": Pooling.LAST}
    if name not in kinds:
        raise RequestError(f"pooling must be one of {', '.join(kinds)}, not {name!r}", "pooling")
    return kinds[name]


def embedding(generation: Generation, dimensions: int | None = None) -> Float32Array:
    """The vector of a finished prompt, of length 1.

    Args:
        generation: finished, and prepared for pooling.
        dimensions: leading elements to keep; None for all.

    Raises:
        RequestError: the model's vectors have fewer elements.
    """
    state = generation.pooled_state
    if state is None:
        raise ProtocolError(f"prompt {generation.request_id} ended without its pooled state")
    if dimensions is not None and dimensions > len(state):
        raise RequestError(
            f"dimensions must be from 1 to {len(state)}, not {dimensions}", "dimensions"
        )
    state = state[:dimensions]
    norm = float(np.linalg.norm(state.astype(np.float64)))
    return state / np.float32(norm) if norm > 0 else state


class _EmbeddingWriter(AnswerWriter):
    def __init__(self, request: EmbeddingRequest, model: str) -> None:
        self._request = request
        self._model = model if request.model is None else request.model

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return len(generations) > _MANY_VECTORS

    def whole(self, generations: Sequence[Generation]) -> bytes:
        request = self._request
        vectors = [embedding(each, request.dimensions) for each in generations]
        in_base64 = request.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _in_base64(vector) if in_base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        num_tokens = sum(generation.num_prompt_tokens for generation in generations)
        counts = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        body = {"object": "list", "data": data, "model": self._model, "usage": counts}
        return msgspec.json.encode(body)


def _in_base64(vector: Float32Array) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _prepare(request: EmbeddingRequest, preparer: Preparer) -> Task:
    """Makes a vector of each text."""
    tokenizer, config = preparer.tokenizer, preparer.config
    pooling = pooling_named(request.pooling, config)
    texts = read_prompts("input", request.input)
    special = request.add_special_tokens is not False
    prompts = [
        preparer.prepare_pooling(
            tokenizer.encode(text, add_special_tokens=special) if isinstance(text, str) else text,
            pooling,
            priority=request.priority or 0,
        )
        for text in texts
    ]
    return Task(request, prompts, _EmbeddingWriter(request, config.model_name))


def _num_characters(request: EmbeddingRequest) -> int:
    return sum(map(len, read_prompts("input", request.input)))


EMBEDDINGS = Operation("/v1/embeddings", "embeddings", EmbeddingRequest, _num_characters, _prepare)
