"""How a model writes calls and reasoning: as a flag says, or as its chat template shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from jinja2 import Environment, meta

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.server.protocols.tools.parsing import (
    AnswerParser,
    HermesParser,
    Llama3Parser,
    ToolParser,
)
from tokasaurus.server.protocols.tools.reasoning import ReasoningParser
from tokasaurus.server.protocols.tools.request import Tool, ToolChoice, calls_grammar
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["AnswerFormat", "make_tool_parser", "tool_format"]

_MARK_TOKENS = 16  # at the end of a prompt: more than a mark and white space take

# The text before a call, the name of its arguments, the text after it, and the text between calls.
_LAYOUTS = {
    "hermes": ("<tool_call>\n", "arguments", "\n</tool_call>", "\n"),
    "llama3": ("", "parameters", "", "; "),
}


def tool_format(flag: str, template: str) -> str:
    """The format of calls.

    Args:
        flag: ``tool_call_parser``.
        template: the chat template in force.

    Raises:
        RequestError: the template takes no tools, or does not show how calls are written.
    """
    if not _takes_tools(template):
        raise RequestError(
            "tools are not supported by this model: its chat template does not mention them; start"
            " the engine with tokenizer=DIR of one that does",
            "tools",
        )
    if flag != "auto":
        return flag
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or "ipython" in template:
        return "llama3"
    raise RequestError(
        "tools are not supported: this model's chat template does not show how it writes calls;"
        f" start the engine with tool_call_parser={' or '.join(_LAYOUTS)}",
        "tools",
    )


def make_tool_parser(format_: str, names: Collection[str]) -> ToolParser:
    """A parser of one format, for one answer."""
    return HermesParser() if format_ == "hermes" else Llama3Parser(names)


def _reasons(flag: str, template: str) -> bool:
    if flag == "auto":
        return "<think>" in template or "</think>" in template
    return flag == "think"


@lru_cache(maxsize=64)
def _takes_tools(template: str) -> bool:
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        # A block tag of transformers, which only marks a part of the text.
        source = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        return "tools" in meta.find_undeclared_variables(environment.parse(source))
    except Exception:  # rendering reports a broken template better
        return "tools" in template


class ToolsRequest(Protocol):
    """What requests that may offer tools have in common."""

    @property
    def offered_tools(self) -> list[Tool]: ...

    @property
    def enforced_choice(self) -> str | ToolChoice | None: ...

    @property
    def parallel_tool_calls(self) -> bool | None: ...


@dataclass(frozen=True)
class AnswerFormat:
    """What the answer to one request may hold besides text.

    Attributes:
        request: what was asked.
        tool_format: the format of calls; None if there can be none.
        reasoning: whether the answer may begin with reasoning.
    """

    request: ToolsRequest
    tool_format: str | None
    reasoning: bool

    @classmethod
    def of(cls, request: ToolsRequest, config: ServerConfig, template: str) -> AnswerFormat:
        """The format for a request. Raises RequestError if the model cannot take the tools.

        Args:
            request: what was asked.
            config: says how calls and reasoning are written, or leaves it to the template.
            template: the chat template in force; "" if no template wrote the prompt.
        """
        return cls(
            request,
            tool_format(config.tool_call_parser, template) if request.offered_tools else None,
            _reasons(config.reasoning_parser, template),
        )

    def enforced(self, params: SamplingParams) -> SamplingParams:
        """The parameters, with a grammar of the calls that the model must or may make.

        A model that must make calls says nothing else. A model that may make calls, and must
        answer in JSON, makes calls or answers.

        Raises:
            RequestError: a schema cannot be compiled.
        """
        choice, form = self.request.enforced_choice, params.structured_outputs
        if self.tool_format is None or (choice is None and form is None):
            return params
        layout, many = _LAYOUTS[self.tool_format], self.request.parallel_tool_calls is not False
        tools = self.request.offered_tools
        if choice is None:
            grammar = calls_grammar(tools, "auto", layout, many, form)
        else:
            grammar = calls_grammar(tools, choice, layout, many)
        return dataclasses.replace(params, structured_outputs={"grammar": grammar})

    def parser_maker(
        self, prompt_ids: Sequence[int], params: SamplingParams, tokenizer: Tokenizer
    ) -> Callable[[], AnswerParser] | None:
        """A function that makes a parser for each answer; None if answers are plain text.

        Args:
            prompt_ids: of the prompt, which may have begun the reasoning.
            params: with a grammar there is no reasoning: the grammar begins at the first token.
            tokenizer: spells the tokens.
        """
        reasons = self.reasoning and params.structured_outputs is None
        if self.tool_format is None and not reasons:
            return None
        end = b"".join(tokenizer.spelled[token_id] for token_id in prompt_ids[-_MARK_TOKENS:])
        inside = end.rstrip().endswith(b"<think>")
        names = [tool.function.name for tool in self.request.offered_tools]
        max_calls = 1 if self.request.parallel_tool_calls is False else None

        def make() -> AnswerParser:
            tools = None if self.tool_format is None else make_tool_parser(self.tool_format, names)
            reasoning = ReasoningParser(inside, tokenizer.visible) if reasons else None
            return AnswerParser(tools, reasoning, max_calls)

        return make
