"""``/v1/cartridges``: the cartridges that an engine has, and how to add and delete them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request, Response

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.server.control.cartridges import CartridgeControl
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.queries import choice, read_query, truth
from tokasaurus.server.http.uploads import receive_form
from tokasaurus.server.state import EngineState

__all__ = ["CartridgeRoutes"]

_SOURCES = ("local", "wandb", "huggingface", "s3", "http")


class CartridgeRoutes:
    """The routes.

    Args:
        config: the server's slice.
        state: of the engine.
    """

    def __init__(self, config: ServerConfig, state: EngineState) -> None:
        self._max_bytes = config.cartridges.max_bytes
        self._control = CartridgeControl(state)

    def router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        form = {"multipart/form-data": {"schema": _FORM}}
        body = {"required": True, "content": form}
        one = "/v1/cartridges/{cartridge_id:path}"
        add("/v1/cartridges", self.upload, methods=["POST"], openapi_extra={"requestBody": body})
        add("/v1/cartridges", self.list, methods=["GET"])
        add(one, self.retrieve, methods=["GET"])
        add(one, self.delete, methods=["DELETE"])
        return router

    async def upload(self, request: Request) -> Response:
        """Checks a cartridge and stores it under a name, for requests with source "local"."""
        store = self._control.store
        async with store.incoming() as directory:
            path = directory / "upload"
            form = await receive_form(
                request, path, file_field="file", fields=("name",), max_bytes=self._max_bytes
            )
            if form.filename is None:
                raise RequestError("file is required", "file")
            name = form.fields.get("name") or PurePath(form.filename).name
            try:
                await store.add_file(name, path)
            except RequestError as error:
                field = "file" if error.field == "cartridges" else error.field
                raise type(error)(error.message, field) from None
        return json_answer(await self._control.find(name, "local"))

    async def list(self, request: Request) -> Response:
        """Every name that the store has, with its versions, what uses them, and where they are."""
        read_query(request, ())
        return json_answer({"object": "list", "data": await self._control.all()})

    async def retrieve(self, request: Request, cartridge_id: str) -> Response:
        """The same of one name."""
        query = read_query(request, ("source",))
        return json_answer(await self._control.find(cartridge_id, _source(query)))

    async def delete(self, request: Request, cartridge_id: str) -> Response:
        """Forgets a name, unless requests use it. A file that the name comes from stays."""
        query = read_query(request, ("source", "force"))
        force = truth(query, "force", default=False)
        await self._control.delete(cartridge_id, _source(query), even_if_used=force)
        return json_answer({"id": cartridge_id, "object": "cartridge", "deleted": True})


def _source(query: Any) -> str:
    return choice(query, "source", _SOURCES)


_FORM = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"},
    },
    "required": ["file"],
}
