"""Tools in a request: the functions, the choice among them, and the grammar that enforces it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.strict import StrictSchema
from tokasaurus.text.structured_output import FIELD, json_for_grammar

__all__ = [
    "MAX_TOOLS",
    "AllowedTools",
    "Choice",
    "Function",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "call_for_template",
    "calls_grammar",
    "check_tools",
    "enforced",
    "offered",
]

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Function(StrictSchema):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; without it, the function has no parameters."""
    strict: bool | None = None
    """Changes nothing: the arguments of an enforced call always follow the schema."""


class Tool(StrictSchema):
    """A tool. All tools are functions."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as the chat template sees it, with parameters, which most templates expect."""
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

    @classmethod
    def of(cls, name: str) -> ToolChoice:
        return cls(type="function", function=_FunctionName(name=name))

    @property
    def names(self) -> list[str]:
        return [self.function.name]


class _AllowedFunctions(StrictSchema):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(min_length=1)]


class AllowedTools(StrictSchema):
    """Some of the tools; the model sees no others."""

    type: Literal["allowed_tools"]
    allowed_tools: _AllowedFunctions

    @classmethod
    def of(cls, mode: Literal["auto", "required"], names: Sequence[str]) -> AllowedTools:
        tools = [ToolChoice.of(name) for name in names]
        return cls(type="allowed_tools", allowed_tools=_AllowedFunctions(mode=mode, tools=tools))

    @property
    def names(self) -> list[str]:
        return [name for each in self.allowed_tools.tools for name in each.names]


Choice: TypeAlias = str | ToolChoice | AllowedTools | None
"""Among the tools: "none", "auto" (None is the same), "required", one function, or some of them."""


class _CalledFunction(StrictSchema):
    name: str
    arguments: str | dict[str, Any] | None = None
    parsed_arguments: Any = None
    """The arguments once more, as the openai client's ``stream`` and ``parse`` decode them."""


class ToolCall(StrictSchema):
    """A call that the assistant made, as answers write it."""

    id: str | None = None
    type: Literal["function"] | None = None
    """All tools are functions."""
    function: _CalledFunction
    index: int | None = None
    """From a streamed answer; changes nothing here."""

    def for_template(self) -> dict[str, Any]:
        """The call as the chat template sees it."""
        return call_for_template(self.id, self.function.name, self.function.arguments)


def call_for_template(
    call_id: str | None, name: str, arguments: str | dict[str, Any] | None
) -> dict[str, Any]:
    """A call as chat templates expect it, with the arguments as an object.

    Args:
        call_id: if the call has one.
        name: of the function.
        arguments: as JSON, or decoded. The API allows any text, since models write any text: what
            is not a JSON object stays as it was written, and null or nothing is no arguments.
    """
    said = _object_or_text(arguments) if isinstance(arguments, str) else arguments or {}
    call = {"type": "function", "function": {"name": name, "arguments": said}}
    return call if call_id is None else {"id": call_id, **call}


def _object_or_text(arguments: str) -> str | dict[str, Any]:
    try:
        said = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    if said is None:
        return {}
    return said if isinstance(said, dict) else arguments


def offered(tools: Sequence[Tool], choice: Choice) -> list[Tool]:
    """The tools that the model sees."""
    if choice == "none":
        return []
    if isinstance(choice, AllowedTools):
        return [tool for tool in tools if tool.function.name in choice.names]
    return list(tools)


def enforced(choice: Choice) -> str | ToolChoice | None:
    """The call that the model must make: "required", or a function; None if the model decides."""
    if isinstance(choice, AllowedTools):
        choice = choice.allowed_tools.mode
    return None if choice in ("none", "auto") else choice


def check_tools(
    tools: Sequence[Tool],
    choice: Choice,
    form_field: str | None,
    form: Mapping[str, Any] | None,
) -> None:
    """Raises RequestError if the tools, or the choice among them, are impossible.

    Args:
        tools: of the request.
        choice: among them.
        form_field: the request's field that says what the text must be, if one does.
        form: what it says.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools may hold at most {MAX_TOOLS}, not {len(tools)}", "tools")
    names = [tool.function.name for tool in tools]
    for name in names:
        if not _NAME.fullmatch(name):
            raise RequestError(
                "tools: a name has 1 to 64 letters, digits, dashes, dots and underscores, not"
                f" {name[:80]!r}",
                "tools",
            )
        if names.count(name) > 1:
            raise RequestError(f"tools has two functions called {name!r}", "tools")
    for name in choice.names if isinstance(choice, ToolChoice | AllowedTools) else ():
        if name not in names:
            raise RequestError(
                f"tool_choice names {name!r}, which is not among the tools", "tool_choice"
            )
    if choice == "required" and not tools:
        raise RequestError("tool_choice is 'required', and there are no tools", "tool_choice")
    if tools and choice != "none" and form_field is not None and not _is_json(form):
        raise RequestError(
            f"tools cannot be combined with {form_field} unless that asks for JSON: both say what"
            " the answer looks like; leave one out, or set tool_choice to none",
            "tools",
        )


def _is_json(form: object) -> bool:
    return isinstance(form, Mapping) and (
        form.get("json") is not None or bool(form.get("json_object"))
    )


def calls_grammar(
    tools: Sequence[Tool],
    choice: str | ToolChoice,
    format_: tuple[str, str, str, str],
    many: bool,
    form: Mapping[str, Any] | None = None,
) -> str:
    """A grammar, in Lark, of answers that are calls and nothing else, or else JSON.

    Args:
        tools: of the request.
        choice: "required", or a function; with a form, "auto".
        format_: the text before a call, the name of its arguments, the text after it, and the text
            between calls.
        many: several calls are allowed, unless one is named.
        form: structured outputs that the answer may be instead; of the kind json or json_object.

    Raises:
        RequestError: a schema cannot be compiled.
    """
    before, arguments, after, between = format_
    if isinstance(choice, ToolChoice):
        tools, many = [each for each in tools if each.function.name == choice.function.name], False
    rules = []
    for number, tool in enumerate(tools):
        parameters = tool.function.parameters
        if parameters is None:
            parameters = {"properties": {}, "additionalProperties": False}
        schema = _for_grammar({"json": {"type": "object", **parameters}}, "tools")
        # The pieces of the JSON of a form, so that both can begin in the same way: the library
        # always reads on to the end of the longest piece.
        head = ("{", '"name"', ": ", json.dumps(tool.function.name), ", ", f'"{arguments}"', ": ")
        texts = " ".join(json.dumps(text) for text in (before, *head) if text)
        end = " ".join(json.dumps(text) for text in ("}", after) if text)
        rules.append(f"call_{number}: {texts} %json {json.dumps(schema)} {end}")
    any_call = " | ".join(f"call_{number}" for number in range(len(tools)))
    more = f" ({json.dumps(between)} call)*" if many else ""
    start = f"call{more}"
    if form is not None:
        start += " | form"
        rules.append(f"form: %json {json.dumps(_for_grammar(form, FIELD))}")
    return "\n".join([f"start: {start}", f"call: {any_call}", *rules])


def _for_grammar(options: Mapping[str, Any], field: str) -> dict[str, Any]:
    try:
        return json_for_grammar(options)
    except (ValueError, RecursionError, TypeError) as error:
        raise RequestError(f"{field} cannot be compiled: {error}", field) from None
