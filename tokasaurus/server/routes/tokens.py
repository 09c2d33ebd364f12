"""The model's tokenizer for clients, in vLLM's shapes: ``/tokenize`` and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

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
    rendered,
)
from tokasaurus.server.state import EngineState
from tokasaurus.text.params import renamed
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["TOKEN_SCHEMAS", "TokenRoutes"]


class TokenizeRequest(RequestBody):
    """``POST /tokenize``, for a text or a conversation."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mm_processor_kwargs": ({},),
        "tools": ([],),
    }

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

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            said = "neither was given" if self.prompt is None else "both were given"
            raise RequestError(f"prompt or messages is required, one of the two: {said}", "prompt")
        if self.messages is None:
            for name in _CHAT_ONLY:
                if getattr(self, name) is not None:
                    raise RequestError(f"{name} has no effect without messages", name)
        elif self.add_special_tokens:
            raise RequestError(
                "add_special_tokens must be false with messages: the chat template writes them",
                "add_special_tokens",
            )

    def field_names(self) -> Mapping[str, str]:
        if self.chat_template is None or self.chat_template_kwargs:
            return {}
        return {"chat_template_kwargs": "chat_template"}

    @property
    def size(self) -> float:
        """The number of characters, about."""
        if self.prompt is not None:
            return len(self.prompt)
        return conversation_size([each.size for each in self.messages or ()], self._overrides)

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens. Raises RequestError."""
        if self.prompt is not None:
            return tokenizer.encode(
                self.prompt, add_special_tokens=self.add_special_tokens is not False
            )
        try:
            return rendered(tokenizer, for_template(self.messages or ()), self._overrides)
        except RequestError as error:
            raise renamed(error, self.field_names()) from None

    @property
    def _overrides(self) -> dict[str, Any]:
        overrides = dict(self.chat_template_kwargs or {})
        for name in ("add_generation_prompt", "continue_final_message", "chat_template"):
            if getattr(self, name) is not None:
                overrides[name] = getattr(self, name)
        return overrides


_CHAT_ONLY = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str | None = None
    """Any name will do: there is one model."""
    tokens: list[int]


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
        """The text of tokens, with special tokens by their names."""
        preparer = self._state.engine().preparer
        tokens = parse(await read_json(request), DetokenizeRequest).tokens
        tokenizer, vocab_size = preparer.tokenizer, preparer.config.vocab_size
        wrong = next((i for i in tokens if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"tokens must be from 0 to {vocab_size - 1}, not {wrong}", "tokens")
        return await in_thread_if(
            len(tokens) > MANY_CHARACTERS,
            lambda: json_answer({"prompt": tokenizer.decode_prompt(tokens, special=True)}),
        )

    async def info(self) -> Response:
        """What a client needs to know of the tokenizer if it writes prompts itself."""
        preparer = self._state.engine().preparer
        limit = preparer.config.max_request_tokens
        return json_answer({**preparer.tokenizer.info(), "model_max_length": limit})
