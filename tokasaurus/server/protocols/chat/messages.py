"""The messages of a conversation, and what the chat template sees of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.server.protocols.tools.request import Tool, ToolCall

__all__ = ["ChatMessage", "TextPart", "conversation_size", "for_template"]

_TEMPLATE_CHARS = 32  # about what a template writes around a message

# Clients copy a message from an answer into the next request; these fields are harmless when empty.
_EMPTY_FIELDS = frozenset(
    {"annotations", "audio", "function_call", "reasoning_content", "refusal", "tool_calls"}
)


class TextPart(StrictSchema):
    """A part of a message's content. Types other than text are refused by name."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictSchema):
    """One message. The chat template decides which roles exist; it sees developer as system."""

    role: str
    content: str | list[TextPart] | None = None
    """Null only beside ``tool_calls``."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """The calls that the assistant made."""
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    reasoning_content: str | None = None
    """The assistant's reasoning. A template that knows the field decides what to keep of it."""

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
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def size(self) -> int:
        """The number of characters, about."""
        texts = (self.role, self.text, self.name, self.tool_call_id, self.reasoning_content)
        calls = 0 if self.tool_calls is None else len(str(self.tool_calls))
        return sum(len(text) for text in texts if text is not None) + calls

    def for_template(self, where: str = "message") -> dict[str, Any]:
        """The message as the chat template sees it.

        Args:
            where: the message is in the request, for errors.

        Raises:
            RequestError: the message has no content, or a call in it is wrong.
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
    """A conversation as the chat template sees it. Raises RequestError."""
    return [each.for_template(f"messages[{number}]") for number, each in enumerate(messages)]


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
