"""What the sources have in common: what they find and fetch, and their errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokasaurus.errors import RequestError, SourceUnavailable

__all__ = ["FIELD", "Fetched", "Found", "Source", "SourceErrors", "shown_id"]

FIELD = "cartridges"

_MAX_SHOWN_CHARS = 300


@dataclass(frozen=True)
class Fetched:
    """A cartridge's file in a directory of ours.

    Attributes:
        path: of the file, which nothing else writes to.
        companion: its config.yaml, if the source has one.
        version: of what was fetched, which may be newer than what was found.
    """

    path: Path
    companion: Path | None
    version: str


@dataclass(frozen=True)
class Found:
    """What a source has under an id at present.

    Attributes:
        version: another one where the contents may be others; "" if the source cannot tell.
        num_bytes: of the file; None if the source does not say.
        fetch: copies it into a directory, which is empty.
    """

    version: str
    num_bytes: int | None
    fetch: Callable[[Path], Awaitable[Fetched]]


class Source(Protocol):
    """One kind of places that cartridges come from."""

    async def find(self, cartridge_id: str) -> Found:
        """Looks what there is at present.

        Raises:
            RequestError: there is no such cartridge, the id is malformed, or the source refuses it.
            SourceUnavailable: the source cannot be reached, or fails.
        """
        ...


def shown_id(source: str, cartridge_id: str) -> str:
    """An id as logs, lists and errors show it: without the query of a URL, which may be a key."""
    if source == "http":
        cartridge_id = cartridge_id.partition("?")[0]
    if len(cartridge_id) > _MAX_SHOWN_CHARS:
        return cartridge_id[:_MAX_SHOWN_CHARS] + "..."
    return cartridge_id


@dataclass(frozen=True)
class SourceErrors:
    """Makes the errors about one cartridge, which name it and its source."""

    source: str
    cartridge_id: str

    def wrong(self, reason: str) -> RequestError:
        """The request cannot have this cartridge; the reason ends with the remedy."""
        return RequestError(f"{self}: {reason}", FIELD)

    def unavailable(self, reason: str) -> SourceUnavailable:
        """The source does not answer as it should."""
        return SourceUnavailable(f"{self}: {reason}")

    def too_large(self, num_bytes: int | None, max_bytes: int) -> RequestError:
        has = "more" if num_bytes is None else f"{num_bytes} bytes"
        return self.wrong(
            f"its file has {has}, and max_cartridge_bytes={max_bytes} allows less; take a smaller"
            " cartridge, or raise max_cartridge_bytes of the engine"
        )

    @property
    def shown(self) -> str:
        """The id for logs and lists."""
        return shown_id(self.source, self.cartridge_id)

    def __str__(self) -> str:
        return f"cartridge {self.shown!r} of source {self.source!r}"
