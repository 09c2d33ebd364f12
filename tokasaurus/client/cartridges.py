"""The cartridges that an engine keeps."""

from __future__ import annotations

import builtins
from os import PathLike
from pathlib import Path
from typing import Any

from tokasaurus.client.batches import deleted
from tokasaurus.client.connection import Connection
from tokasaurus.client.reading import read_cartridge
from tokasaurus.client.requests import Call, Form, path
from tokasaurus.client.results import Cartridge

__all__ = ["AsyncCartridges"]


class AsyncCartridges:
    """Lists, uploads and deletes cartridges."""

    def __init__(self, connection: Connection, timeout_s: float | None) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def list(self) -> builtins.list[Cartridge]:
        """Those that the engine's store has."""
        call = Call("GET", "/v1/cartridges", timeout_s=self._timeout_s)
        answer = await self._connection.json(call)
        return [read_cartridge(each) for each in answer["data"]]

    async def get(self, cartridge_id: str, *, source: str = "local") -> Cartridge:
        """One of them. Raises NotFound."""
        return read_cartridge(await self._connection.json(self._call("GET", cartridge_id, source)))

    async def upload(
        self, content: bytes | str | PathLike[str], *, name: str | None = None
    ) -> Cartridge:
        """Uploads a file; requests then call it by its name, with the source "local".

        Args:
            content: the bytes of a .pt or safetensors file, or its path.
            name: default that of the file without its ending. A former one is replaced.

        Raises:
            RequestError: the file cannot be read, or is no cartridge for this engine's model.
            EngineError: the engine cannot be reached, or has no room.
        """
        if isinstance(content, bytes):
            filename = f"{name}.safetensors" if name else "cartridge.safetensors"
        else:
            content = Path(content).expanduser()
            filename, name = content.name, name or content.stem
        form = Form({} if name is None else {"name": name}, filename, content)
        call = Call("POST", "/v1/cartridges", form=form, timeout_s=self._timeout_s)
        return read_cartridge(await self._connection.json(call))

    async def delete(
        self, cartridge_id: str, *, source: str = "local", force: bool = False
    ) -> None:
        """Deletes a name, and the versions that only it has.

        Args:
            cartridge_id: its id.
            source: of the id.
            force: delete it while requests use it; they finish with it.

        Raises:
            NotFound: there is none of this id and source.
            Conflict: requests use it.
        """

        async def gone() -> Any | None:
            return await deleted(self.get(cartridge_id, source=source))

        call = self._call("DELETE", cartridge_id, source, {"force": "true"} if force else {})
        await self._connection.json(call, already=gone)

    def _call(
        self, method: str, cartridge_id: str, source: str, query: dict[str, str] | None = None
    ) -> Call:
        query = {"source": source, **(query or {})}
        where = path("v1", "cartridges", cartridge_id, query=query)
        return Call(method, where, timeout_s=self._timeout_s)
