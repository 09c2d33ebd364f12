"""The operation ``/v1/responses``."""

from __future__ import annotations

import time
from typing import Any

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.protocols.chat.messages import conversation_size, rendered
from tokasaurus.server.protocols.responses.request import LOGPROBS, ResponsesRequest
from tokasaurus.server.protocols.responses.writer import ResponsesWriter
from tokasaurus.server.protocols.tools.formats import AnswerFormat
from tokasaurus.text.preparation import CHAT_TEMPERATURE, PreparedRequest, Preparer

__all__ = ["RESPONSES"]


def _head(request: ResponsesRequest, prompt: PreparedRequest, model: str) -> dict[str, Any]:
    """The fields of a response that repeat its request.

    Args:
        request: what was asked.
        prompt: as prepared, with a value for everything that the client left out.
        model: the name in the answer if the request names none.
    """
    choice = request.tool_choice or "auto"
    effort = None if request.reasoning is None else request.reasoning.effort
    return {
        "id": request.request_id or request.answer_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model if request.model is None else request.model,
        "background": False,
        "error": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": prompt.sampling.temperature,
        "text": _text(request),
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": prompt.sampling.top_p,
        "truncation": "disabled",
        "user": request.user,
        **request.echoed(),
    }


def _text(request: ResponsesRequest) -> dict[str, Any]:
    if request.text is None or request.text.format is None:
        return {"format": {"type": "text"}}
    return {"format": request.text.format.model_dump(by_alias=True, exclude_none=True)}


def _prepare(request: ResponsesRequest, preparer: Preparer) -> Task:
    """Answers the last message of a conversation."""
    tokenizer, config = preparer.tokenizer, preparer.config
    tools, arguments = request.offered_tools, request.template_arguments
    form = AnswerFormat.of(
        request, config, tokenizer.chat_template(arguments, with_tools=bool(tools))
    )
    told = [tool.for_template() for tool in tools]
    is_behind = preparer.prefix is not None
    ids = rendered(tokenizer, request.messages(), arguments, told, behind_cartridge=is_behind)
    params = form.enforced(request.params())
    prompt = preparer.prepare(ids, params, default_temperature=CHAT_TEMPERATURE)
    make_parser = form.parser_maker(ids, params, tokenizer)
    with_logprobs = request.num_logprobs is not None
    if with_logprobs and make_parser is not None:
        raise RequestError(
            f"include cannot name {LOGPROBS!r} where an answer may hold calls or reasoning besides"
            " text",
            "include",
        )
    writer = ResponsesWriter(
        _head(request, prompt, config.model_name),
        tokenizer,
        None if make_parser is None else make_parser(),
        with_logprobs=with_logprobs,
    )
    return Task(request, [prompt], writer, writer if request.stream else None)


def _num_characters(request: ResponsesRequest) -> float:
    items = (
        [request.input] if isinstance(request.input, str) else [item.text for item in request.input]
    )
    sizes = [len(text) for text in (request.instructions or "", *items)]
    size = conversation_size(sizes, request.template_arguments, request.offered_tools)
    return size + request.num_bad_word_characters


RESPONSES = Operation("/v1/responses", "chat", ResponsesRequest, _num_characters, _prepare)
