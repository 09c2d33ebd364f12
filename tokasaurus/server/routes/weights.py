"""``/v1/weights/updates``: new weights over HTTP, in buckets of safetensors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from tokasaurus.errors import RequestError, TokasaurusError
from tokasaurus.protocol.commands import CommandDone
from tokasaurus.server.control.commands import CommandRunner
from tokasaurus.server.control.weights_updates import (
    CHECKSUM_HEADER,
    MAX_BUCKETS,
    WeightsUpdates,
)
from tokasaurus.server.errors import ClientGone
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.bodies import read_json, read_optional_json, refuse_compressed
from tokasaurus.server.http.request_ids import REQUEST_ID
from tokasaurus.server.operations.schemas import RequestBody, body_reference, parse
from tokasaurus.server.routes.control_bodies import ControlBody, Label
from tokasaurus.server.state import EngineState

__all__ = ["WEIGHTS_PREFIX", "WEIGHTS_SCHEMAS", "WeightsRoutes"]

WEIGHTS_PREFIX = "/v1/weights/"

_UPDATES = "/v1/weights/updates"
_UPDATE = "/v1/weights/updates/{update_id}"


class BeginWeightsUpdate(ControlBody):
    """``POST /v1/weights/updates``."""

    weight_version: Label | None = None
    """The label of the new version; default: its number."""
    replace: bool | None = None
    """Drop another update that was begun and not committed. Default false: then it is in the
    way."""


class CommitWeightsUpdate(ControlBody):
    """``POST /v1/weights/updates/{update_id}/commit``."""

    num_buckets: Annotated[int, Field(ge=1, le=MAX_BUCKETS)]
    """The number of buckets that were sent; they have the numbers from 0 on."""


WEIGHTS_SCHEMAS: tuple[type[RequestBody], ...] = (BeginWeightsUpdate, CommitWeightsUpdate)


class WeightsRoutes:
    """The routes.

    Args:
        state: of the engine.
        updates: where the buckets go.
    """

    def __init__(self, state: EngineState, updates: WeightsUpdates) -> None:
        self._state = state
        self._runner = CommandRunner(state)
        self._updates = updates

    def router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        body = body_reference(BeginWeightsUpdate)
        body["required"] = False
        add(_UPDATES, self.begin, methods=["POST"], openapi_extra={"requestBody": body})
        add(_UPDATE, self.retrieve, methods=["GET"])
        add(_UPDATE, self.delete, methods=["DELETE"])
        add(
            f"{_UPDATE}/buckets/{{number}}",
            self.receive,
            methods=["PUT"],
            openapi_extra={"requestBody": _BUCKET, "parameters": [_CHECKSUM]},
        )
        add(
            f"{_UPDATE}/commit",
            self.commit,
            methods=["POST"],
            openapi_extra={"requestBody": body_reference(CommitWeightsUpdate)},
        )
        return router

    async def begin(self, request: Request) -> Response:
        """Begins an update of the weights; one at a time."""
        self._state.check()
        body = parse(await read_optional_json(request), BeginWeightsUpdate)
        update = self._updates.begin(
            body.weight_version, request.scope.get(REQUEST_ID), replace=bool(body.replace)
        )
        return json_answer(update.described())

    async def retrieve(self, update_id: str) -> Response:
        """The state of an update, and its buckets."""
        return json_answer(self._updates.find(update_id).described())

    async def delete(self, update_id: str) -> Response:
        """Drops an update that is not committed."""
        self._updates.delete(update_id)
        return json_answer({"id": update_id, "object": "weights.update", "deleted": True})

    async def receive(self, request: Request, update_id: str, number: str) -> Response:
        """Takes one bucket: a safetensors file, with its SHA-256 in a header."""
        refuse_compressed(request)
        sha256 = request.headers.get(CHECKSUM_HEADER)
        index = _bucket_number(number)
        return json_answer(await self._updates.receive(update_id, index, sha256, _pieces(request)))

    async def commit(self, request: Request, update_id: str) -> Response:
        """Replaces the weights of the model by those of the buckets."""
        self._state.check()
        num_buckets = parse(await read_json(request), CommitWeightsUpdate).num_buckets
        update = self._updates.commit(update_id, num_buckets)
        buckets = [update.buckets[number] for number in range(num_buckets)]

        def on_done(result: CommandDone | TokasaurusError) -> None:
            if isinstance(result, CommandDone):
                self._updates.succeeded(update, result.weights_version)
            else:
                self._updates.refused(update, str(result))

        try:
            await self._runner.update_weights(
                [str(bucket.path) for bucket in buckets],
                on_done,
                checksums=[bucket.sha256 for bucket in buckets],
                label=update.label,
            )
        except RequestError as error:
            raise type(error)(update.in_words_of_client(error.message)) from None
        return json_answer(update.described())


_BUCKET = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
_CHECKSUM = {
    "name": CHECKSUM_HEADER,
    "in": "header",
    "required": True,
    "description": "The SHA-256 of the body, in hexadecimal.",
    "schema": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"},
}


def _bucket_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < MAX_BUCKETS):
        raise RequestError(
            f"the number of a bucket must be from 0 to {MAX_BUCKETS - 1}, not {text!r}", "number"
        )
    return int(text)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise ClientGone("the client disconnected") from None
