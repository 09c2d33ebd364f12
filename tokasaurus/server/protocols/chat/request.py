"""``POST /v1/chat/completions``: what clients send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.fields import HARMLESS
from tokasaurus.server.operations.schemas import GenerationRequest
from tokasaurus.server.protocols.chat.messages import ChatMessage, prompt_ending
from tokasaurus.server.protocols.chat.reasoning import Effort, Reasoning, effort_arguments
from tokasaurus.server.protocols.tools.request import (
    AllowedTools,
    Tool,
    ToolChoice,
    check_tools,
    enforced,
    offered,
)
from tokasaurus.text.structured_output import FIELD as STRUCTURED_OUTPUTS

__all__ = ["ChatRequest"]

_HARMLESS_BESIDE_IDS: Mapping[str, Any] = {
    "apply_chat_template_overrides": {},
    "chat_template_kwargs": {},
    "tools": [],
    "add_generation_prompt": True,
    "continue_final_message": False,
    "reasoning_effort": None,
    "reasoning": Reasoning(),
}
"""What says how a chat template writes the prompt, with the value that says nothing."""


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **HARMLESS,
        "input_ids": (),
        "add_special_tokens": (False,),  # the chat template writes them
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    ids: Annotated[list[int], Field(min_length=1)] | None = None
    """The prompt's token ids, instead of ``messages``; the chat template is not applied."""
    max_completion_tokens: int | None = None
    """The newer name of ``max_tokens``. Default: the rest of the context."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    """The tools that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | AllowedTools | None = None
    """Default ``auto``: the model decides. A grammar enforces ``required`` and a named function.

    ``allowed_tools`` offers some of the tools, with the mode ``auto`` or ``required``.
    """
    parallel_tool_calls: bool | None = None
    """False allows one call at most. Default true."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of ``apply_chat_template``, such as ``enable_thinking``."""
    apply_chat_template_overrides: dict[str, Any] | None = None
    """Another name of ``chat_template_kwargs``."""
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant's next message begins. Default true, unless the last
    message is the assistant's."""
    continue_final_message: bool | None = None
    """Leave the last message open. Default: if it is the assistant's."""
    reasoning_effort: Effort | None = None
    """For the chat template, as ``reasoning_effort``, ``enable_thinking`` and ``thinking``."""
    reasoning: Reasoning | None = None
    """The same, as ``/v1/responses`` has it."""

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        both = (self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in both if limit is not None), None)

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        return {
            **effort_arguments(self._effort),
            **prompt_ending(self.add_generation_prompt, self.continue_final_message),
            **(self.chat_template_kwargs or self.apply_chat_template_overrides or {}),
        }

    @property
    def _effort(self) -> Effort | None:
        if self.reasoning_effort is not None or self.reasoning is None:
            return self.reasoning_effort
        return self.reasoning.effort

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model sees."""
        return offered(self.tools or (), self.tool_choice)

    @property
    def enforced_choice(self) -> str | ToolChoice | None:
        """The call that the model must make; None if the model decides."""
        return enforced(self.tool_choice)

    @property
    def needs_grammar(self) -> bool:
        return super().needs_grammar or self.enforced_choice is not None

    def field_names(self) -> Mapping[str, str]:
        names = {
            **super().field_names(),
            **({} if self.enforced_choice is None else {STRUCTURED_OUTPUTS: "tools"}),
            "logprobs": "top_logprobs",
            "prompt": "messages" if self.ids is None else "ids",
        }
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.apply_chat_template_overrides:
            names["chat_template_kwargs"] = "apply_chat_template_overrides"
        return names

    def with_tags_read(self) -> ChatRequest:
        read = [
            message.without_tags(f"messages[{number}]")
            for number, message in enumerate(self.messages or ())
        ]
        found = [reference for _, references in read for reference in references]
        if not found:
            return self
        if self.cartridges:
            raise RequestError(
                "cartridges are named in the field and in tags of a system message; leave one out",
                "cartridges",
            )
        return self.model_copy(
            update={"messages": [message for message, _ in read], "cartridges": found}
        )

    def check(self) -> None:
        super().check()
        if (self.messages is None) == (self.ids is None):
            said = "neither was given" if self.ids is None else "both were given"
            raise RequestError(
                f"messages or ids is required, one of the two: {said}",
                "messages" if self.ids is None else "ids",
            )
        if self.ids is not None:
            for name, harmless in _HARMLESS_BESIDE_IDS.items():
                if getattr(self, name) not in (None, harmless):
                    raise RequestError(f"{name} has no effect on ids, which are not messages", name)
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "continue_final_message continues the last message, and add_generation_prompt"
                " begins another",
                "continue_final_message",
            )
        efforts = (self.reasoning_effort, self.reasoning and self.reasoning.effort)
        if None not in efforts and efforts[0] != efforts[1]:
            raise RequestError(
                "reasoning_effort and reasoning.effort are two names of one thing; leave one out",
                "reasoning_effort",
            )
        if self.chat_template_kwargs and self.apply_chat_template_overrides:
            raise RequestError(
                "apply_chat_template_overrides and chat_template_kwargs are two names of one thing;"
                " leave one out",
                "apply_chat_template_overrides",
            )
        check_tools(self.tools or (), self.tool_choice, self.form_field, self.form)
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
