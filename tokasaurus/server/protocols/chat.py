"""``POST /v1/chat/completions``: what clients send."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.server.protocols.tools.request import Tool, ToolCall, ToolChoice, check_tools
from tokasaurus.text.structured_output import FIELD as STRUCTURED_OUTPUTS

__all__ = ["ChatMessage", "ChatRequest", "conversation_size", "for_template"]

_MESSAGE_CHARS = 32  # that a template writes around a message, about


class TextPart(StrictSchema):
    """A part of a message's content; other types than text are refused by name."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictSchema):
    """One message. The chat template decides which roles there are; ``developer`` is ``system`` to it."""

    role: str
    content: str | list[TextPart] | None = None
    """Null only beside ``tool_calls``."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """What the assistant called."""
    tool_call_id: str | None = None
    """Which call a tool answers."""
    reasoning_content: str | None = None
    """What the assistant thought; templates that know it decide what to keep of it."""

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def size(self) -> int:
        """In characters, about."""
        texts = (self.role, self.text, self.name, self.tool_call_id, self.reasoning_content)
        calls = 0 if self.tool_calls is None else len(str(self.tool_calls))
        return sum(len(text) for text in texts if text is not None) + calls

    def for_template(self, where: str = "message") -> dict[str, Any]:
        """What the chat template sees of it.

        Args:
            where: it is, for errors.

        Raises:
            RequestError: it has no content, or a call in it is none.
        """
        if self.content is None and not self.tool_calls:
            raise RequestError(f"{where}.content is required", "messages")
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [
                call.for_template(f"{where}.tool_calls[{number}]")
                for number, call in enumerate(self.tool_calls)
            ]
        return message


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """What the chat template sees of a conversation. Raises RequestError."""
    return [each.for_template(f"messages[{number}]") for number, each in enumerate(messages)]


def conversation_size(
    messages: Collection[int], arguments: Mapping[str, Any], tools: Sequence[Tool] = ()
) -> float:
    """How many characters a chat template has to do with, about; infinite for a program of the client's.

    Args:
        messages: the size of each.
        arguments: of the template.
        tools: that it tells the model of.
    """
    if "chat_template" in arguments:
        return math.inf
    more = len(str(tools)) * bool(tools) + len(str(arguments)) * bool(arguments)
    return sum(messages) + _MESSAGE_CHARS * len(messages) + more


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    ids: Annotated[list[int], Field(min_length=1)] | None = None
    """The prompt's token ids, instead of ``messages``; the chat template is not applied."""
    max_completion_tokens: int | None = None
    """A newer name of ``max_tokens``. Without either, the rest of the context."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    """What the model may call."""
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    """Default ``auto``: the model decides. ``required`` and a named function are enforced by a grammar."""
    parallel_tool_calls: bool | None = None
    """False: one call at most. Default true."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments for the tokenizer's ``apply_chat_template``, such as ``enable_thinking``."""
    apply_chat_template_overrides: dict[str, Any] | None = None
    """Another name of ``chat_template_kwargs``."""

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        both = (self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in both if limit is not None), None)

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        return self.chat_template_kwargs or self.apply_chat_template_overrides or {}

    @property
    def offered_tools(self) -> list[Tool]:
        """What the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def enforced_choice(self) -> str | ToolChoice | None:
        """What it must call; None if that is left to it."""
        return None if self.tool_choice in ("none", "auto") else self.tool_choice

    @property
    def needs_grammar(self) -> bool:
        return super().needs_grammar or self.enforced_choice is not None

    def field_names(self) -> Mapping[str, str]:
        names = {
            **({} if self.enforced_choice is None else {STRUCTURED_OUTPUTS: "tools"}),
            **super().field_names(),
            "logprobs": "top_logprobs",
            "prompt": "messages" if self.ids is None else "ids",
        }
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.apply_chat_template_overrides:
            names["chat_template_kwargs"] = "apply_chat_template_overrides"
        return names

    def check(self) -> None:
        super().check()
        if (self.messages is None) == (self.ids is None):
            said = "neither was given" if self.ids is None else "both were given"
            raise RequestError(
                f"messages or ids is required, one of the two: {said}",
                "messages" if self.ids is None else "ids",
            )
        if self.ids is not None:
            for name in ("apply_chat_template_overrides", "chat_template_kwargs", "tools"):
                if getattr(self, name):
                    raise RequestError(f"{name} has no effect on ids, which are no messages", name)
        if self.chat_template_kwargs and self.apply_chat_template_overrides:
            raise RequestError(
                "apply_chat_template_overrides and chat_template_kwargs are two names of one thing; leave"
                " one out",
                "apply_chat_template_overrides",
            )
        check_tools(self.tools or (), self.tool_choice, self.form_field)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError(
                f"max_completion_tokens ({self.max_completion_tokens}) and max_tokens"
                f" ({self.max_tokens}) are two names of one limit",
                "max_completion_tokens",
            )
