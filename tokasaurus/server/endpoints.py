"""The routes. Each reads a request, asks the text core for it, and hands out what a renderer writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.server.calls import Call, EventStream, in_thread_if
from tokasaurus.server.generation import PreparedRequest
from tokasaurus.server.http_errors import BodyTooLarge, ClientGone, UnknownModel, WrongMediaType
from tokasaurus.server.params import renamed
from tokasaurus.server.render import ChatRenderer, CompletionRenderer, Renderer
from tokasaurus.server.schemas import ChatRequest, CompletionRequest, GenerationRequest, parse
from tokasaurus.server.state import EngineState
from tokasaurus.version import __version__

__all__ = ["Endpoints"]

MAX_BODY_BYTES = 256 << 20

# What takes longer than about a millisecond is done in a thread.
_MANY_CHARACTERS = 4_000  # to tokenize
_MANY_TOKENS = 8_000  # to turn into text and JSON
_MANY_LOGPROBS = 200  # likewise

_CHAT_TEMPERATURE = 0.7
_COMPLETION_TEMPERATURE = 1.0

R = TypeVar("R", bound=GenerationRequest)


class Endpoints:
    """The handlers of one application.

    Args:
        config: the server's slice.
        state: of the engine.
    """

    def __init__(self, config: ServerConfig, state: EngineState) -> None:
        self._config = config
        self._state = state
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter()
        get: list[tuple[str, Callable[..., Any]]] = [
            ("/ping", self.ping),
            ("/health", self.health),
            ("/version", self.version),
            ("/v1/models", self.models),
            ("/v1/models/{model_id:path}", self.model),
        ]
        for path, handler in get:
            router.add_api_route(path, handler, methods=["GET"], response_model=None)
        post: list[tuple[str, Callable[..., Any], type[GenerationRequest]]] = [
            ("/v1/completions", self.completions, CompletionRequest),
            ("/v1/chat/completions", self.chat_completions, ChatRequest),
        ]
        for path, handler, schema in post:
            router.add_api_route(
                path,
                handler,
                methods=["POST"],
                response_model=None,
                openapi_extra={"requestBody": _request_body(schema)},
            )
        return router

    # --- generating --------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        generations = self._state.generations()
        body = await _read(request, CompletionRequest)
        prompts = body.prompts()
        tokenizer = generations.tokenizer

        def prepare() -> tuple[list[PreparedRequest], list[str] | None]:
            ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
            echoes = None
            if body.echo:
                echoes = [p if isinstance(p, str) else tokenizer.decode_prompt(p) for p in prompts]
            limit = self._config.max_request_tokens
            return [
                generations.prepare(
                    each,
                    body.params_for(len(each), limit),
                    default_temperature=_COMPLETION_TEMPERATURE,
                )
                for each in ids
            ], echoes

        heavy = sum(map(len, prompts)) > _MANY_CHARACTERS
        prepared, echoes = await in_thread_if(heavy, prepare)
        renderer = CompletionRenderer(body, self._config.model_name, tokenizer, echoes)
        return await self._answer(request, body, prepared, renderer)

    async def chat_completions(self, request: Request) -> Response:
        """Answers the last message of a conversation, or goes on with it."""
        generations = self._state.generations()
        body = await _read(request, ChatRequest)
        messages = [message.for_template() for message in body.messages]

        def prepare() -> PreparedRequest:
            ids = generations.tokenizer.render_chat(messages, body.apply_chat_template_overrides)
            try:
                return generations.prepare(
                    ids, body.params(), default_temperature=_CHAT_TEMPERATURE
                )
            except RequestError as error:
                raise renamed(error, body.field_names()) from None

        heavy = sum(len(message["content"]) for message in messages) > _MANY_CHARACTERS
        prepared = await in_thread_if(heavy, prepare)
        renderer = ChatRenderer(body, self._config.model_name, generations.tokenizer)
        return await self._answer(request, body, [prepared], renderer)

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        prepared: list[PreparedRequest],
        renderer: Renderer,
    ) -> Response:
        # Asked again: the engine may have died while the prompts were tokenized.
        call = Call(self._state.generations(), prepared, stream=bool(body.stream))
        if body.stream:
            return EventStream(call, renderer)
        try:
            async with call.watched(request.receive):
                await call.finish()
        except RequestError as error:
            raise renamed(error, body.field_names()) from None
        size = sum(generation.num_generated_tokens for generation in call.generations)
        limit = _MANY_TOKENS if body.num_logprobs is None else _MANY_LOGPROBS
        content = await in_thread_if(size > limit, lambda: renderer.whole(call.generations))
        return Response(content, media_type="application/json")

    # --- about the engine --------------------------------------------------------------------------

    async def ping(self) -> Response:
        """The server process lives; says nothing of the model."""
        return _json({"message": "pong"})

    async def health(self) -> Response:
        """200 when requests are served."""
        status = self._state.status
        body = {"status": status, "running": self._state.num_running}
        return _json(body, 200 if status == "ok" else 503)

    async def version(self) -> Response:
        return _json({"version": __version__})

    async def models(self) -> Response:
        """The one model."""
        self._state.check()
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, model_id: str) -> Response:
        self._state.check()
        if model_id != self._config.model_name:
            raise UnknownModel(model_id)
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tokasaurus",
            "root": self._config.model_root,
            "max_model_len": self._config.max_request_tokens,
        }


async def _read(request: Request, schema: type[R]) -> R:
    """Reads and checks a request's body. Raises RequestError.

    Only what is declared to be JSON is read: a browser sends anything else to any address without
    asking first.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise WrongMediaType(
            f"the body must be sent with Content-Type: application/json, not {media_type or 'nothing'!r}"
        )
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect:
        raise ClientGone("the client disconnected") from None
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is no valid JSON: {error}") from None
    return parse(body, schema)


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _request_body(schema: type[GenerationRequest]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": reference}}}
