"""Reads ``multipart/form-data`` with one file, which goes to disk while it comes in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from tokasaurus.errors import RequestError
from tokasaurus.server.errors import BodyTooLarge, ClientGone, WrongMediaType
from tokasaurus.server.http.bodies import refuse_compressed

__all__ = ["Form", "receive_form"]

_MAX_FIELD_BYTES = 1 << 10
_MAX_NAME_BYTES = 255
_MAX_BOUNDARY_BYTES = 256  # as many as the parser takes
_WRITE_BYTES = 1 << 20  # written at once


@dataclass
class Form:
    """A form, except for the content of its file.

    Attributes:
        fields: by name.
        filename: None if there was no file.
        num_bytes: of the file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    num_bytes: int = 0


async def receive_form(
    request: Request, path: Path, *, file_field: str, fields: Collection[str], max_bytes: int
) -> Form:
    """Reads a form.

    Args:
        request: with the form as its body.
        path: where the file's content goes, which its owner alone may read; the caller removes it,
            also after an error.
        file_field: the field with the file.
        fields: the other fields that the form may have.
        max_bytes: of the file.

    Raises:
        RequestError: the form is not like this; names the field.
        BodyTooLarge: the file is too large.
        WrongMediaType: the body is compressed, or not a form.
        ClientGone: the client disconnected.
    """
    refuse_compressed(request)
    media_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if media_type != b"multipart/form-data" or not boundary:
        raise WrongMediaType("the body must be sent as multipart/form-data with a boundary")
    if len(boundary) > _MAX_BOUNDARY_BYTES:
        raise RequestError(
            f"the boundary of the form has {len(boundary)} characters, and it may have"
            f" {_MAX_BOUNDARY_BYTES}"
        )
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with open(os.open(path, flags, 0o600), "wb") as file:
        parts = _Parts(file, file_field, fields, max_bytes)
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.on_part_begin,
                "on_header_field": parts.on_header_field,
                "on_header_value": parts.on_header_value,
                "on_header_end": parts.on_header_end,
                "on_headers_finished": parts.on_headers_finished,
                "on_part_data": parts.on_part_data,
                "on_part_end": parts.on_part_end,
                "on_end": parts.on_end,
            },
        )
        try:
            async for piece in request.stream():
                parser.write(piece)
                if parts.num_waiting >= _WRITE_BYTES:
                    await asyncio.to_thread(parts.write)
        except ClientDisconnect:
            raise ClientGone("the client disconnected") from None
        except FormParserError as error:
            raise RequestError(f"the body is not valid multipart/form-data: {error}") from None
        if not parts.ended:
            raise RequestError("the body ends before its last boundary")
        await asyncio.to_thread(parts.write_and_sync)
    return parts.form


class _Parts:
    """Collects what the parser finds."""

    def __init__(
        self, file: BinaryIO, file_field: str, fields: Collection[str], max_bytes: int
    ) -> None:
        self.form = Form()
        self.ended = False
        self.num_waiting = 0  # bytes that are not written yet
        self._waiting: list[bytes] = []
        self._file = file
        self._file_field = file_field
        self._fields = fields
        self._max_bytes = max_bytes
        self._headers: dict[bytes, bytes] = {}
        self._header = (b"", b"")
        self._name = ""
        self._value = b""

    def write(self) -> None:
        waiting, self._waiting, self.num_waiting = self._waiting, [], 0
        self._file.writelines(waiting)

    def write_and_sync(self) -> None:
        self.write()
        self._file.flush()
        os.fsync(self._file.fileno())

    # --- called by the parser ---------------------------------------------------------------------

    def on_part_begin(self) -> None:
        self._headers, self._header, self._value = {}, (b"", b""), b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def on_header_end(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = (b"", b"")

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise RequestError("each part of the form must have a name in its Content-Disposition")
        self._name = name = options[b"name"].decode(errors="replace")
        if name == self._file_field:
            if self.form.filename is not None:
                raise RequestError(f"{name} must be one file", name)
            if b"filename" not in options:
                raise RequestError(f"{name} must be a file, with a filename", name)
            filename = options[b"filename"][:_MAX_NAME_BYTES].decode(errors="replace")
            self.form.filename = filename
        elif name not in self._fields:
            known = ", ".join([self._file_field, *self._fields])
            raise RequestError(
                f"{name[:100]} is not a field of this form; it may have {known}", name[:100]
            )
        elif name in self.form.fields:
            raise RequestError(f"{name} was sent twice", name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != self._file_field:
            self._value += data[start:end]
            if len(self._value) > _MAX_FIELD_BYTES:
                raise RequestError(
                    f"{self._name} may have at most {_MAX_FIELD_BYTES} bytes", self._name
                )
            return
        self.form.num_bytes += end - start
        if self.form.num_bytes > self._max_bytes:
            raise BodyTooLarge(f"{self._name} is larger than {self._max_bytes} bytes")
        self._waiting.append(data[start:end])
        self.num_waiting += end - start

    def on_part_end(self) -> None:
        if self._name != self._file_field:
            self.form.fields[self._name] = self._value.decode(errors="replace")

    def on_end(self) -> None:
        self.ended = True
