"""What a client can ask the engine for: the table of all operations, and OpenAI's two that generate text."""

from __future__ import annotations

from collections.abc import Mapping

from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.protocols.chat import ChatRequest, conversation_size, for_template
from tokasaurus.server.protocols.completions import CompletionRequest
from tokasaurus.server.protocols.embeddings import EMBEDDINGS
from tokasaurus.server.protocols.generate import GENERATE
from tokasaurus.server.protocols.openai_writers import ChatRenderer, CompletionRenderer
from tokasaurus.server.protocols.responses.request import RESPONSES
from tokasaurus.server.protocols.tools.formats import AnswerFormat
from tokasaurus.text.preparation import CHAT_TEMPERATURE, Preparer

__all__ = ["OPERATIONS"]


def _prepare_completion(body: CompletionRequest, preparer: Preparer) -> Task:
    """Continues prompts."""
    tokenizer, config = preparer.tokenizer, preparer.config
    prompts = body.prompts()
    ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    prepared = [
        preparer.prepare(each, body.params_for(len(each), config.max_request_tokens))
        for each in ids
    ]
    echoes = None
    if body.echo:  # the ids are known to exist by now
        echoes = [p if isinstance(p, str) else tokenizer.decode_prompt(p) for p in prompts]
    renderer = CompletionRenderer(body, config.model_name, tokenizer, echoes)
    return Task(body, prepared, renderer)


def _prepare_chat(body: ChatRequest, preparer: Preparer) -> Task:
    """Answers the last message of a conversation, or goes on with it."""
    tokenizer, config = preparer.tokenizer, preparer.config
    arguments, tools = body.template_arguments, body.offered_tools
    template = ""
    if body.ids is None:
        template = tokenizer.chat_template(arguments, with_tools=bool(tools))
    form = AnswerFormat.of(body, config, template)
    ids = body.ids
    if ids is None:
        told = [tool.for_template() for tool in tools]
        ids = tokenizer.render_chat(for_template(body.messages or ()), arguments, told)
    params = form.enforced(body.params())
    prepared = preparer.prepare(ids, params, default_temperature=CHAT_TEMPERATURE)
    make_parser = form.parser_maker(ids, params, tokenizer)
    renderer = ChatRenderer(body, config.model_name, tokenizer, make_parser)
    return Task(body, [prepared], renderer)


def _completion_characters(body: CompletionRequest) -> int:
    prompts = body.prompts()
    return sum(map(len, prompts)) + len(prompts) * body.num_bad_word_characters


def _chat_characters(body: ChatRequest) -> float:
    messages = [message.size for message in body.messages or ()]
    size = conversation_size(messages, body.template_arguments, body.offered_tools)
    return size + body.num_bad_word_characters


OPERATIONS: Mapping[str, Operation] = {
    each.path: each
    for each in (
        Operation(
            "/v1/completions", CompletionRequest, _completion_characters, _prepare_completion
        ),
        Operation("/v1/chat/completions", ChatRequest, _chat_characters, _prepare_chat),
        EMBEDDINGS,
        GENERATE,
        RESPONSES,
    )
}
