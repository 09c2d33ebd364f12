"""Cartridges as requests name them, and the way of their files to an engine elsewhere.

A file that is uploaded gets a name made of its place and its content. So the same content is
uploaded once, whichever process has it, and new content never meets a request for the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokasaurus.client.cartridges import AsyncCartridges
from tokasaurus.errors import Conflict, NotFound, RequestError

__all__ = ["CartridgeUploads", "is_loopback", "is_on_this_machine", "shares_no_disk"]

log = logging.getLogger(__name__)

_KEPT = 2  # versions of a file: requests may be under way to the former one
_CHUNK_BYTES = 1 << 22
_LOOPBACK = ("localhost", "localhost.localdomain")


def shares_no_disk(url: str, mode: str) -> bool:
    """Whether local cartridges have to be uploaded.

    Args:
        url: of the engine.
        mode: "always", "never", or "auto", which uploads them unless the engine is on this machine.
    """
    return mode == "always" or (mode == "auto" and not is_on_this_machine(url))


def is_loopback(url: str) -> bool:
    """Whether an address means another machine on each machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host in _LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def is_on_this_machine(url: str) -> bool:
    """Whether an address is one of this machine."""
    if is_loopback(url):
        return True
    host = urlsplit(url).hostname or ""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(_is_own(address) for address in found)


def _is_own(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    family = socket.AF_INET6 if parsed.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind((address, 0))
    except OSError:
        return False
    return True


class CartridgeUploads:
    """Uploads the files of local cartridges to one engine, each content once.

    For one event loop.

    Args:
        cartridges: of the engine.
    """

    def __init__(self, cartridges: AsyncCartridges) -> None:
        self._cartridges = cartridges
        self._names: dict[str, tuple[tuple[int, ...], str]] = {}  # by path
        self._locks: dict[str, asyncio.Lock] = {}

    async def named(self, specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Cartridges as requests to this engine name them: local ones are uploaded.

        A local one that is no file here keeps its id: the engine may know it under that name.

        Raises:
            RequestError: a file cannot be read, or is no cartridge for the engine's model.
            EngineError: the engine cannot be reached, or has no room.
        """
        return [await self._named(dict(each)) for each in specs]

    async def _named(self, spec: dict[str, Any]) -> dict[str, Any]:
        if spec.get("source") != "local":
            return spec
        name = await self.uploaded(spec["id"])
        return spec if name is None else {"id": name, "source": "local"}

    async def uploaded(self, path: str) -> str | None:
        """The name of a file's present content at the engine; None if there is no such file here.

        Raises:
            RequestError, EngineError: as of :meth:`named`.
        """
        file = Path(path).expanduser()
        where = str(file.absolute())
        async with self._locks.setdefault(where, asyncio.Lock()):
            mark = _mark(file)
            if mark is None:
                return None
            known = self._names.get(where)
            if known is not None and known[0] == mark:
                return known[1]
            name = await self._upload(file, where)
            self._names[where] = (mark, name)
            return name

    def forget(self) -> None:
        """Asks the engine again what it has, before the next request."""
        self._names.clear()

    async def _upload(self, file: Path, where: str) -> str:
        place = hashlib.sha256(f"{socket.gethostname()}:{where}".encode()).hexdigest()[:12]
        try:
            content = await asyncio.to_thread(_digest, file)
        except OSError as error:
            raise RequestError(f"cartridge {file}: {error.strerror}", "cartridges") from None
        name = f"verl-{place}-{content[:24]}"
        try:
            await self._cartridges.get(name)
            return name
        except NotFound:
            pass
        log.info("uploading the cartridge %s as %s", file, name)
        await self._cartridges.upload(file, name=name)
        await self._clear(f"verl-{place}-", name)
        return name

    async def _clear(self, beginning: str, newest: str) -> None:
        """Deletes old versions of the same file, unless requests use them."""
        found = [each for each in await self._cartridges.list() if each.id.startswith(beginning)]
        others = [each for each in found if each.id != newest]
        others.sort(key=lambda each: each.raw.get("created_at", 0))
        for each in others[: max(0, len(found) - _KEPT)]:
            with contextlib.suppress(Conflict, NotFound):
                await self._cartridges.delete(each.id)


def _mark(file: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None if there is no such file."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # ValueError: this cannot be a path
        return None
    if not os.path.isfile(file):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
