"""The cartridges that an engine has: which there are, what uses them, and how they go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.cartridges.store import CartridgeStore, NamedCartridge
from tokasaurus.errors import Conflict, EngineNotReady, NotFound
from tokasaurus.protocol.messages import CartridgeState
from tokasaurus.server.state import Engine, EngineState
from tokasaurus.text.cartridges import Cartridges, Use

__all__ = ["CartridgeControl", "described"]


class CartridgeControl:
    """Lists, adds and deletes cartridges.

    Args:
        state: of the engine.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state

    @property
    def store(self) -> CartridgeStore:
        """Where cartridges are. Raises EngineError if the engine cannot serve."""
        return self._parts()[1]

    def _parts(self) -> tuple[Engine, CartridgeStore, Cartridges]:
        engine = self._state.engine()
        if engine.store is None or not isinstance(engine.prefixes, Cartridges):
            raise EngineNotReady("this process has no store of cartridges")
        return engine, engine.store, engine.prefixes

    async def all(self) -> list[dict[str, Any]]:
        """Every name and its versions, the oldest version first."""
        engine, store, cartridges = self._parts()
        statistics = engine.generations.statistics
        states = () if statistics is None else statistics.cartridges
        found = await store.all()
        uses = cartridges.uses()
        return [described(each, found, uses, states) for each in found]

    async def find(self, cartridge_id: str, source: str) -> dict[str, Any]:
        """One name and its versions. Raises NotFound."""
        for each in await self.all():
            if (each["id"], each["source"]) == (cartridge_id, source):
                return each
        raise NotFound(f"the store has no cartridge {cartridge_id!r} of source {source!r}", "id")

    async def delete(self, cartridge_id: str, source: str, *, even_if_used: bool) -> None:
        """Forgets a name. Requests in flight finish with the version that they have.

        Raises:
            NotFound: there is no such name.
            Conflict: requests use it.
        """
        _, store, cartridges = self._parts()
        if not even_if_used:
            found = await self.find(cartridge_id, source)
            num_users = sum(version["users"] for version in found["versions"])
            if num_users:
                raise Conflict(
                    f"{num_users} requests use cartridge {cartridge_id!r}; wait for their end, or"
                    " set force=true: they finish with it, and no further request gets it",
                    "id",
                )
        await store.delete(cartridge_id, source)
        cartridges.forget(source, cartridge_id)


def described(
    cartridge: NamedCartridge,
    others: Iterable[NamedCartridge],
    uses: Mapping[str, Use],
    states: Iterable[CartridgeState],
) -> dict[str, Any]:
    """A name and its versions, as clients get it.

    Args:
        cartridge: of the name.
        others: all names, which may have the same versions.
        uses: of versions, by digest.
        states: what managers know of prefixes.
    """
    on_host = {each.cartridge.metadata.digest for each in others if each.is_on_host}
    by_name = {state.name: state for state in states}
    current = cartridge.cartridge.metadata
    former = [
        use.version.metadata
        for digest, use in uses.items()
        if digest != current.digest and (cartridge.source, cartridge.id) in use.names
    ]
    versions = [
        {**_version(each, uses.get(each.digest), by_name, each.digest in on_host), "current": is_it}
        for each, is_it in ((current, True), *((each, False) for each in former))
    ]
    return {
        "id": cartridge.id,
        "object": "cartridge",
        "source": cartridge.source,
        "uploaded": cartridge.is_upload,
        "created_at": int(cartridge.found_at),
        "bytes": cartridge.num_bytes,
        "tokens": current.num_tokens,
        "digest": current.digest,
        "users": sum(version["users"] for version in versions),
        "versions": versions,
    }


def _version(
    metadata: CartridgeMetadata,
    use: Use | None,
    by_name: Mapping[str, CartridgeState],
    is_on_host: bool,
) -> dict[str, Any]:
    names = () if use is None else use.prefixes
    states = [by_name[name] for name in names if name in by_name]
    return {
        "digest": metadata.digest,
        "bytes": metadata.num_bytes,
        "tokens": metadata.num_tokens,
        "frozen_tokens": metadata.num_frozen,
        "dtype": metadata.dtype,
        "model": metadata.shape.name or None,
        "users": 0 if use is None else use.num_users,
        "residence": {
            "device": sum(state.num_copies for state in states),
            "device_pages": sum(state.num_pages for state in states),
            "host": is_on_host,
            "disk": True,
        },
        "requests": sum(state.num_requests for state in states),
        "hits": sum(state.num_hits for state in states),
        "loads": sum(state.num_loads for state in states),
        "evictions": sum(state.num_evictions for state in states),
        "idle_s": min((state.idle_s for state in states), default=None),
    }
