"""The client of an engine, for programs without an event loop.

    from tokasaurus.client import Client

    with Client() as client:
        print(client.chat("Hello").text)

It is an ``AsyncClient`` in a thread of its own, so any number of threads may share it, and it can
be used where an event loop runs, as in a notebook.
"""

from __future__ import annotations

import builtins
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokasaurus.client.async_client import AsyncClient, AsyncStream
from tokasaurus.client.batches import BATCH_ENDPOINT, AsyncBatches, AsyncFiles
from tokasaurus.client.cartridges import AsyncCartridges
from tokasaurus.client.requests import CartridgeLike, Messages, Prompt
from tokasaurus.client.results import (
    Answer,
    Batch,
    BatchResult,
    Cartridge,
    Health,
    Model,
    Piece,
    StoredFile,
    Usage,
    WeightsVersion,
)
from tokasaurus.client.retrying import RetryPolicy
from tokasaurus.client.weights import AsyncWeights
from tokasaurus.loop_thread import LoopThread

__all__ = ["Batches", "Cartridges", "Client", "Files", "Stream", "Weights"]

T = TypeVar("T")


class Stream:
    """The pieces of an answer, as they come.

    Leave it with ``with`` or ``close`` where not all of it is read: the engine drops the request
    then.
    """

    def __init__(self, pieces: AsyncStream, loop: LoopThread) -> None:
        self._pieces = pieces
        self._loop = loop

    @property
    def usage(self) -> Usage | None:
        """So far, or None where nothing was told yet."""
        return self._pieces.usage

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece: Piece | None = self._loop.run(_next(self._pieces))
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Ends the request, if it has not ended."""
        self._loop.run(self._pieces.close())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Client:
    """A client of one engine, for any number of threads.

    Args:
        base_url: of the engine, with or without ``/v1``; default ``TOKASAURUS_BASE_URL``, or
            ``http://127.0.0.1:10210``.
        options: those of ``AsyncClient``: ``api_key``, ``model``, ``timeout_s``, ``retry``,
            ``max_connections``, ``connect_timeout_s``, ``ca_file``.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        max_connections: int = 1024,
        connect_timeout_s: float = 10.0,
        ca_file: str | PathLike[str] | None = None,
    ) -> None:
        self._begin(
            AsyncClient(
                base_url,
                api_key=api_key,
                model=model,
                timeout_s=timeout_s,
                retry=retry,
                max_connections=max_connections,
                connect_timeout_s=connect_timeout_s,
                ca_file=ca_file,
            )
        )

    @classmethod
    def embedded(
        cls,
        model: str | PathLike[str] | None = None,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        **flags: Any,
    ) -> Client:
        """A client with an engine of its own in this process, and no port.

        It loads the model; ``close`` ends the engine. It has every route but those of files and
        batches.

        Args:
            model: a Hugging Face directory or repository id; None is the bundled model.
            timeout_s, retry: as for the class.
            flags: those of ``toka``.

        Raises:
            ConfigError: a flag is unknown or wrong.
            ModelError: the model cannot be served.
        """
        client = cls.__new__(cls)
        client._begin(AsyncClient.embedded(model, timeout_s=timeout_s, retry=retry, **flags))
        try:
            client._loop.run(client._async.__aenter__())
        except BaseException:
            client.close()
            raise
        return client

    def _begin(self, client: AsyncClient) -> None:
        self._async = client
        self._loop = LoopThread()
        self.files = Files(client.files, self._loop)
        self.batches = Batches(client.batches, self._loop)
        self.cartridges = Cartridges(client.cartridges, self._loop)
        self.weights = Weights(client.weights, self._loop)

    @property
    def base_url(self) -> str:
        """The address of the engine, without ``/v1``."""
        return self._async.base_url

    def complete(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """As of ``AsyncClient``: continues prompts, by ``/v1/completions``."""
        return self._loop.run(
            self._async.complete(
                prompt,
                model=model,
                cartridges=cartridges,
                logprobs=logprobs,
                timeout_s=timeout_s,
                **fields,
            )
        )

    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """As of ``AsyncClient``: answers a conversation, by ``/v1/chat/completions``."""
        return self._loop.run(
            self._async.chat(
                messages,
                model=model,
                cartridges=cartridges,
                logprobs=logprobs,
                timeout_s=timeout_s,
                **fields,
            )
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """As of ``AsyncClient``: answers a prompt, by the engine's own ``/generate``."""
        return self._loop.run(
            self._async.generate(
                prompt,
                model=model,
                cartridges=cartridges,
                logprobs=logprobs,
                timeout_s=timeout_s,
                **fields,
            )
        )

    def stream_complete(self, prompt: Prompt, **options: Any) -> Stream:
        """The same as :meth:`complete`, piece by piece. Nothing is sent before the first."""
        return Stream(self._async.stream_complete(prompt, **options), self._loop)

    def stream_chat(self, messages: Messages, **options: Any) -> Stream:
        """The same as :meth:`chat`, piece by piece. Nothing is sent before the first."""
        return Stream(self._async.stream_chat(messages, **options), self._loop)

    def stream_generate(self, prompt: str | Sequence[int], **options: Any) -> Stream:
        """The same as :meth:`generate`, piece by piece. Nothing is sent before the first."""
        return Stream(self._async.stream_generate(prompt, **options), self._loop)

    def embed(self, texts: Prompt, **options: Any) -> NDArray[np.float32]:
        """As of ``AsyncClient``: vectors of length 1, [inputs, dimensions]."""
        return self._loop.run(self._async.embed(texts, **options))

    def ping(self) -> bool:
        """Whether the server listens. It may still load its model."""
        return self._loop.run(self._async.ping())

    def health(self) -> Health:
        """How the engine is. Raises EngineError if there is no answer."""
        return self._loop.run(self._async.health())

    def wait_until_ready(self, timeout_s: float | None = 600.0) -> Health:
        """Waits until the engine serves. Raises TimedOut."""
        return self._loop.run(self._async.wait_until_ready(timeout_s))

    def models(self) -> builtins.list[Model]:
        """The models of the server; an engine has one."""
        return self._loop.run(self._async.models())

    def close(self) -> None:
        """Closes all connections; requests under way fail. An embedded engine ends."""
        self._loop.close(self._async.close())

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Files:
    """The files that the engine keeps: inputs and outputs of batches."""

    def __init__(self, files: AsyncFiles, loop: LoopThread) -> None:
        self._async = files
        self._loop = loop

    def upload(
        self,
        content: bytes | str | PathLike[str],
        *,
        filename: str | None = None,
        purpose: str = "batch",
    ) -> StoredFile:
        """Uploads bytes, or the file of a path."""
        return self._loop.run(self._async.upload(content, filename=filename, purpose=purpose))

    def list(self, *, limit: int | None = None) -> builtins.list[StoredFile]:
        """The files, newest first; all of them without a limit."""
        return self._loop.run(self._async.list(limit=limit))

    def get(self, file_id: str) -> StoredFile:
        """One file. Raises NotFound."""
        return self._loop.run(self._async.get(file_id))

    def content(self, file_id: str) -> bytes:
        """What is in a file. Raises NotFound."""
        return self._loop.run(self._async.content(file_id))

    def lines(self, file_id: str) -> Iterator[str]:
        """The lines of a file, without holding all of it. Raises NotFound."""
        return _items(self._async.lines(file_id), self._loop)

    def delete(self, file_id: str) -> None:
        """Deletes a file. Raises NotFound, or Conflict while a batch reads it."""
        self._loop.run(self._async.delete(file_id))


class Batches:
    """The batches of the engine."""

    def __init__(self, batches: AsyncBatches, loop: LoopThread) -> None:
        self._async = batches
        self._loop = loop

    def create(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        endpoint: str = BATCH_ENDPOINT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Uploads requests, and starts a batch of them: bodies, or lines with ``custom_id``."""
        return self._loop.run(
            self._async.create(
                requests,
                endpoint=endpoint,
                completion_window=completion_window,
                metadata=metadata,
            )
        )

    def start(
        self,
        input_file_id: str,
        *,
        endpoint: str = BATCH_ENDPOINT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Starts a batch of an uploaded file, once, however often the connection breaks."""
        return self._loop.run(
            self._async.start(
                input_file_id,
                endpoint=endpoint,
                completion_window=completion_window,
                metadata=metadata,
            )
        )

    def get(self, batch_id: str) -> Batch:
        """One batch as it is now. Raises NotFound."""
        return self._loop.run(self._async.get(batch_id))

    def list(self, *, limit: int | None = None) -> builtins.list[Batch]:
        """The batches, newest first; all of them without a limit."""
        return self._loop.run(self._async.list(limit=limit))

    def cancel(self, batch_id: str) -> Batch:
        """Ends a batch. Raises NotFound, or Conflict if it has ended."""
        return self._loop.run(self._async.cancel(batch_id))

    def wait(
        self,
        batch: Batch | str,
        *,
        progress: bool = False,
        on_progress: Callable[[Batch], None] | None = None,
        timeout_s: float | None = None,
    ) -> Batch:
        """Waits for the end of a batch, whatever its status is then. Raises TimedOut."""
        return self._loop.run(
            self._async.wait(batch, progress=progress, on_progress=on_progress, timeout_s=timeout_s)
        )

    def results(self, batch: Batch | str) -> Iterator[BatchResult]:
        """What became of each line: answers in the order of the input, then errors."""
        return _items(self._async.results(batch), self._loop)

    def run(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        endpoint: str = BATCH_ENDPOINT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        progress: bool = False,
        timeout_s: float | None = None,
    ) -> builtins.list[BatchResult]:
        """Creates a batch, waits for it, and returns a result for each request, in their order."""
        return self._loop.run(
            self._async.run(
                requests,
                endpoint=endpoint,
                completion_window=completion_window,
                metadata=metadata,
                progress=progress,
                timeout_s=timeout_s,
            )
        )


class Cartridges:
    """Lists, uploads and deletes cartridges."""

    def __init__(self, cartridges: AsyncCartridges, loop: LoopThread) -> None:
        self._async = cartridges
        self._loop = loop

    def list(self) -> builtins.list[Cartridge]:
        """Those that the engine's store has."""
        return self._loop.run(self._async.list())

    def get(self, cartridge_id: str, *, source: str = "local") -> Cartridge:
        """One of them. Raises NotFound."""
        return self._loop.run(self._async.get(cartridge_id, source=source))

    def upload(self, content: bytes | str | PathLike[str], *, name: str | None = None) -> Cartridge:
        """Uploads bytes, or the file of a path; requests then call it by its name."""
        return self._loop.run(self._async.upload(content, name=name))

    def delete(self, cartridge_id: str, *, source: str = "local", force: bool = False) -> None:
        """Deletes a name. Raises NotFound, or Conflict while requests use it without ``force``."""
        self._loop.run(self._async.delete(cartridge_id, source=source, force=force))


class Weights:
    """The weights of the engine."""

    def __init__(self, weights: AsyncWeights, loop: LoopThread) -> None:
        self._async = weights
        self._loop = loop

    def version(self) -> WeightsVersion:
        """The weights that run now."""
        return self._loop.run(self._async.version())

    def begin(self, label: str | None = None, *, replace: bool = False) -> str:
        """Begins an update; returns its id. Raises Conflict if another one is unfinished."""
        return self._loop.run(self._async.begin(label, replace=replace))

    def send(self, update_id: str, number: int, bucket: bytes) -> None:
        """Sends one bucket: a safetensors file. The first one has the number 0."""
        self._loop.run(self._async.send(update_id, number, bucket))

    def commit(self, update_id: str, num_buckets: int) -> WeightsVersion:
        """Lets the engine run the weights of all buckets."""
        return self._loop.run(self._async.commit(update_id, num_buckets))

    def discard(self, update_id: str) -> None:
        """Drops an update that is not committed. Raises NotFound."""
        self._loop.run(self._async.discard(update_id))


def _items(items: AsyncGenerator[T, None], loop: LoopThread) -> Iterator[T]:
    """What an asynchronous generator of another thread's loop gives."""
    try:
        while (item := loop.run(_next(items))) is not None:
            yield item
    finally:
        loop.run(items.aclose())


async def _next(items: AsyncGenerator[T, None] | AsyncStream) -> Any:
    return await anext(items, None)
