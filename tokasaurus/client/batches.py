"""Files and batches of an engine: many requests that survive it."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec

from tokasaurus.client.connection import Connection
from tokasaurus.client.reading import read_batch, read_batch_result, read_file
from tokasaurus.client.requests import Call, Form, batch_lines, path
from tokasaurus.client.results import Batch, BatchResult, StoredFile
from tokasaurus.errors import EngineError, NotFound, TimedOut

__all__ = ["BATCH_ENDPOINT", "AsyncBatches", "AsyncFiles"]

BATCH_ENDPOINT = "/v1/chat/completions"
_REQUEST_ID = "request_id"  # in the metadata of a batch
_PAGE = 100
_FIRST_POLL_S, _LONGEST_POLL_S = 0.05, 5.0


class AsyncFiles:
    """The files that the engine keeps: inputs and outputs of batches."""

    def __init__(self, connection: Connection, timeout_s: float | None) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def upload(
        self,
        content: bytes | str | PathLike[str],
        *,
        filename: str | None = None,
        purpose: str = "batch",
    ) -> StoredFile:
        """Uploads a file.

        Args:
            content: the bytes, or the path of a file.
            filename: what the engine calls it; default that of the path.
            purpose: "batch".

        Raises:
            RequestError: the file cannot be read, or the engine refuses it.
            EngineError: the engine cannot be reached, or has no room.
        """
        if not isinstance(content, bytes):
            content = Path(content).expanduser()
            filename = filename or content.name
        form = Form({"purpose": purpose}, filename or "requests.jsonl", content)
        call = Call("POST", "/v1/files", form=form, timeout_s=self._timeout_s)
        return read_file(await self._connection.json(call))

    async def list(self, *, limit: int | None = None) -> builtins.list[StoredFile]:
        """The files, newest first; all of them without a limit."""
        return [read_file(each) for each in await self._all(limit)]

    async def get(self, file_id: str) -> StoredFile:
        """One file. Raises NotFound."""
        return read_file(await self._connection.json(self._call("GET", file_id)))

    async def content(self, file_id: str) -> bytes:
        """What is in a file, lines with their ends. Raises NotFound."""
        lines = [line async for line in self.lines(file_id)]
        return "".join(f"{line}\n" for line in lines).encode()

    async def lines(self, file_id: str) -> AsyncGenerator[str, None]:
        """The lines of a file, without holding all of it. Raises NotFound."""
        call = Call("GET", path("v1", "files", file_id, "content"), timeout_s=self._timeout_s)
        async with self._connection.lines(call) as lines:
            async for line in lines:
                yield line

    async def delete(self, file_id: str) -> None:
        """Deletes a file.

        Raises:
            NotFound: there is none of this id.
            Conflict: an unfinished batch reads it.
        """
        await self._connection.json(
            self._call("DELETE", file_id), already=lambda: deleted(self.get(file_id))
        )

    async def _all(self, limit: int | None) -> builtins.list[dict[str, Any]]:
        return await _entries(self._connection, "files", limit, self._timeout_s)

    def _call(self, method: str, file_id: str) -> Call:
        return Call(method, path("v1", "files", file_id), timeout_s=self._timeout_s)


class AsyncBatches:
    """The batches of the engine."""

    def __init__(self, connection: Connection, files: AsyncFiles, timeout_s: float | None) -> None:
        self._connection = connection
        self._files = files
        self._timeout_s = timeout_s

    async def create(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        endpoint: str = BATCH_ENDPOINT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Uploads requests, and starts a batch of them.

        Args:
            requests: bodies for the endpoint, whose ids are then "0", "1" and so on; or whole
                lines with ``custom_id`` and ``body``.
            endpoint: any route that generates.
            completion_window: such as "30m", "24h", "7d".
            metadata: at most 15 texts; the batch repeats them.

        Raises:
            RequestError: the engine refuses the file.
            EngineError: the engine cannot be reached, or has no room.
        """
        file = await self._files.upload(batch_lines(requests, endpoint))
        return await self.start(
            file.id, endpoint=endpoint, completion_window=completion_window, metadata=metadata
        )

    async def start(
        self,
        input_file_id: str,
        *,
        endpoint: str = BATCH_ENDPOINT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Starts a batch of an uploaded file, once, however often the connection breaks.

        Its ``metadata`` has a ``request_id``, by which a retry finds the batch that a former
        attempt has started.

        Args:
            input_file_id: of the file, whose lines have this endpoint as their ``url``.
            endpoint, completion_window, metadata: as of :meth:`create`.

        Raises:
            NotFound: there is no such file.
        """
        request_id = f"req_{uuid.uuid4().hex}"
        body = {
            "input_file_id": input_file_id,
            "endpoint": endpoint,
            "completion_window": completion_window,
            "metadata": {_REQUEST_ID: request_id, **(metadata or {})},
        }

        async def started() -> Any | None:
            batches = await self._all(_PAGE)
            same = [each for each in batches if each.get("metadata") == body["metadata"]]
            return same[0] if same else None

        headers = {"X-Request-Id": request_id}
        call = Call("POST", "/v1/batches", body, timeout_s=self._timeout_s, headers=headers)
        return read_batch(await self._connection.json(call, already=started))

    async def get(self, batch_id: str) -> Batch:
        """One batch as it is now. Raises NotFound."""
        call = Call("GET", path("v1", "batches", batch_id), timeout_s=self._timeout_s)
        return read_batch(await self._connection.json(call))

    async def list(self, *, limit: int | None = None) -> builtins.list[Batch]:
        """The batches, newest first; all of them without a limit."""
        return [read_batch(each) for each in await self._all(limit)]

    async def cancel(self, batch_id: str) -> Batch:
        """Ends a batch; lines without an answer get an error.

        Raises:
            NotFound: there is none of this id.
            Conflict: it has ended.
        """

        async def cancelled() -> Any | None:
            batch = await self.get(batch_id)
            return batch.raw if batch.status in ("cancelling", "cancelled") else None

        call = Call("POST", path("v1", "batches", batch_id, "cancel"), timeout_s=self._timeout_s)
        return read_batch(await self._connection.json(call, already=cancelled))

    async def wait(
        self,
        batch: Batch | str,
        *,
        progress: bool = False,
        on_progress: Callable[[Batch], None] | None = None,
        timeout_s: float | None = None,
    ) -> Batch:
        """Waits for the end of a batch.

        Args:
            batch: or its id.
            progress: show a progress bar.
            on_progress: called with the batch after each look at it.
            timeout_s: None waits as long as it takes.

        Returns:
            The batch at its end, whatever its status is.

        Raises:
            TimedOut: it has not ended in this time; it goes on.
        """
        batch_id = batch if isinstance(batch, str) else batch.id
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poll_s = _FIRST_POLL_S
        with _progress_bar(progress) as show:
            while True:
                now = await self.get(batch_id)
                show(now)
                if on_progress is not None:
                    on_progress(now)
                if now.has_ended:
                    return now
                if deadline is not None and time.monotonic() + poll_s > deadline:
                    raise TimedOut(
                        f"{batch_id} has not ended within timeout_s={timeout_s:g}:"
                        f" {now.num_completed + now.num_failed} of {now.num_total} lines"
                    )
                await asyncio.sleep(poll_s)
                poll_s = min(poll_s * 1.5, _LONGEST_POLL_S)

    async def results(self, batch: Batch | str) -> AsyncGenerator[BatchResult, None]:
        """What became of each line: answers in the order of the input, then errors.

        Raises:
            EngineError: the batch has not ended, or has failed as a whole; says why.
        """
        now = await self.get(batch if isinstance(batch, str) else batch.id)
        if not now.has_ended:
            raise EngineError(f"{now.id} has not ended: its status is {now.status}; wait for it")
        file_ids = [each for each in (now.output_file_id, now.error_file_id) if each is not None]
        if not file_ids:
            reasons = "; ".join(str(each.get("message")) for each in now.errors)
            raise EngineError(f"{now.id} has no results: its status is {now.status}. {reasons}")
        for file_id in file_ids:
            async with contextlib.aclosing(self._files.lines(file_id)) as lines:
                async for line in lines:
                    if line:
                        yield read_batch_result(msgspec.json.decode(line))

    async def run(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        endpoint: str = BATCH_ENDPOINT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        progress: bool = False,
        timeout_s: float | None = None,
    ) -> builtins.list[BatchResult]:
        """Creates a batch, waits for it, and fetches its results.

        Args:
            requests, endpoint, completion_window, metadata: as of :meth:`create`.
            progress, timeout_s: as of :meth:`wait`.

        Returns:
            A result for each request, in their order, errors included.

        Raises:
            RequestError, EngineError, TimedOut: as of these methods.
        """
        requests = list(requests)
        batch = await self.create(
            requests, endpoint=endpoint, completion_window=completion_window, metadata=metadata
        )
        await self.wait(batch, progress=progress, timeout_s=timeout_s)
        found = {each.custom_id: each async for each in self.results(batch)}
        ids = [
            str(each["custom_id"]) if "custom_id" in each and "body" in each else str(number)
            for number, each in enumerate(requests)
        ]
        missing = [each for each in ids if each not in found]
        if missing:
            raise EngineError(f"{batch.id} has no result for {missing[:5]}; are all ids unique?")
        return [found[each] for each in ids]

    async def _all(self, limit: int | None) -> builtins.list[dict[str, Any]]:
        return await _entries(self._connection, "batches", limit, self._timeout_s)


async def deleted(look: Any) -> dict[str, Any] | None:
    """Whether what a former attempt may have deleted is gone."""
    try:
        await look
    except NotFound:
        return {"deleted": True}
    return None


async def _entries(
    connection: Connection, kind: str, limit: int | None, timeout_s: float | None
) -> list[dict[str, Any]]:
    """All entries of a list that comes in pages, newest first."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while limit is None or len(found) < limit:
        size = _PAGE if limit is None else min(_PAGE, limit - len(found))
        where = path("v1", kind, query={"limit": size, "after": after})
        page = await connection.json(Call("GET", where, timeout_s=timeout_s))
        found += page["data"]
        if not page.get("has_more") or not page["data"]:
            break
        after = page["data"][-1]["id"]
    return found


@contextlib.contextmanager
def _progress_bar(is_shown: bool) -> Any:
    """Shows how many lines of a batch are done."""
    if not is_shown:
        yield lambda batch: None
        return
    from tqdm.auto import tqdm

    with tqdm(unit="line", desc="batch") as bar:

        def show(batch: Batch) -> None:
            bar.total = batch.num_total or None
            bar.set_postfix_str(batch.status, refresh=False)
            bar.update(batch.num_completed + batch.num_failed - bar.n)
            bar.refresh()

        yield show
