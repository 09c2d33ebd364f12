"""Watches connections: work for a client that has disconnected ends at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.types import Receive

from tokasaurus.server.errors import ClientGone

__all__ = ["until_disconnect", "watched"]

T = TypeVar("T")


@contextlib.contextmanager
def watched(receive: Receive, on_disconnect: Callable[[ClientGone], None]) -> Iterator[None]:
    """Calls back if the client disconnects before the end of the block.

    Args:
        receive: of a request whose body has been read.
        on_disconnect: gets the error that the work is to end with.
    """

    async def watch() -> None:
        await _disconnect(receive)
        on_disconnect(_client_gone())

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. A disconnect cancels the work, and raises ClientGone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _client_gone()
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait({task})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _client_gone() -> ClientGone:
    return ClientGone("the client disconnected")
