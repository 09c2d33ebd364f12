"""``POST /v1/responses``: OpenAI's Responses API, without storage.

Each request brings its whole conversation. Nothing is stored, so no response can be continued,
looked up or deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.fields import HARMLESS
from tokasaurus.server.operations.schemas import GenerationRequest, StreamOptions
from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.server.protocols.chat.reasoning import Reasoning, effort_arguments
from tokasaurus.server.protocols.responses.items import (
    AllowedFunctions,
    FunctionChoice,
    FunctionTool,
    InputItem,
    for_template,
)
from tokasaurus.server.protocols.tools.request import (
    Choice,
    Tool,
    ToolChoice,
    check_tools,
    enforced,
    offered,
)
from tokasaurus.text.structured_output import FIELD as STRUCTURED_OUTPUTS

__all__ = ["LOGPROBS", "ResponsesRequest"]

LOGPROBS = "message.output_text.logprobs"  # what ``include`` may name


class TextFormat(StrictSchema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: str | None = None
    """Of the schema, for people; so is the description."""
    description: str | None = None
    strict: bool | None = None
    """Changes nothing: a schema always holds."""


class TextOptions(StrictSchema):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def form(self) -> Mapping[str, Any] | None:
        """What the text must be, as ``SamplingParams`` says it; None if the text is free."""
        if self.format is None or self.format.type == "text":
            return None
        if self.format.type == "json_object":
            return {"json_object": True}
        return {"json": self.format.json_schema}


Include: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    # What tools of the server and images would have: there are none.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
Input: TypeAlias = str | Annotated[list[InputItem], Field(min_length=1)]

_NOT_HERE = {
    "n": "a response is one sample; ask /v1/chat/completions for more",
    "first_k": "a response is one sample",
    "max_tokens": "it is called max_output_tokens here",
    "logprobs_in_fingerprint": "a response has no fingerprint",
    "prompt_logprobs": "a response has no place for them",
    "return_token_ids": "a response has no place for them; ask /v1/chat/completions",
    "return_weights_versions": "a response has no place for them",
    "response_format": "it is called text.format here",
    "stream_options": "a stream of responses always ends with the usage",
}

_HARMLESS_HERE: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "return_token_ids": (False,),
    "stream_options": tuple(
        StreamOptions(include_usage=usage, include_obfuscation=obfuscation)
        for usage in (None, True)
        for obfuscation in (None, False)
    ),
}


class ResponsesRequest(GenerationRequest):
    """``POST /v1/responses``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **HARMLESS,
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (int,),  # it counts calls to tools of the server, which has none
        "previous_response": (),
        "previous_response_id": (),
        "prompt": (),
        "truncation": ("auto", "disabled"),  # a conversation that does not fit is refused
        "watermarking": (True, False),  # true leaves it to the server, whose text has no marks
    }

    input: Input
    """The user's message, or a conversation."""
    instructions: str | None = None
    """A system message before it."""
    max_output_tokens: int | None = None
    """Default: the rest of the context."""
    text: TextOptions | None = None
    """What the text must be: ``{"format": {"type": "json_schema", "name": ..., "schema": ...}}``,
    or of type json_object."""
    include: list[Include] | None = None
    """``message.output_text.logprobs`` returns the logprobs of the answer's tokens. The others
    change nothing: the server runs no tools, and returns reasoning in any case."""
    top_logprobs: int | None = None
    """And those of this many likeliest tokens."""
    tools: list[FunctionTool] | None = None
    """The tools that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions | None = (
        None
    )
    """Default ``auto``: the model decides. A grammar enforces ``required`` and a named function.

    ``allowed_tools`` offers some of the tools, with the mode ``auto`` or ``required``.
    """
    parallel_tool_calls: bool | None = None
    """False allows one call at most. Default true."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of ``apply_chat_template``, such as ``enable_thinking``."""
    reasoning: Reasoning | None = None
    """``effort``, for the chat template: as on ``/v1/chat/completions``."""

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        effort = None if self.reasoning is None else self.reasoning.effort
        return {**effort_arguments(effort), **(self.chat_template_kwargs or {})}

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model sees."""
        return offered([tool.as_tool for tool in self.tools or ()], self._choice)

    @property
    def enforced_choice(self) -> str | ToolChoice | None:
        """The call that the model must make; None if the model decides."""
        return enforced(self._choice)

    @property
    def _choice(self) -> Choice:
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.as_choice

    @property
    def needs_grammar(self) -> bool:
        return super().needs_grammar or self.enforced_choice is not None

    def field_names(self) -> Mapping[str, str]:
        return {
            **super().field_names(),
            **({} if self.enforced_choice is None else {STRUCTURED_OUTPUTS: "tools"}),
            "logprobs": "top_logprobs",
            "max_tokens": "max_output_tokens",
            "messages": "input",
            "prompt": "input",
        }

    def check(self) -> None:
        for name, reason in _NOT_HERE.items():
            value = getattr(self, name)
            if value is not None and value not in _HARMLESS_HERE.get(name, ()):
                raise RequestError(f"{name} is not supported: {reason}", name)
        super().check()
        format_ = None if self.text is None else self.text.format
        if format_ and format_.type != "json_schema" and format_.json_schema is not None:
            raise RequestError(f"text.format of type {format_.type} has no schema", "text")
        if self._forms.get("text") == {"json": None}:
            raise RequestError("text.format of type json_schema must have a schema", "text")
        tools = [tool.as_tool for tool in self.tools or ()]
        check_tools(tools, self._choice, self.form_field, self.form)
        if self.top_logprobs and self.num_logprobs is None:
            raise RequestError(f"top_logprobs needs include to name {LOGPROBS!r}", "top_logprobs")

    @cached_property
    def _forms(self) -> Mapping[str, Any]:
        form = None if self.text is None else self.text.form
        return super()._forms if form is None else {**super()._forms, "text": form}

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, for the chat template. Raises RequestError."""
        if isinstance(self.input, str):
            messages: list[dict[str, Any]] = [{"role": "user", "content": self.input}]
        else:
            messages = for_template(self.input)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return messages
