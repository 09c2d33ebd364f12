"""The messages of a conversation, and what the chat template sees of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import model_validator

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.cartridges import CartridgeReference, without_tags
from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.server.protocols.tools.request import Tool, ToolCall
from tokasaurus.text.tokenizer import Tokenizer

__all__ = [
    "ChatMessage",
    "RefusalPart",
    "TextPart",
    "conversation_size",
    "for_template",
    "prompt_ending",
    "rendered",
]

_TEMPLATE_CHARS = 32  # about what a template writes around a message

# Clients copy a message from an answer into the next request; these fields are harmless when empty.
_EMPTY_FIELDS = frozenset(
    {
        "annotations",
        "audio",
        "function_call",
        "reasoning",
        "reasoning_content",
        "refusal",
        "tool_calls",
    }
)
_SYSTEM_ROLES = frozenset({"system", "developer"})
_MAY_BE_EMPTY = frozenset({"assistant", "function", "tool"})
"""The roles of messages that clients repeat from models and tools, which may have said nothing."""


class TextPart(StrictSchema):
    """A part of a message's content. Types other than text are refused by name."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    """A hint for other servers' caches; changes nothing."""
    prompt_cache_breakpoint: dict[str, Any] | None = None
    """The same in OpenAI's words."""


class RefusalPart(StrictSchema):
    """A part of an assistant's message: what it said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ChatMessage(StrictSchema):
    """One message. The chat template decides which roles exist; it sees developer as system."""

    role: str
    content: str | list[TextPart | RefusalPart] | None = None
    """Null only in what an assistant or a tool said."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """The calls that the assistant made."""
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    reasoning_content: str | None = None
    """The assistant's reasoning. A template that knows the field decides what to keep of it."""
    reasoning: str | None = None
    """Another name of ``reasoning_content``."""
    refusal: str | None = None
    """What the assistant said instead of an answer; it follows the content."""
    type: Literal["text"] | None = None
    """As lm-evaluation-harness sends it before 0.4.12; changes nothing."""
    parsed: Any = None
    """The content once more, as the openai client's ``stream`` and ``parse`` decode it."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        return {
            name: value for name, value in message.items() if value or name not in _EMPTY_FIELDS
        }

    @property
    def text(self) -> str:
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        if self.refusal is None:
            return content
        return f"{content}\n{self.refusal}" if content else self.refusal

    @property
    def thought(self) -> str | None:
        """The assistant's reasoning, by either name."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @property
    def size(self) -> int:
        """The number of characters, about."""
        texts = (self.role, self.text, self.name, self.tool_call_id, self.thought)
        calls = 0 if self.tool_calls is None else len(str(self.tool_calls))
        return sum(len(text) for text in texts if text is not None) + calls

    def without_tags(self, where: str) -> tuple[ChatMessage, list[CartridgeReference]]:
        """The message without the tags that name cartridges, and what they name.

        Args:
            where: the message is in the request, for errors.

        Raises:
            RequestError: a tag is wrong.
        """
        if self.role not in _SYSTEM_ROLES or self.content is None:
            return self, []
        if isinstance(self.content, str):
            text, found = without_tags(self.content, where)
            return (self.model_copy(update={"content": text}), found) if found else (self, [])
        parts: list[TextPart | RefusalPart] = []
        all_found: list[CartridgeReference] = []
        for part in self.content:
            if isinstance(part, TextPart):
                text, found = without_tags(part.text, where)
                part = part.model_copy(update={"text": text})
                all_found += found
            parts.append(part)
        return self.model_copy(update={"content": parts}), all_found

    def for_template(self, where: str = "message") -> dict[str, Any]:
        """The message as the chat template sees it.

        Args:
            where: the message is in the request, for errors.

        Raises:
            RequestError: the message has no content, or two different kinds of reasoning.
        """
        if self.content is None and not self.tool_calls and self.role not in _MAY_BE_EMPTY:
            raise RequestError(f"{where}.content is required", "messages")
        if None not in (self.reasoning, self.reasoning_content) and (
            self.reasoning != self.reasoning_content
        ):
            raise RequestError(
                f"{where}.reasoning and {where}.reasoning_content are two names of one text; leave"
                " one out",
                "messages",
            )
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        for name, value in (
            ("name", self.name),
            ("tool_call_id", self.tool_call_id),
            ("reasoning_content", self.thought),
        ):
            if value is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """A conversation as the chat template sees it. Raises RequestError."""
    return [each.for_template(f"messages[{number}]") for number, each in enumerate(messages)]


def prompt_ending(begins: bool | None, continues: bool | None) -> Mapping[str, bool]:
    """How the prompt ends, where the request says so.

    Args:
        begins: ``add_generation_prompt``, if the request has it.
        continues: ``continue_final_message``, if the request has it.
    """
    if begins is None and continues is None:
        return {}
    return {
        "add_generation_prompt": not continues if begins is None else begins,
        "continue_final_message": bool(continues),
    }


def rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    behind_cartridge: bool = False,
) -> list[int]:
    """Ids of a conversation, written by the chat template.

    A call's arguments may be any text, and some templates write only objects. Such a template gets
    the text as the object ``{"arguments": text}``.

    Args:
        tokenizer: has the template.
        messages: as the template sees them.
        arguments: of the template.
        tools: that the model may call.
        behind_cartridge: as for ``Tokenizer.render_chat``.

    Raises:
        RequestError: the template refuses the messages.
    """
    render = partial(tokenizer.render_chat, behind_cartridge=behind_cartridge)
    try:
        return render(messages, arguments, tools)
    except RequestError:
        mended = [_with_objects(message) for message in messages]
        if mended == messages:
            raise
        return render(mended, arguments, tools)


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with an object for the arguments of each call."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        said = call["function"]["arguments"]
        if isinstance(said, str):
            call = {**call, "function": {**call["function"], "arguments": {"arguments": said}}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def conversation_size(
    messages: Collection[int], arguments: Mapping[str, Any], tools: Sequence[Tool] = ()
) -> float:
    """About how many characters a chat template handles; infinite if the template is the client's.

    Args:
        messages: the size of each message.
        arguments: of the template.
        tools: described by the template.
    """
    if "chat_template" in arguments:
        return math.inf
    more = len(str(tools)) * bool(tools) + len(str(arguments)) * bool(arguments)
    return sum(messages) + _TEMPLATE_CHARS * len(messages) + more
