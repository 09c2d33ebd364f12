"""``POST /v1/responses``: OpenAI's Responses API, without anything that a server would have to remember.

A conversation comes whole with each request: nothing is stored, so that there is no response to go on from, to
look up or to delete.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.fields import HARMLESS
from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.server.protocols.chat import conversation_size
from tokasaurus.server.protocols.responses.items import (
    FunctionChoice,
    FunctionTool,
    InputItem,
    for_template,
)
from tokasaurus.server.protocols.responses.writer import ResponsesWriter
from tokasaurus.server.protocols.tools.formats import AnswerFormat
from tokasaurus.server.protocols.tools.request import Tool, ToolChoice, check_tools
from tokasaurus.text.preparation import CHAT_TEMPERATURE, PreparedRequest, Preparer
from tokasaurus.text.structured_output import FIELD as STRUCTURED_OUTPUTS

__all__ = ["RESPONSES", "ResponsesRequest"]

_LOGPROBS = "message.output_text.logprobs"  # what ``include`` may name


class TextFormat(StrictSchema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: str | None = None
    """Of the schema, for people; so is the description."""
    description: str | None = None
    strict: bool | None = None
    """A schema holds whether or not it is strict."""


class TextOptions(StrictSchema):
    format: TextFormat | None = None
    verbosity: None = None

    @property
    def form(self) -> Mapping[str, Any] | None:
        """What the text must be, in the words of ``SamplingParams``; None if it is free."""
        if self.format is None or self.format.type == "text":
            return None
        if self.format.type == "json_object":
            return {"json_object": True}
        return {"json": self.format.json_schema}


Input: TypeAlias = str | Annotated[list[InputItem], Field(min_length=1)]

_NOT_HERE = {
    "n": "a response is one sample; ask /v1/chat/completions for more",
    "first_k": "a response is one sample",
    "max_tokens": "it is called max_output_tokens here",
    "logprobs_in_fingerprint": "a response has no fingerprint",
    "prompt_logprobs": "a response has no place for them",
    "response_format": "it is called text.format here",
    "stream_options": "a stream of responses always ends with the usage",
}


class ResponsesRequest(GenerationRequest):
    """``POST /v1/responses``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{name: HARMLESS[name] for name in ("lora_path", "cartridges", "safety_identifier")},
        **{name: each for name, each in HARMLESS.items() if name.startswith("prompt_cache")},
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({},),
        "store": (False,),
        "truncation": ("disabled",),
    }

    input: Input
    """What the user says, or a conversation."""
    instructions: str | None = None
    """A system message before it."""
    max_output_tokens: int | None = None
    """Default: the rest of the context."""
    text: TextOptions | None = None
    """What the text must be: ``{"format": {"type": "json_schema", "name": ..., "schema": ...}}``, or json_object."""
    include: list[Literal["message.output_text.logprobs"]] | None = None
    """Say the logprobs of the answer's tokens."""
    top_logprobs: int | None = None
    """And those of so many likeliest tokens."""
    tools: list[FunctionTool] | None = None
    """What the model may call."""
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    """Default ``auto``: the model decides. ``required`` and a named function are enforced by a grammar."""
    parallel_tool_calls: bool | None = None
    """False: one call at most. Default true."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments for the tokenizer's ``apply_chat_template``, such as ``enable_thinking``."""

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def offered_tools(self) -> list[Tool]:
        """What the model is told of."""
        return [] if self.tool_choice == "none" else [tool.as_tool for tool in self.tools or ()]

    @property
    def enforced_choice(self) -> str | ToolChoice | None:
        """What it must call; None if that is left to it."""
        if isinstance(self.tool_choice, FunctionChoice):
            return self.tool_choice.as_choice
        return "required" if self.tool_choice == "required" else None

    @property
    def needs_grammar(self) -> bool:
        return super().needs_grammar or self.enforced_choice is not None

    def field_names(self) -> Mapping[str, str]:
        return {
            **({} if self.enforced_choice is None else {STRUCTURED_OUTPUTS: "tools"}),
            **super().field_names(),
            "logprobs": "top_logprobs",
            "max_tokens": "max_output_tokens",
            "messages": "input",
            "prompt": "input",
        }

    def check(self) -> None:
        for name, reason in _NOT_HERE.items():
            value = getattr(self, name)
            if value is not None and not (name == "n" and value == 1):
                raise RequestError(f"{name} is not supported: {reason}", name)
        super().check()
        form = None if self.text is None else self.text.form
        if form is not None and super()._form[0] is not None:
            raise RequestError(
                f"text cannot be combined with {super()._form[0]}: both say what the text must be", "text"
            )
        format_ = None if self.text is None else self.text.format
        if format_ and format_.type != "json_schema" and format_.json_schema is not None:
            raise RequestError(f"text.format of type {format_.type} has no schema", "text")
        if form == {"json": None}:
            raise RequestError("text.format of type json_schema must have a schema", "text")
        choice = self.enforced_choice or self.tool_choice
        assert not isinstance(choice, FunctionChoice)
        check_tools([tool.as_tool for tool in self.tools or ()], choice, self.form_field)
        if self.top_logprobs and not self.include:
            raise RequestError(f"top_logprobs needs include to name {_LOGPROBS!r}", "top_logprobs")

    @property
    def _form(self) -> tuple[str | None, Mapping[str, Any] | None]:
        form = None if self.text is None else self.text.form
        return super()._form if form is None else ("text", form)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, for the chat template. Raises RequestError."""
        if isinstance(self.input, str):
            messages: list[dict[str, Any]] = [{"role": "user", "content": self.input}]
        else:
            messages = for_template(self.input)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return messages


def _head(request: ResponsesRequest, prepared: PreparedRequest, model: str) -> dict[str, Any]:
    """What a response says of its request.

    Args:
        request: what was asked.
        prepared: its prompt, with everything decided that the client left open.
        model: the name to answer with where the request has none.
    """
    choice = request.tool_choice or "auto"
    return {
        "id": f"resp_{uuid.uuid4().hex}",
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
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": prepared.sampling.temperature,
        "text": _text(request),
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": prepared.sampling.top_p,
        "truncation": "disabled",
        "user": request.user,
        **request.echoed(),
    }


def _text(request: ResponsesRequest) -> dict[str, Any]:
    if request.text is None or request.text.format is None:
        return {"format": {"type": "text"}}
    return {"format": request.text.format.model_dump(by_alias=True, exclude_none=True)}


def _prepare(body: ResponsesRequest, preparer: Preparer) -> Task:
    """Answers the last message of a conversation."""
    tokenizer, config = preparer.tokenizer, preparer.config
    tools, arguments = body.offered_tools, body.chat_template_kwargs or {}
    form = AnswerFormat.of(body, config, tokenizer.chat_template(arguments, with_tools=bool(tools)))
    ids = tokenizer.render_chat(body.messages(), arguments, [tool.for_template() for tool in tools])
    params = form.enforced(body.params())
    prepared = preparer.prepare(ids, params, default_temperature=CHAT_TEMPERATURE)
    make_parser = form.parser_maker(ids, params, tokenizer)
    with_logprobs = body.num_logprobs is not None
    if with_logprobs and make_parser is not None:
        raise RequestError(
            f"include cannot name {_LOGPROBS!r} where an answer may hold calls or reasoning besides text",
            "include",
        )
    writer = ResponsesWriter(
        _head(body, prepared, config.model_name),
        tokenizer,
        None if make_parser is None else make_parser(),
        with_logprobs=with_logprobs,
    )
    return Task(body, [prepared], writer)


def _num_characters(body: ResponsesRequest) -> float:
    items = [body.input] if isinstance(body.input, str) else [item.text for item in body.input]
    sizes = [len(text) for text in (body.instructions or "", *items)]
    size = conversation_size(sizes, body.chat_template_kwargs or {}, body.offered_tools)
    return size + body.num_bad_word_characters


RESPONSES = Operation("/v1/responses", ResponsesRequest, _num_characters, _prepare)
