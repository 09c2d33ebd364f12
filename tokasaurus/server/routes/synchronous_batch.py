"""``POST /custom/synchronous-batch-completions``: many chats in one request, answered together, in order.

All run or none: one that is wrong refuses all, and they end together when the client goes away.
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
from tokasaurus.server.http.access import share_of
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.operations.calls import Call, until_disconnect
from tokasaurus.server.operations.execution import Answers
from tokasaurus.server.operations.operation import Task
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.text.params import MAX_SAMPLES

__all__ = ["SynchronousBatch"]

PATH = "/custom/synchronous-batch-completions"

_JSON, _MSGPACK, _PICKLE = "application/json", "application/msgpack", "application/x-pickle"
_NAMES = {
    _JSON: _JSON,
    _MSGPACK: _MSGPACK,
    "application/x-msgpack": _MSGPACK,
    "application/vnd.msgpack": _MSGPACK,
}
_CHAT = OPERATIONS["/v1/chat/completions"]


class SynchronousBatch:
    """The route.

    Args:
        config: the server's slice.
        answers: carries out the chats.
    """

    def __init__(self, config: ServerConfig, answers: Answers) -> None:
        self._default = _PICKLE if config.unsafe_pickle_responses else _JSON
        self._answers = answers

    def router(self) -> APIRouter:
        router = APIRouter()
        items = {"type": "array", "items": {"$ref": "#/components/schemas/ChatRequest"}}
        schema = {"type": "object", "properties": {"requests": items}, "required": ["requests"]}
        body = {"required": True, "content": {_JSON: {"schema": schema}}}
        router.add_api_route(
            PATH,
            self.answer,
            methods=["POST"],
            response_model=None,
            openapi_extra={"requestBody": body},
        )
        return router

    async def answer(self, request: Request) -> Response:
        """Answers a list of chats with a list of completions: JSON, or msgpack if Accept asks for it."""
        media_type = _media_type(request.headers.get("accept", ""), self._default)
        bodies = _requests(await read_json(request))
        client = share_of(request.scope, None)
        self._answers.check_room(client)  # before all that tokenizing costs, and after it
        tasks = await self._prepare(bodies)
        self._answers.check_room(client)
        answers = await until_disconnect(request.receive, self._finish(tasks, client))
        content = await asyncio.to_thread(_encode, answers, media_type)
        return Response(content, media_type=media_type)

    async def _prepare(self, bodies: Sequence[Any]) -> list[Task]:
        tasks = []
        num_samples = 0
        for position, body in enumerate(bodies):
            if position % 100 == 99:
                await asyncio.sleep(0)  # others have requests too
            try:
                task = await self._answers.prepare(_CHAT, self._answers.read(_CHAT, body))
                if task.body.streams:
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

    async def _finish(self, tasks: Sequence[Task], client: str) -> list[bytes]:
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(self._answers.start(task, client)) for task in tasks]
            answers = []
            for position, (task, call) in enumerate(zip(tasks, calls, strict=True)):
                answers.append(await self._finish_one(position, task, call))
            return answers

    async def _finish_one(self, position: int, task: Task, call: Call) -> bytes:
        try:
            return await self._answers.finish(task, call)
        except RequestError as error:
            raise _at(position, error) from None


def _requests(body: Any) -> list[Any]:
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name in body:
        if name != "requests":
            raise RequestError(
                f"{name} is no field of this request; requests is the only one", name
            )
    requests = body.get("requests")
    if not isinstance(requests, list) or not requests:
        raise RequestError("requests must be a list of chat completion requests", "requests")
    if len(requests) > MAX_SAMPLES:
        raise BodyTooLarge(f"requests has {len(requests)} entries; it may have {MAX_SAMPLES}")
    return requests


def _at(position: int, error: RequestError) -> RequestError:
    """The error with the place of the request that it is about."""
    where = f"requests[{position}]"
    field = where if error.field is None else f"{where}.{error.field}"
    return type(error)(f"{where}: {error.message}", field)


def _media_type(accept: str, default: str) -> str:
    """The known type that the client likes best; what it does not know at all is not refused."""
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
    from openai.types.chat import ChatCompletion  # what clients of version 0.0.4 expect to unpickle

    return pickle.dumps([ChatCompletion.construct(**msgspec.json.decode(a)) for a in answers])
