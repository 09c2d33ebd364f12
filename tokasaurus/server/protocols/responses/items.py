"""Items of a conversation in the Responses API, and its tools.

Unlike in chat, a call is an item of its own, and tools are flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.server.protocols.chat.messages import RefusalPart
from tokasaurus.server.protocols.tools.request import (
    AllowedTools,
    Function,
    Tool,
    ToolChoice,
    call_for_template,
)

__all__ = [
    "AllowedFunctions",
    "CallOutput",
    "FunctionCall",
    "FunctionChoice",
    "FunctionTool",
    "InputItem",
    "InputMessage",
    "InputText",
    "ReasoningItem",
    "ReasoningText",
    "for_template",
]


class InputText(StrictSchema):
    """A part of a message. It may come from an answer, and then has further fields."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None
    cache_control: dict[str, Any] | None = None
    """A hint for other servers' caches; changes nothing."""
    prompt_cache_breakpoint: dict[str, Any] | None = None
    """The same in OpenAI's words."""


def _joined(content: str | Sequence[InputText | RefusalPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputMessage(StrictSchema):
    """One message of a conversation. The chat template decides which roles exist."""

    role: str
    content: str | list[InputText | RefusalPart]
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    @property
    def text(self) -> str:
        return _joined(self.content)

    @property
    def template_role(self) -> str:
        return "system" if self.role == "developer" else self.role


class FunctionCall(StrictSchema):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return self.arguments


class CallOutput(StrictSchema):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return _joined(self.output)


class ReasoningText(StrictSchema):
    """A part of the assistant's reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(StrictSchema):
    """The assistant's reasoning. A template that knows the field decides what to keep of it."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    encrypted_content: None = None
    """Only null: nothing here encrypts reasoning, and nothing can read another server's."""
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


def _kind(item: Any) -> Any:
    """The type of an item; a message need not name it."""
    kind = item.get("type") if isinstance(item, dict) else None
    return "message" if kind is None else kind


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def for_template(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """A conversation as the chat template sees it.

    An assistant's reasoning, text and calls become one message.
    """
    messages: list[dict[str, Any]] = []
    thinking: dict[str, Any] | None = None  # the last message, while it is only reasoning
    for item in items:
        thought, thinking = thinking, None
        if isinstance(item, ReasoningItem):
            thinking = {"role": "assistant", "content": "", "reasoning_content": item.text}
            messages.append(thinking)
        elif isinstance(item, InputMessage):
            if thought is not None and item.role == "assistant":
                thought["content"] = item.text
            else:
                messages.append({"role": item.template_role, "content": item.text})
        elif isinstance(item, FunctionCall):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = call_for_template(item.call_id, item.name, item.arguments)
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
    return messages


class FunctionTool(StrictSchema):
    """A function that the model may call. There are no other tools."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; without it, the function has no parameters."""
    strict: bool | None = None
    """Changes nothing: the arguments of an enforced call always follow the schema."""

    @property
    def as_tool(self) -> Tool:
        function = Function(
            name=self.name, description=self.description, parameters=self.parameters
        )
        return Tool(type="function", function=function)


class AllowedFunctions(StrictSchema):
    """Some of the tools; the model sees no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1)]

    @property
    def as_choice(self) -> AllowedTools:
        return AllowedTools.of(self.mode, [each.name for each in self.tools])


class FunctionChoice(StrictSchema):
    """This function, and no other."""

    type: Literal["function"]
    name: str

    @property
    def as_choice(self) -> ToolChoice:
        return ToolChoice.of(self.name)
