"""``POST /custom/synchronous-batch-completions``: many chats in one request, answered in order.

All run or none: one wrong chat refuses all of them. All end when the client disconnects.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.server.errors import BodyTooLarge
from tokasaurus.server.http.access import max_priority_of, share_of
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.http.disconnects import until_disconnect
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.operations.operation import Task
from tokasaurus.text.params import MAX_SAMPLES

__all__ = ["BATCH_SCHEMA", "SynchronousBatch", "is_batch"]

PATHS = (
    "/custom/synchronous-batch-completions",
    "/custom/cartridge/synchronous-batch-completions",
)
_REQUESTS = "requests"

BATCH_SCHEMA = {
    "type": "object",
    "properties": {
        _REQUESTS: {"type": "array", "items": {"$ref": "#/components/schemas/ChatRequest"}}
    },
    "required": [_REQUESTS],
}
_JSON, _MSGPACK, _PICKLE = "application/json", "application/msgpack", "application/x-pickle"
_NAMES = {
    _JSON: _JSON,
    _MSGPACK: _MSGPACK,
    "application/x-msgpack": _MSGPACK,
    "application/vnd.msgpack": _MSGPACK,
}


class SynchronousBatch:
    """The route.

    Args:
        config: the server's slice.
        executor: carries out the chats.
    """

    def __init__(self, config: ServerConfig, executor: Executor) -> None:
        self._default = _PICKLE if config.unsafe_pickle_responses else _JSON
        self._executor = executor
        self._chat = executor.operations["/v1/chat/completions"]

    def router(self) -> APIRouter:
        router = APIRouter()
        body = {"required": True, "content": {_JSON: {"schema": BATCH_SCHEMA}}}
        for path in PATHS:
            router.add_api_route(
                path,
                self.answer,
                methods=["POST"],
                response_model=None,
                openapi_extra={"requestBody": body},
            )
        return router

    async def answer(self, request: Request) -> Response:
        """Answers a list of chats with a list of completions, as JSON or, by Accept, as msgpack."""
        return await self.answer_to(request, await read_json(request))

    async def answer_to(self, request: Request, body: Any) -> Response:
        """The same, where the body has been read."""
        media_type = _media_type(request.headers.get("accept", ""), self._default)
        bodies = _requests(body)
        client = share_of(request.scope, None)
        # Asked before the prompts are tokenized, so that a flood of refusals is cheap, and after.
        self._executor.check_room(client)
        working = self._all(bodies, client, max_priority_of(request.scope))
        answers = await until_disconnect(request.receive, working)
        content = await asyncio.to_thread(_encode, answers, media_type)
        return Response(content, media_type=media_type)

    async def _all(self, bodies: Sequence[Any], client: str, max_priority: int) -> list[bytes]:
        with contextlib.ExitStack() as stack:
            tasks = await self._prepare(bodies, max_priority, stack)
            self._executor.check_room(client)
            executions = [stack.enter_context(self._executor.start(task, client)) for task in tasks]
            answers = []
            for position, execution in enumerate(executions):
                try:
                    answers.append(await execution.answer())
                except RequestError as error:
                    raise _at(position, error) from None
            return answers

    async def _prepare(
        self, bodies: Sequence[Any], max_priority: int, stack: contextlib.ExitStack
    ) -> list[Task]:
        """All chats, ready to run. The stack releases them."""
        tasks = []
        num_samples = 0
        for position, body in enumerate(bodies):
            if position % 100 == 99:
                await asyncio.sleep(0)  # lets other requests run
            try:
                task = await self._executor.prepare(self._chat, body, max_priority)
                stack.callback(task.release)
                if task.stream is not None:
                    raise RequestError("stream must be false in a synchronous batch", "stream")
            except RequestError as error:
                raise _at(position, error) from None
            num_samples += sum(prompt.params.n for prompt in task.prompts)
            if num_samples > MAX_SAMPLES:
                raise RequestError(
                    f"requests may ask for {MAX_SAMPLES} samples in all, the sum of their n",
                    "requests",
                )
            tasks.append(task)
        return tasks


def is_batch(body: Any) -> bool:
    """Whether a decoded body is one of a synchronous batch, and not a single chat."""
    return isinstance(body, dict) and _REQUESTS in body


def _requests(body: Any) -> list[Any]:
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name in body:
        if name != "requests":
            raise RequestError(
                f"{name} is not a field of this request; requests is the only one", name
            )
    requests = body.get("requests")
    if not isinstance(requests, list) or not requests:
        raise RequestError("requests must be a list of chat completion requests", "requests")
    if len(requests) > MAX_SAMPLES:
        raise BodyTooLarge(f"requests has {len(requests)} entries; it may have {MAX_SAMPLES}")
    return requests


def _at(position: int, error: RequestError) -> RequestError:
    """The error, with the place of the request that it is about."""
    where = f"requests[{position}]"
    field = where if error.field is None else f"{where}.{error.field}"
    return type(error)(f"{where}: {error.message}", field)


def _media_type(accept: str, default: str) -> str:
    """The known media type that the client prefers; an Accept without one is not refused."""
    best, best_weight = default, 0.0
    for choice in accept.lower().split(","):
        name, *parameters = (part.strip() for part in choice.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                with contextlib.suppress(ValueError):
                    weight = float(parameter[2:])
        if name in _NAMES and weight > best_weight:
            best, best_weight = _NAMES[name], weight
        elif name in ("*/*", "application/*") and weight > best_weight:
            best, best_weight = default, weight
    return best


def _encode(answers: Sequence[bytes], media_type: str) -> bytes:
    if media_type == _JSON:
        return b"[" + b",".join(answers) + b"]"
    if media_type == _MSGPACK:
        return msgspec.msgpack.encode([msgspec.json.decode(answer) for answer in answers])
    # What clients of version 0.0.4 expect to unpickle.
    from openai.types.chat import ChatCompletion

    return pickle.dumps([ChatCompletion.construct(**msgspec.json.decode(a)) for a in answers])
