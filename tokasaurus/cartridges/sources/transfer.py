"""Downloads a file in pieces: counted against its limit, reported in the log, over HTTP or not.

Redirects are followed here, so that each is checked before anything is sent, and keys go to no
other origin than the one they are for. Only what was asked for is logged, never what a redirect or
a query adds to it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import httpx2

from tokasaurus.cartridges.sources.source import SourceErrors

__all__ = [
    "PIECE_BYTES",
    "Http",
    "PieceWriter",
    "UrlCheck",
    "any_url",
    "content_length",
    "version_of",
]

log = logging.getLogger(__name__)

# Is given each URL before it is asked for, and raises an error if it may not be.
UrlCheck = Callable[[httpx2.URL], None]

PIECE_BYTES = 1 << 20
_MAX_JSON_BYTES = 16 << 20
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CONNECT_S = 10.0
_IDLE_S = 30.0
_REPORT_S = 5.0
_TRANSIENT = (408, 429)


class PieceWriter:
    """A new file that grows by pieces up to a limit, and says in the log how far it is.

    A context manager. The file is on the disk when it ends without an error.

    Args:
        path: of the file, which does not exist.
        errors: of the cartridge.
        max_bytes: that the file may have.
        total_bytes: that it will have; None if that is not known.
    """

    def __init__(
        self, path: Path, errors: SourceErrors, max_bytes: int, total_bytes: int | None
    ) -> None:
        if total_bytes is not None and total_bytes > max_bytes:
            raise errors.too_large(total_bytes, max_bytes)
        self.num_bytes = 0
        self._errors = errors
        self._max_bytes = max_bytes
        self._total_bytes = total_bytes
        self._file: BinaryIO = open(  # noqa: SIM115
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0
        )
        self._began = self._reported = time.monotonic()

    async def write(self, piece: bytes) -> None:
        """Appends a piece.

        Raises:
            RequestError: the file is larger than its limit.
            OSError: the disk is full, or fails.
        """
        self.num_bytes += len(piece)
        if self.num_bytes > self._max_bytes:
            raise self._errors.too_large(None, self._max_bytes)
        await asyncio.to_thread(_write_all, self._file, piece)
        now = time.monotonic()
        if now - self._reported >= _REPORT_S:
            self._reported = now
            speed = self.num_bytes / (now - self._began)
            share = f" of {self._total_bytes / 1e6:.1f}" if self._total_bytes else ""
            log.info(
                "cartridge %s: %.1f%s MB have come from source %s, %.1f MB/s",
                self._errors.shown,
                self.num_bytes / 1e6,
                share,
                self._errors.source,
                speed / 1e6,
            )

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


class Http:
    """A client for all sources that speak HTTP."""

    def __init__(self) -> None:
        logging.getLogger("httpx2").addFilter(_hide_query)
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(_IDLE_S, connect=_CONNECT_S),
            follow_redirects=False,
            event_hooks={"response": [_check_location]},
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def json(
        self, url: str, errors: SourceErrors, body: Any, headers: Mapping[str, str]
    ) -> Any:
        """Posts JSON and returns the JSON of the answer.

        Raises:
            RequestError: there is no such thing, or the source does not show it.
            SourceUnavailable: the source fails.
        """
        async with self.get(url, errors, any_url, headers, body=body) as answer:
            data = bytearray()
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) > _MAX_JSON_BYTES:
                    raise errors.unavailable("its answer is longer than any that makes sense")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise errors.unavailable("its answer is not JSON") from None

    @asynccontextmanager
    async def get(
        self,
        url: str,
        errors: SourceErrors,
        check: UrlCheck,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        fallback: Sequence[int] = (),
        body: Any = None,
    ) -> AsyncIterator[httpx2.Response]:
        """The answer with status 200, whose body has not come yet; follows redirects.

        Args:
            url: to ask for.
            errors: of the cartridge.
            check: of each URL.
            headers: for the origin of the URL only.
            method: GET or HEAD.
            fallback: the statuses after which GET is tried in the place of HEAD.
            body: JSON, for a POST.

        Raises:
            RequestError: there is no such thing, or the source does not show it.
            SourceUnavailable: the source fails.
        """
        # Compressed bodies could grow beyond every limit.
        sent = {**headers, "Accept-Encoding": "identity"}
        try:
            request = self._client.build_request(
                method if body is None else "POST", url, headers=sent, json=body
            )
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise errors.wrong(f"its URL is malformed: {error}") from None
        try:
            answer = await self._send(request, errors, check, fallback)
            try:
                _check_status(answer, errors)
                yield answer
            finally:
                await answer.aclose()
        except httpx2.TimeoutException:
            raise errors.unavailable(
                f"{request.url.host} does not answer in time; try again later, or check the network"
            ) from None
        except httpx2.HTTPError as error:
            raise errors.unavailable(
                f"{request.url.host} cannot be reached, or ends the connection:"
                f" {type(error).__name__}; try again later, or check the network"
            ) from None

    async def _send(
        self,
        request: httpx2.Request,
        errors: SourceErrors,
        check: UrlCheck,
        fallback: Sequence[int],
    ) -> httpx2.Response:
        """The first answer that is no redirect. A HEAD that is not known there becomes a GET."""
        for _ in range(_MAX_REDIRECTS + 2):
            check(request.url)
            try:
                answer = await self._client.send(request, stream=True)
            except httpx2.InvalidURL:
                raise errors.unavailable(f"{request.url.host} redirects to no valid URL") from None
            falls_back = answer.status_code in fallback and request.method == "HEAD"
            redirects = answer.status_code in _REDIRECTS and request.method != "POST"
            if not falls_back and not redirects:
                return answer
            try:
                if falls_back:
                    request = self._follow(request, "GET", request.url)
                else:
                    request = self._redirected(request, answer, errors)
            finally:
                await answer.aclose()
        raise errors.unavailable(f"it redirects more than {_MAX_REDIRECTS} times")

    async def save(
        self,
        url: str,
        path: Path,
        errors: SourceErrors,
        check: UrlCheck,
        headers: Mapping[str, str],
        max_bytes: int,
    ) -> str:
        """Downloads a file.

        Args:
            path: of the file, which does not exist.
            max_bytes: that it may have.

        Returns:
            Its version; see ``version_of``.

        Raises:
            RequestError: as ``get``, or the file is too large.
            SourceUnavailable: as ``get``.
            OSError: the disk is full, or fails.
        """
        async with self.get(url, errors, check, headers) as answer:
            total = content_length(answer)
            with PieceWriter(path, errors, max_bytes, total) as writer:
                async for piece in answer.aiter_raw(PIECE_BYTES):
                    await writer.write(piece)
            return version_of(answer)

    def _redirected(
        self, request: httpx2.Request, answer: httpx2.Response, errors: SourceErrors
    ) -> httpx2.Request:
        url = _location(answer)
        if url.scheme != request.url.scheme and url.scheme != "https":
            raise errors.unavailable(f"it redirects from {request.url.scheme} to {url.scheme}")
        return self._follow(request, request.method, url)

    def _follow(self, request: httpx2.Request, method: str, url: httpx2.URL) -> httpx2.Request:
        """Another request, which has the headers of the first if it goes to the same origin."""
        sent = {"Accept-Encoding": "identity"}
        if _origin(url) == _origin(request.url):
            sent = {key: request.headers[key] for key in request.headers if key != "host"}
        return self._client.build_request(method, url, headers=sent)


def _location(answer: httpx2.Response) -> httpx2.URL:
    """Raises httpx2.InvalidURL."""
    return answer.request.url.join(answer.headers.get("location", ""))


async def _check_location(answer: httpx2.Response) -> None:
    """Raises httpx2.InvalidURL before the client looks: releases differ in what they then raise."""
    if answer.status_code in _REDIRECTS:
        _location(answer)


def content_length(answer: httpx2.Response) -> int | None:
    """The bytes of a body, if the answer says so."""
    value = answer.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


def version_of(answer: httpx2.Response) -> str:
    """What tells a file's contents from others: its strong ETag, or its length and date.

    "" if the answer has neither.
    """
    tag = answer.headers.get("etag", "")
    if tag and not tag.startswith("W/"):
        return str(tag)
    date = answer.headers.get("last-modified", "")
    return f"{date} {answer.headers.get('content-length', '')}" if date else ""


def _hide_query(record: logging.LogRecord) -> bool:
    """The client logs each URL, and a query may be a key."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            each.copy_with(query=None) if isinstance(each, httpx2.URL) else each
            for each in record.args
        )
    return True


def any_url(url: httpx2.URL) -> None:
    pass


def _check_status(answer: httpx2.Response, errors: SourceErrors) -> None:
    status = answer.status_code
    if status in (404, 410):
        raise errors.wrong(f"{answer.url.host} has no such file; check the id")
    if status in (401, 403):
        raise errors.wrong(
            f"{answer.url.host} does not show it to this engine (status {status}); check the id,"
            " and the engine's key for this source"
        )
    if status != 200:
        kind = "is overloaded" if status in _TRANSIENT else "fails"
        raise errors.unavailable(f"{answer.url.host} {kind} (status {status}); try again later")
    encoding = answer.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise errors.unavailable(f"{answer.url.host} sends it compressed, as {encoding}")


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    # The port is None if it is the usual one.
    return url.scheme, url.host, url.port


def _write_all(file: BinaryIO, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]
