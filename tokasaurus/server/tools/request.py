"""What a client may ask of tools: the tools, which to call, and the grammar that makes a model call one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from tokasaurus.errors import RequestError
from tokasaurus.server.grammar import json_style
from tokasaurus.server.strict import StrictSchema

__all__ = ["MAX_TOOLS", "Tool", "ToolCall", "ToolChoice", "calls_grammar", "check_tools"]

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Function(StrictSchema):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; without it, there are none."""
    strict: bool | None = None
    """Says nothing new: where a call is enforced, its arguments follow the schema in any case."""


class Tool(StrictSchema):
    """A tool; there are functions only."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees of it: most templates expect parameters."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {
            "type": self.type,
            "function": {"parameters": {"type": "object", "properties": {}}, **function},
        }


class _FunctionName(StrictSchema):
    name: str


class ToolChoice(StrictSchema):
    """This function, and no other."""

    type: Literal["function"]
    function: _FunctionName


class _CalledFunction(StrictSchema):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(StrictSchema):
    """A call that the assistant made, as answers have it."""

    id: str | None = None
    type: Literal["function"] | None = None
    """There are functions only."""
    function: _CalledFunction
    index: int | None = None
    """In streamed answers; says nothing here."""

    def for_template(self, where: str) -> dict[str, Any]:
        """What the chat template sees of it: templates want the arguments as an object.

        Args:
            where: the call is, for errors.

        Raises:
            RequestError: the arguments are no JSON object.
        """
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                raise RequestError(
                    f"{where}.function.arguments must be a JSON object, written as a string",
                    "messages",
                )
        call = {
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }
        return call if self.id is None else {"id": self.id, **call}


def check_tools(tools: Sequence[Tool], choice: str | ToolChoice | None) -> None:
    """Raises RequestError where tools, or the choice among them, cannot be."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools may hold at most {MAX_TOOLS}, not {len(tools)}", "tools")
    names = [tool.function.name for tool in tools]
    for name in names:
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"tools: a name has 1 to 64 letters, digits, dashes, dots and underscores, not {name[:80]!r}",
                "tools",
            )
        if names.count(name) > 1:
            raise RequestError(f"tools has two functions called {name!r}", "tools")
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        raise RequestError(
            f"tool_choice names {choice.function.name!r}, which is not among the tools",
            "tool_choice",
        )
    if choice == "required" and not tools:
        raise RequestError("tool_choice is 'required', and there are no tools", "tool_choice")


def calls_grammar(
    tools: Sequence[Tool], choice: str | ToolChoice, format_: tuple[str, str, str, str], many: bool
) -> str:
    """A grammar, in Lark, of answers that are calls and nothing else.

    Args:
        tools: there are.
        choice: "required", or which of them.
        format_: what stands before a call, the name of its arguments, what stands after it, and between two.
        many: several calls are allowed, unless one is named.
    """
    before, arguments, after, between = format_
    if isinstance(choice, ToolChoice):
        tools, many = [each for each in tools if each.function.name == choice.function.name], False
    rules = []
    for number, tool in enumerate(tools):
        name = json.dumps(tool.function.name)
        head = f'{before}{{"name": {name}, "{arguments}": '
        parameters = tool.function.parameters
        if parameters is None:
            parameters = {"properties": {}, "additionalProperties": False}
        schema = {"type": "object", **parameters, "x-guidance": json_style()}
        rules.append(
            f"call_{number}: {json.dumps(head)} %json {json.dumps(schema)} {json.dumps('}' + after)}"
        )
    any_call = " | ".join(f"call_{number}" for number in range(len(tools)))
    more = f" ({json.dumps(between)} call)*" if many else ""
    return "\n".join([f"start: call{more}", f"call: {any_call}", *rules])
