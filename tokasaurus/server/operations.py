"""What a client can ask the engine to generate: one ``Operation`` for each kind of request.

An operation turns a request into prompts that can run and a renderer of their outputs. It knows nothing of
where the request came from, an HTTP connection or a line of a batch: ``Answers`` carries it out for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokasaurus.errors import RequestError
from tokasaurus.server.generation import Generations, PreparedRequest
from tokasaurus.server.params import renamed
from tokasaurus.server.render import ChatRenderer, CompletionRenderer, Renderer
from tokasaurus.server.schemas import ChatRequest, CompletionRequest, GenerationRequest

__all__ = ["OPERATIONS", "Operation", "Task"]

_CHAT_TEMPERATURE = 0.7
_COMPLETION_TEMPERATURE = 1.0


@dataclass(frozen=True, eq=False)
class Task:
    """A request that can run: a prompt each, and who writes the answer."""

    body: GenerationRequest
    prompts: Sequence[PreparedRequest]
    renderer: Renderer


@dataclass(frozen=True)
class Operation:
    """One kind of request.

    Args:
        path: of its route; a batch's lines name it too.
        schema: of its JSON.
        num_characters: of a request, to tokenize: many are left to a thread.
        prepare: makes a task of a request; may take a while. Raises RequestError.
    """

    path: str
    schema: type[GenerationRequest]
    num_characters: Callable[[Any], int]
    prepare: Callable[[Any, Generations], Task]

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self.prepare.__doc__ or "").strip()


def _prepare_completion(body: CompletionRequest, generations: Generations) -> Task:
    """Continues prompts."""
    tokenizer, config = generations.tokenizer, generations.config
    prompts = body.prompts()
    ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    echoes = None
    if body.echo:
        echoes = [p if isinstance(p, str) else tokenizer.decode_prompt(p) for p in prompts]
    prepared = [
        generations.prepare(
            each,
            body.params_for(len(each), config.max_request_tokens),
            default_temperature=_COMPLETION_TEMPERATURE,
            client_key=body.user,
        )
        for each in ids
    ]
    renderer = CompletionRenderer(body, config.model_name, tokenizer, echoes)
    return Task(body, prepared, renderer)


def _prepare_chat(body: ChatRequest, generations: Generations) -> Task:
    """Answers the last message of a conversation, or goes on with it."""
    ids = body.ids
    if ids is None:
        messages = [message.for_template() for message in body.messages or ()]
        ids = generations.tokenizer.render_chat(messages, body.apply_chat_template_overrides)
    try:
        prepared = generations.prepare(
            ids, body.params(), default_temperature=_CHAT_TEMPERATURE, client_key=body.user
        )
    except RequestError as error:
        raise renamed(error, body.field_names()) from None
    renderer = ChatRenderer(body, generations.config.model_name, generations.tokenizer)
    return Task(body, [prepared], renderer)


def _completion_characters(body: CompletionRequest) -> int:
    return sum(map(len, body.prompts()))


def _chat_characters(body: ChatRequest) -> int:
    return sum(len(message.for_template()["content"]) for message in body.messages or ())


OPERATIONS: Mapping[str, Operation] = {
    each.path: each
    for each in (
        Operation(
            "/v1/completions", CompletionRequest, _completion_characters, _prepare_completion
        ),
        Operation("/v1/chat/completions", ChatRequest, _chat_characters, _prepare_chat),
    )
}
