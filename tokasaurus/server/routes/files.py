"""``/v1/files``: the files that batches read and write, as OpenAI's clients handle them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from tokasaurus.batch.disk import disk_error
from tokasaurus.batch.records import Batch, StoredFile, new_id
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.errors import RequestError
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.queries import choice, read_query, whole_number
from tokasaurus.server.http.uploads import receive_form

__all__ = ["MAX_LIFETIME_S", "FileRoutes", "json_page"]

_MAX_FILE_BYTES = 200 << 20
MAX_LIFETIME_S = 2_592_000  # 30 days
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"


class FileRoutes:
    """The routes.

    Args:
        batches: with the store of files.
    """

    def __init__(self, batches: BatchRunner) -> None:
        self._batches = batches

    def router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        form = {"multipart/form-data": {"schema": _FORM}}
        body = {"required": True, "content": form}
        add("/v1/files", self.upload, methods=["POST"], openapi_extra={"requestBody": body})
        add("/v1/files", self.list, methods=["GET"])
        add("/v1/files/{file_id}", self.retrieve, methods=["GET"])
        add("/v1/files/{file_id}", self.delete, methods=["DELETE"])
        add("/v1/files/{file_id}/content", self.content, methods=["GET"], response_model=None)
        return router

    async def upload(self, request: Request) -> Response:
        """Stores a file: the input of a batch."""
        file_id = new_id("file")
        path = self._batches.store.path(file_id)
        kept = False
        try:
            form = await receive_form(
                request,
                path,
                file_field="file",
                fields=("purpose", _ANCHOR, _SECONDS),
                max_bytes=_MAX_FILE_BYTES,
            )
            if form.filename is None:
                raise RequestError("file is required", "file")
            purpose = form.fields.get("purpose")
            if purpose != "batch":
                was = "and it is missing" if purpose is None else f"not {purpose!r}"
                raise RequestError(f"purpose must be batch, {was}", "purpose")
            now = int(time.time())
            lifetime_s = _lifetime_s(form.fields)
            file = StoredFile(
                id=file_id,
                bytes=form.num_bytes,
                created_at=now,
                filename=form.filename,
                purpose="batch",
                expires_at=None if lifetime_s is None else now + lifetime_s,
            )
            await self._batches.ask(self._batches.store.add_file, file)
            kept = True
        except OSError as error:
            raise disk_error(error) from None
        finally:
            if not kept:
                path.unlink(missing_ok=True)
        return json_answer(file)

    async def list(self, request: Request) -> Response:
        """Files, newest first unless ``order`` is asc."""
        query = read_query(request, ("purpose", "limit", "order", "after"))
        files, more = await self._batches.ask(
            self._batches.store.list_files,
            time.time(),
            purpose=query.get("purpose"),
            after=query.get("after"),
            limit=whole_number(query, "limit", 10_000, 1, 10_000),
            ascending=choice(query, "order", ("desc", "asc")) == "asc",
        )
        return json_answer(json_page(files, more))

    async def retrieve(self, file_id: str) -> Response:
        """A file's name, size and dates."""
        return json_answer(await self._file(file_id))

    async def content(self, file_id: str) -> Response:
        """The file itself."""
        file = await self._file(file_id)
        path = self._batches.store.path(file.id)
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    async def delete(self, file_id: str) -> Response:
        """Deletes a file, unless a batch still reads it."""
        await self._batches.ask(self._batches.store.delete_file, file_id, time.time())
        return json_answer({"id": file_id, "object": "file", "deleted": True})

    async def _file(self, file_id: str) -> StoredFile:
        return await self._batches.ask(self._batches.store.file, file_id, time.time())


def json_page(entries: list[StoredFile] | list[Batch], more: bool) -> dict[str, object]:
    """One page of a list, as OpenAI's clients read it."""
    first, last = (entries[0].id, entries[-1].id) if entries else (None, None)
    return {"object": "list", "data": entries, "first_id": first, "last_id": last, "has_more": more}


def _lifetime_s(fields: Mapping[str, str]) -> int | None:
    if _ANCHOR not in fields and _SECONDS not in fields:
        return None
    choice(fields, _ANCHOR, ("created_at",))
    if _SECONDS not in fields:
        raise RequestError(f"{_SECONDS} is required with {_ANCHOR}", _SECONDS)
    return whole_number(fields, _SECONDS, 0, 1, MAX_LIFETIME_S)


_FORM = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        _ANCHOR: {"type": "string", "enum": ["created_at"]},
        _SECONDS: {"type": "integer", "minimum": 1, "maximum": MAX_LIFETIME_S},
    },
    "required": ["file", "purpose"],
}
