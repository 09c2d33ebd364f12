"""The store of cartridges: finds, fetches and checks what requests name, and keeps it on the disk.

It turns a name into a version: a file that never changes, identified by the digest of its tensors.
Equal requests at the same time share one look at the source and one download. A local file is
looked at with each request, a remote one only the first time, or with force_redownload; it is
fetched again only if it is another one by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokasaurus.cartridges.host_copies import HostCopies
from tokasaurus.cartridges.index import Index, NameRecord, storage_error
from tokasaurus.cartridges.joined import JoinedCalls
from tokasaurus.cartridges.reading import ReadLimits, read_cartridge
from tokasaurus.cartridges.sources.choosing import COMPANION
from tokasaurus.cartridges.sources.http import HttpSource
from tokasaurus.cartridges.sources.huggingface import HuggingFaceSource
from tokasaurus.cartridges.sources.local import LocalSource
from tokasaurus.cartridges.sources.s3 import S3Source
from tokasaurus.cartridges.sources.source import (
    Fetched,
    Found,
    Source,
    SourceErrors,
    shown_id,
)
from tokasaurus.cartridges.sources.transfer import Http, PieceWriter
from tokasaurus.cartridges.sources.wandb import WandbSource
from tokasaurus.cartridges.specification import CartridgeSpec, StoredCartridge
from tokasaurus.config.memory import amount
from tokasaurus.config.slices import CartridgeConfig
from tokasaurus.errors import NotFound, RequestError

__all__ = ["CartridgeStore", "NamedCartridge"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_OWN_DIRECTORY = ".store"
_MAX_ID_CHARS = 2048
_UPLOAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_COMPANION_BYTES = 1 << 20
_NUM_LOOKS, _NUM_FETCHES = 16, 4  # at a time, of each source
_NUM_READS = 2
_NUM_TRIES = 3


@dataclass(frozen=True)
class NamedCartridge:
    """A name in the store, and the version that it means.

    Attributes:
        source: where it comes from; uploads are "local".
        id: as the source has it; of a URL, without the query.
        num_bytes: of the file.
        found_at: when the version was fetched or uploaded, in seconds since 1970.
        is_upload: whether no source has it.
        is_on_host: whether it is kept in the memory of the host.
    """

    source: str
    id: str
    cartridge: StoredCartridge
    num_bytes: int
    found_at: float
    is_upload: bool
    is_on_host: bool


class CartridgeStore:
    """Cartridges of one engine. Belongs to one event loop; several engines may share a directory.

    Nothing is written before the first cartridge is asked for.

    Args:
        config: what it may read, and how much it keeps.
    """

    def __init__(self, config: CartridgeConfig) -> None:
        self._config = config
        self._directory = Path(config.directory).expanduser().absolute()
        own = self._directory / _OWN_DIRECTORY
        self._index = Index(own, config.max_stored_bytes)
        self._host_copies = HostCopies(config.max_host_bytes)
        self._limits = ReadLimits(
            max_tokens=config.max_tokens, max_bytes=config.max_bytes, timeout_s=config.timeout_s
        )
        self._http = Http()
        self._sources = self._make_sources(own)
        self._looks: JoinedCalls[tuple[Found, int]] = JoinedCalls(fresh=True)
        self._fetches: JoinedCalls[NameRecord] = JoinedCalls(fresh=False)
        # By source, so that a slow one holds up only itself.
        self._looking = {name: asyncio.Semaphore(_NUM_LOOKS) for name in self._sources}
        self._fetching = {name: asyncio.Semaphore(_NUM_FETCHES) for name in self._sources}
        self._reading = asyncio.Semaphore(_NUM_READS)
        self._num_looks = 0
        self._committed_looks: dict[str, int] = {}  # by name, the latest whose version it means
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends what is being fetched, and gives up all versions."""
        await self._looks.close()
        await self._fetches.close()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._http.close()
        self._host_copies.clear()
        self._index.close()

    # --- versions ---------------------------------------------------------------------------------

    async def resolve(self, spec: CartridgeSpec) -> StoredCartridge:
        """The version that a request gets, which is kept until ``release``.

        Args:
            spec: as the request names it.

        Returns:
            A version. Call ``release`` with its digest once for each call of this.

        Raises:
            RequestError: about the field ``cartridges``: there is no such cartridge, the engine may
                not read it, it is no cartridge, or it exceeds a limit. Says what was looked for.
            SourceUnavailable: its source cannot be reached, is too slow, or fails.
            StorageFull: the disk has no room for it.
            EngineError: the store's directory cannot be used.
        """
        errors = SourceErrors(spec.source, spec.id)
        source = self._source(spec, errors)
        key = self._index.key(spec.source, spec.id)
        for _ in range(_NUM_TRIES):
            record = await self._on_disk(lambda: self._index.find(key))
            must_look = spec.force_redownload or spec.source == "local"
            if record is None or (must_look and not record.is_upload):
                record = await self._renew(key, source, record, errors)
            stored = await self._use(record)
            if stored is not None:
                return stored
            # Another engine has deleted the version, or it made room for others.
            if record.is_upload:
                raise errors.wrong("its file has been deleted; upload it again")
            await self._on_disk(functools.partial(self._index.remove, key, record.metadata.digest))
        raise errors.unavailable("its version is deleted again and again; ask again later")

    def release(self, digest: str) -> None:
        """Undoes one ``resolve``. What nothing names or uses any more is deleted."""
        if self._index.unpin(digest) and self._index.has_leftovers:
            self._in_background(self._index.drop_unnamed)

    # --- names ------------------------------------------------------------------------------------

    async def add(
        self, name: str, chunks: AsyncIterator[bytes], companion: bytes | None = None
    ) -> StoredCartridge:
        """Stores a cartridge under a name, which requests give as the id, with source "local".

        A cartridge that has this name loses it, whether it is an upload or a file in cartridge_dir.

        Args:
            name: of letters, digits, dots, dashes and underscores.
            chunks: of the file, in one of the formats that ``read_cartridge`` knows.
            companion: the contents of its config.yaml.

        Returns:
            The new version, which the name keeps.

        Raises:
            RequestError: the name or the file is wrong, or too large.
            StorageFull: the disk has no room for it.
            EngineError: the store's directory cannot be used.
        """
        errors = _upload_errors(name)
        if companion is not None and len(companion) > _MAX_COMPANION_BYTES:
            raise errors.too_large(len(companion), _MAX_COMPANION_BYTES)
        async with self.incoming() as directory:
            path, config = directory / "upload", None
            with PieceWriter(path, errors, self._config.max_bytes, None) as writer:
                async for chunk in chunks:
                    await writer.write(chunk)
            if companion is not None:
                config = directory / COMPANION
                await asyncio.to_thread(config.write_bytes, companion)
            return await self.add_file(name, path, config)

    async def add_file(
        self, name: str, path: Path, companion: Path | None = None
    ) -> StoredCartridge:
        """The same, with a file that is in ``incoming``."""
        errors, key = _upload_errors(name), self._index.key("local", name)
        async with self.incoming() as directory:
            target = directory / "read"
            record = await self._read(
                errors, key, Fetched(path, companion, ""), target, is_upload=True
            )
            # What is being looked at now is older.
            self._num_looks += 1
            self._committed_looks[key] = self._num_looks
            await asyncio.to_thread(self._index.commit, record, target)
        return self._stored(record)

    async def all(self) -> list[NamedCartridge]:
        """All names, the oldest version first."""
        records = await self._on_disk(self._index.records)
        return [
            NamedCartridge(
                source=record.source,
                id=record.id,
                cartridge=self._stored(record),
                num_bytes=record.num_bytes,
                found_at=record.found_at,
                is_upload=record.is_upload,
                is_on_host=record.metadata.digest in self._host_copies,
            )
            for record in records
        ]

    async def delete(self, name: str, source: str = "local") -> None:
        """Forgets a name. A file that it comes from, and versions in use, are not touched.

        Raises:
            NotFound: the store has no such name.
            EngineError: the store's directory cannot be used.
        """
        key = self._index.key(source, name)
        found = await self._on_disk(lambda: self._index.find(key))
        if found is None:
            raise NotFound(
                f"the store has no cartridge {shown_id(source, name)!r} of source {source!r}", "id"
            )
        await self._on_disk(lambda: self._index.remove(key))
        self._committed_looks.pop(key, None)

    @property
    def num_host_bytes(self) -> int:
        """Of the files that are kept in the memory of the host."""
        return self._host_copies.num_bytes

    @property
    def num_disk_bytes(self) -> int:
        """Of all versions."""
        return self._index.num_bytes

    # --- inside -----------------------------------------------------------------------------------

    def _make_sources(self, own: Path) -> dict[str, Source]:
        config = self._config
        roots = [Path(root).expanduser().absolute() for root in config.roots]
        if config.temporary_root:
            roots.append(Path(tempfile.gettempdir()))
        sources: dict[str, Source] = {
            "local": LocalSource(self._directory, roots, own, config.max_bytes),
            "wandb": WandbSource(self._http, config.max_bytes),
            "huggingface": HuggingFaceSource(self._http, config.max_bytes),
            "s3": S3Source(config.max_bytes),
            "http": HttpSource(self._http, config.hosts, config.max_bytes),
        }
        return sources

    def _source(self, spec: CartridgeSpec, errors: SourceErrors) -> Source:
        source = self._sources.get(spec.source)
        if source is None:
            known = ", ".join(self._sources)
            raise errors.wrong(f"there is no such source; it can be {known}")
        if spec.source not in self._config.sources:
            allowed = ", ".join(self._config.sources)
            raise errors.wrong(
                f"this engine gets cartridges from {allowed} only; upload it, or add"
                f" {spec.source} to cartridge_sources of the engine"
            )
        if not spec.id or len(spec.id) > _MAX_ID_CHARS or not spec.id.isprintable():
            raise errors.wrong(
                f"the id must have 1 to {_MAX_ID_CHARS} characters, all of them printable"
            )
        return source

    async def _renew(
        self, key: str, source: Source, record: NameRecord | None, errors: SourceErrors
    ) -> NameRecord:
        """The record of what the source has now."""
        found, look = await self._looks.run(key, lambda: self._look(source, errors))
        if record is not None and found.version and found.version == record.version:
            return record
        # Without a version nothing says that two downloads would be the same.
        job = (key, found.version or look)
        return await self._fetches.run(job, lambda: self._fetch(key, found, look, errors))

    async def _look(self, source: Source, errors: SourceErrors) -> tuple[Found, int]:
        async with self._looking[errors.source]:
            self._num_looks += 1
            look = self._num_looks
            return await self._in_time(source.find(errors.cartridge_id), errors), look

    async def _fetch(self, key: str, found: Found, look: int, errors: SourceErrors) -> NameRecord:
        """Fetches and reads what was found, unless that has happened meanwhile."""
        record = await self._on_disk(lambda: self._index.find(key))
        if record is not None and found.version and record.version == found.version:
            return record
        if found.num_bytes is not None and found.num_bytes > self._config.max_bytes:
            raise errors.too_large(found.num_bytes, self._config.max_bytes)
        began = time.monotonic()
        async with self.incoming() as directory:
            new, target = directory / "fetched", directory / "read"
            new.mkdir()
            async with self._fetching[errors.source]:
                fetched = await self._in_time(found.fetch(new), errors)
            record = await self._read(errors, key, fetched, target)
            # A later look may have been faster.
            is_latest = look >= self._committed_looks.get(key, 0)
            if is_latest:
                self._committed_looks[key] = look
            await asyncio.to_thread(self._index.commit, record, target, is_named=is_latest)
        log.info(
            "cartridge %s of source %s: version %s, %d tokens, %s, ready after %.1f s",
            errors.shown,
            errors.source,
            record.metadata.digest[:12],
            record.metadata.num_tokens,
            amount(record.num_bytes),
            time.monotonic() - began,
        )
        return record

    async def _read(
        self,
        errors: SourceErrors,
        key: str,
        fetched: Fetched,
        target: Path,
        *,
        is_upload: bool = False,
    ) -> NameRecord:
        """Checks a file whole, and writes what workers read."""
        async with self._reading:
            try:
                metadata = await read_cartridge(
                    fetched.path, target, self._limits, fetched.companion
                )
            except RequestError as error:
                raise errors.wrong(error.message) from error
        return NameRecord(
            source=errors.source,
            id=errors.shown,
            key=key,
            version=fetched.version,
            metadata=metadata,
            num_bytes=target.stat().st_size,
            found_at=time.time(),
            is_upload=is_upload,
        )

    async def _use(self, record: NameRecord) -> StoredCartridge | None:
        """Pins a version, and sees to its copy in memory; None if it has gone."""
        digest = record.metadata.digest
        pinning = asyncio.ensure_future(self._on_disk(lambda: self._index.pin(digest)))
        try:
            is_there = await asyncio.shield(pinning)
        except asyncio.CancelledError:
            pinning.add_done_callback(lambda done: self._undo_pin(done, digest))
            raise
        if not is_there:
            return None
        if not self._host_copies.touch(digest):
            path = self._index.path(digest)
            self._in_background(lambda: self._host_copies.keep(digest, path))
        return self._stored(record)

    def _undo_pin(self, pinning: asyncio.Future[bool], digest: str) -> None:
        if not pinning.cancelled() and pinning.exception() is None and pinning.result():
            self._index.unpin(digest)

    def _stored(self, record: NameRecord) -> StoredCartridge:
        return StoredCartridge(self._index.path(record.metadata.digest), record.metadata)

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[Path]:
        """A directory for one cartridge, which is deleted at the end. Raises EngineError."""
        with contextlib.ExitStack() as stack:
            try:
                yield await asyncio.to_thread(stack.enter_context, self._index.incoming())
            except ConnectionError:  # of a client that sends one
                raise
            except OSError as error:
                raise storage_error(error, self._directory) from error

    async def _on_disk(self, call: Callable[[], T]) -> T:
        """The result of a call that blocks on the store's directory."""
        try:
            return await asyncio.to_thread(call)
        except OSError as error:
            raise storage_error(error, self._directory) from error

    async def _in_time(self, call: Awaitable[T], errors: SourceErrors) -> T:
        limit_s = self._config.timeout_s
        try:
            return await asyncio.wait_for(call, limit_s)
        except asyncio.TimeoutError:
            raise errors.unavailable(
                f"it did not come within {limit_s:g} s; try again later, or raise"
                " cartridge_timeout_s of the engine"
            ) from None

    def _in_background(self, call: Callable[[], object]) -> None:
        async def run() -> None:
            try:
                await asyncio.to_thread(call)
            except OSError as error:
                log.warning("%s cannot be tidied: %s", self._directory, error)

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _upload_errors(name: str) -> SourceErrors:
    """The errors about an upload. Raises RequestError if it cannot have this name."""
    if not _UPLOAD_NAME.fullmatch(name):
        raise RequestError(
            f"the name {shown_id('local', name)!r} must begin with a letter or digit, and have at"
            " most 128 letters, digits, dots, dashes and underscores",
            "name",
        )
    return SourceErrors("local", name)
