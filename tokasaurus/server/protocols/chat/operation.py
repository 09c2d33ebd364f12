"""The operation ``/v1/chat/completions``."""

from __future__ import annotations

from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.protocols.chat.messages import conversation_size, for_template, rendered
from tokasaurus.server.protocols.chat.request import ChatRequest
from tokasaurus.server.protocols.chat.writer import ChatWriter
from tokasaurus.server.protocols.tools.formats import AnswerFormat
from tokasaurus.text.preparation import CHAT_TEMPERATURE, Preparer

__all__ = ["CHAT"]


def _prepare(request: ChatRequest, preparer: Preparer) -> Task:
    """Answers the last message of a conversation, or goes on with it."""
    tokenizer, config = preparer.tokenizer, preparer.config
    arguments, tools = request.template_arguments, request.offered_tools
    template = ""
    if request.ids is None:
        template = tokenizer.chat_template(arguments, with_tools=bool(tools))
    form = AnswerFormat.of(request, config, template)
    ids = request.ids
    if ids is None:
        told = [tool.for_template() for tool in tools]
        messages = for_template(request.messages or ())
        is_behind = preparer.prefix is not None
        ids = rendered(tokenizer, messages, arguments, told, behind_cartridge=is_behind)
    params = form.enforced(request.params())
    prompt = preparer.prepare(ids, params, default_temperature=CHAT_TEMPERATURE)
    make_parser = form.parser_maker(ids, params, tokenizer)
    writer = ChatWriter(request, config.model_name, tokenizer, make_parser)
    return Task(request, [prompt], writer, writer if request.stream else None)


def _num_characters(request: ChatRequest) -> float:
    messages = [message.size for message in request.messages or ()]
    size = conversation_size(messages, request.template_arguments, request.offered_tools)
    return size + request.num_bad_word_characters


CHAT = Operation("/v1/chat/completions", "chat", ChatRequest, _num_characters, _prepare)
