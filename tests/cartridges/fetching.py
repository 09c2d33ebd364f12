"""What a source gives for an id."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from tokasaurus.cartridges.sources.source import Found, Source
from tokasaurus.cartridges.sources.transfer import Http
from tokasaurus.errors import RequestError, SourceUnavailable

T = TypeVar("T")


class Got(NamedTuple):
    data: bytes
    companion: bytes | None
    found_version: str
    version: str
    num_bytes: int | None


def with_http(call: Callable[[Http], Coroutine[Any, Any, T]]) -> T:
    """The result of a coroutine that has a client."""

    async def run() -> T:
        http = Http()
        try:
            return await call(http)
        finally:
            await http.close()

    return asyncio.run(run())


async def fetch(source: Source, cartridge_id: str, directory: Path) -> Got:
    """Finds and fetches into a new directory."""
    found: Found = await source.find(cartridge_id)
    new = directory / f"new{len(list(directory.iterdir()))}"
    new.mkdir()
    fetched = await found.fetch(new)
    assert fetched.path.parent == new
    companion = None if fetched.companion is None else fetched.companion.read_bytes()
    data = fetched.path.read_bytes()
    return Got(data, companion, found.version, fetched.version, found.num_bytes)


async def refusal(source: Source, cartridge_id: str, directory: Path) -> str:
    """The message of the RequestError, which names the id and the field."""
    with pytest.raises(RequestError) as caught:
        await fetch(source, cartridge_id, directory)
    assert caught.value.field == "cartridges"
    shown = cartridge_id.partition("?")[0] if "://" in cartridge_id else cartridge_id
    assert repr(shown) in caught.value.message
    return caught.value.message


async def failure(source: Source, cartridge_id: str, directory: Path) -> str:
    """The message of the SourceUnavailable, which names the id."""
    with pytest.raises(SourceUnavailable) as caught:
        await fetch(source, cartridge_id, directory)
    assert repr(cartridge_id.partition("?")[0]) in str(caught.value)
    return str(caught.value)
