"""A store of cartridges that a test fills, without files."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path

from tokasaurus.cartridges.specification import (
    CartridgeMetadata,
    CartridgeSpec,
    ModelShape,
    StoredCartridge,
)
from tokasaurus.errors import RequestError


def version(content: str, num_tokens: int, shape: ModelShape) -> StoredCartridge:
    digest = hashlib.sha256(content.encode()).hexdigest()
    metadata = CartridgeMetadata(digest, num_tokens, 1, shape, "F32", 4 * num_tokens)
    return StoredCartridge(Path(f"/store/{digest}.safetensors"), metadata)


class KnownCartridges:
    """The store.

    Attributes:
        versions: what each (source, id) stands for now.
        asked: every spec that was resolved, in order.
        holds: how often each digest was resolved and not released.
        gates: by id: resolving waits for the event.
        num_waiting: calls that wait for one.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.versions: dict[tuple[str, str], StoredCartridge] = {}
        self.asked: list[CartridgeSpec] = []
        self.holds: Counter[str] = Counter()
        self.gates: dict[str, asyncio.Event] = {}
        self.num_waiting = 0

    def put(
        self,
        name: str,
        num_tokens: int,
        content: str | None = None,
        *,
        source: str = "local",
        shape: ModelShape | None = None,
    ) -> StoredCartridge:
        """A cartridge, or another version of one."""
        found = version(name if content is None else content, num_tokens, shape or self.shape)
        self.versions[source, name] = found
        return found

    async def resolve(self, spec: CartridgeSpec) -> StoredCartridge:
        self.asked.append(spec)
        found = self.versions.get((spec.source, spec.id))
        if spec.id in self.gates:
            self.num_waiting += 1
            try:
                await self.gates[spec.id].wait()
            finally:
                self.num_waiting -= 1
        if found is None:
            raise RequestError(
                f"cartridge {spec.id!r} of source {spec.source}: there is none", "cartridges"
            )
        self.holds[found.metadata.digest] += 1
        return found

    def release(self, digest: str) -> None:
        assert self.holds[digest] > 0
        self.holds[digest] -= 1

    @property
    def held(self) -> set[str]:
        return {digest for digest, count in self.holds.items() if count}
