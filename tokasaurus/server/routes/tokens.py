"""The model's tokenizer for clients, in vLLM's shapes: ``/tokenize`` and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tokasaurus.errors import RequestError
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.operations.heavy_work import MANY_CHARACTERS, in_thread_if
from tokasaurus.server.operations.schemas import RequestBody, body_reference, parse
from tokasaurus.server.protocols.chat.messages import (
    ChatMessage,
    conversation_size,
    for_template,
    prompt_ending,
    rendered,
)
from tokasaurus.server.protocols.chat.reasoning import Effort, effort_arguments
from tokasaurus.server.protocols.tools.request import (
    AllowedTools,
    Tool,
    ToolChoice,
    check_tools,
    offered,
)
from tokasaurus.server.state import EngineState
from tokasaurus.text.params import renamed
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["TOKEN_SCHEMAS", "TokenRoutes"]


class TokenizeRequest(RequestBody):
    """``POST /tokenize``, for a text or a conversation."""

    model: str | None = None
    """Any name will do: there is one model."""
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """Instead of ``prompt``: a conversation, which the chat template writes."""
    add_special_tokens: bool | None = None
    """Add the special tokens that the model expects around a text; default true, as in
    /v1/completions. In a conversation it can only be false: the chat template writes them."""
    return_token_strs: bool | None = None
    """Return the text of each token, too."""
    add_generation_prompt: bool | None = None
    """End a conversation where the assistant's next message begins. Default true, unless the last
    message is the assistant's."""
    continue_final_message: bool | None = None
    """Leave the last message open."""
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template."""
    tools: list[Tool] | None = None
    """The tools that the chat template tells the model of."""
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | AllowedTools | None = None
    """As in /v1/chat/completions: which of the tools the model is told of."""
    reasoning_effort: Effort | None = None
    """For the chat template, as in /v1/chat/completions."""

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            said = "neither was given" if self.prompt is None else "both were given"
            raise RequestError(f"prompt or messages is required, one of the two: {said}", "prompt")
        if self.messages is None:
            for name, harmless in _CHAT_ONLY.items():
                if getattr(self, name) not in (None, harmless):
                    raise RequestError(f"{name} has no effect without messages", name)
        elif self.add_special_tokens:
            raise RequestError(
                "add_special_tokens must be false with messages: the chat template writes them",
                "add_special_tokens",
            )
        check_tools(self.tools or (), self.tool_choice, None, None)

    def field_names(self) -> Mapping[str, str]:
        if self.chat_template is None or self.chat_template_kwargs:
            return {}
        return {"chat_template_kwargs": "chat_template"}

    @property
    def size(self) -> float:
        """The number of characters, about."""
        if self.prompt is not None:
            return len(self.prompt)
        sizes = [each.size for each in self.messages or ()]
        return conversation_size(sizes, self._overrides, self._offered_tools)

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens. Raises RequestError."""
        if self.prompt is not None:
            return tokenizer.encode(
                self.prompt, add_special_tokens=self.add_special_tokens is not False
            )
        try:
            told = [tool.for_template() for tool in self._offered_tools]
            return rendered(tokenizer, for_template(self.messages or ()), self._overrides, told)
        except RequestError as error:
            raise renamed(error, self.field_names()) from None

    @property
    def _offered_tools(self) -> list[Tool]:
        return offered(self.tools or (), self.tool_choice)

    @property
    def _overrides(self) -> dict[str, Any]:
        overrides = {
            **effort_arguments(self.reasoning_effort),
            **(self.chat_template_kwargs or {}),
            **prompt_ending(self.add_generation_prompt, self.continue_final_message),
        }
        if self.chat_template is not None:
            overrides["chat_template"] = self.chat_template
        return overrides


_CHAT_ONLY: Mapping[str, Any] = {
    "add_generation_prompt": False,
    "continue_final_message": False,
    "chat_template": None,
    "chat_template_kwargs": {},
    "tools": [],
    "tool_choice": "auto",
    "reasoning_effort": None,
}
"""The fields of conversations, with the value that asks for nothing of a text."""


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    model: str | None = None
    """Any name will do: there is one model."""
    tokens: list[int]
    skip_special_tokens: bool | None = None
    """Leave special tokens out. Default false: they stand by their names."""


TOKEN_SCHEMAS: tuple[type[RequestBody], ...] = (TokenizeRequest, DetokenizeRequest)


class TokenRoutes:
    """The routes.

    Args:
        state: of the engine that has the tokenizer.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def router(self) -> APIRouter:
        router = APIRouter()
        for path, handler, schema in (
            ("/tokenize", self.tokenize, TokenizeRequest),
            ("/detokenize", self.detokenize, DetokenizeRequest),
        ):
            router.add_api_route(
                path,
                handler,
                methods=["POST"],
                response_model=None,
                openapi_extra={"requestBody": body_reference(schema)},
            )
        router.add_api_route("/tokenizer_info", self.info, methods=["GET"], response_model=None)
        return router

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text or a conversation, as the generating routes would make them."""
        preparer = self._state.engine().preparer
        body = parse(await read_json(request), TokenizeRequest)
        tokenizer, limit = preparer.tokenizer, preparer.config.max_request_tokens

        def answer() -> Response:
            ids = body.ids(tokenizer)
            spellings = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
            counts = {"count": len(ids), "max_model_len": limit}
            return json_answer({**counts, "tokens": ids, "token_strs": spellings})

        return await in_thread_if(body.size > MANY_CHARACTERS, answer)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens, with special tokens by their names unless they are left out."""
        preparer = self._state.engine().preparer
        body = parse(await read_json(request), DetokenizeRequest)
        tokens, special = body.tokens, not body.skip_special_tokens
        tokenizer, vocab_size = preparer.tokenizer, preparer.config.vocab_size
        wrong = next((i for i in tokens if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"tokens must be from 0 to {vocab_size - 1}, not {wrong}", "tokens")
        return await in_thread_if(
            len(tokens) > MANY_CHARACTERS,
            lambda: json_answer({"prompt": tokenizer.decode_prompt(tokens, special=special)}),
        )

    async def info(self) -> Response:
        """What a client needs to know of the tokenizer if it writes prompts itself."""
        preparer = self._state.engine().preparer
        limit = preparer.config.max_request_tokens
        return json_answer({**preparer.tokenizer.info(), "model_max_length": limit})
