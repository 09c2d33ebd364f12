"""Gives an engine its cartridges."""

from __future__ import annotations

from tokasaurus.cartridges.specification import CartridgeSpec, StoredCartridge
from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.config.slices import ServerConfig
from tokasaurus.loop_thread import LoopThread
from tokasaurus.text.cartridges import Cartridges, Store
from tokasaurus.text.generations import Generations

__all__ = ["StoreInThread", "cartridges_of"]


def cartridges_of(config: ServerConfig, generations: Generations, store: Store) -> Cartridges:
    """The cartridges of requests to one engine.

    Args:
        config: the server's slice.
        generations: of the engine.
        store: of its cartridges.
    """
    return Cartridges(store, config.cartridge_shape, config.max_request_tokens, generations.command)


class StoreInThread:
    """A store that belongs to the loop of a thread, where all coroutines of the caller run, too.

    Args:
        config: the server's slice.
        loop: the thread.
    """

    def __init__(self, config: ServerConfig, loop: LoopThread) -> None:
        self._store = CartridgeStore(config.cartridges)
        self._loop = loop

    async def resolve(self, spec: CartridgeSpec) -> StoredCartridge:
        return await self._store.resolve(spec)

    def release(self, digest: str) -> None:
        """Undoes one ``resolve``. Any thread may call it."""
        self._loop.call(self._store.release, digest)

    async def close(self) -> None:
        await self._store.close()
