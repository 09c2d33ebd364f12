"""The client of an engine, for programs with an event loop.

from tokasaurus.client import AsyncClient

async with AsyncClient() as client:
    answer = await client.chat([{"role": "user", "content": "Hello"}])
    print(answer.text)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokasaurus.client import requests
from tokasaurus.client.address import Address, first_key
from tokasaurus.client.batches import AsyncBatches, AsyncFiles
from tokasaurus.client.cartridges import AsyncCartridges
from tokasaurus.client.connection import Connection
from tokasaurus.client.embedded import EMBEDDED_URL, EngineTransport
from tokasaurus.client.reading import (
    read_answer,
    read_embeddings,
    read_health,
    read_model,
    read_pieces,
    read_usage,
)
from tokasaurus.client.requests import Call, CartridgeLike, Messages, Prompt
from tokasaurus.client.results import Answer, Health, Model, Piece, Usage
from tokasaurus.client.retrying import RetryPolicy
from tokasaurus.client.weights import AsyncWeights
from tokasaurus.errors import EngineError, TimedOut

__all__ = ["AsyncClient", "AsyncStream"]

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
_USAGE = {"include_usage": True}
_PING_S = 5.0
_POLL_S = 0.2


class AsyncStream:
    """The pieces of an answer, as they come.

    Leave it with ``async with`` or ``close`` where not all of it is read: the engine drops the
    request then.

    Attributes:
        usage: so far, or None where nothing was told yet.
    """

    def __init__(self, connection: Connection, call: Call) -> None:
        self.usage: Usage | None = None
        self._pieces = self._read(connection, call)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        return await self._pieces.__anext__()

    async def close(self) -> None:
        """Ends the request, if it has not ended."""
        await self._pieces.aclose()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _read(self, connection: Connection, call: Call) -> AsyncGenerator[Piece, None]:
        async with contextlib.aclosing(connection.events(call)) as events:
            async for event in events:
                if event.get("usage") is not None:
                    self.usage = read_usage(event["usage"])
                for piece in read_pieces(event):
                    yield piece


class AsyncClient:
    """A client of one engine, for one event loop.

    Args:
        base_url: of the engine, with or without ``/v1``; default ``TOKASAURUS_BASE_URL``, or
            ``http://127.0.0.1:10210``.
        api_key: default the first one in ``TOKASAURUS_API_KEY``.
        model: what requests name, unless they name another; an engine needs no name.
        timeout_s: for each attempt, from sending to the end of the answer; of a stream, to its
            beginning and from one event to the next. None waits as long as the engine lives.
        retry: when requests are sent again; default ``RetryPolicy()``.
        max_connections: requests under way at once. Others wait, and their time has not begun.
        connect_timeout_s: for making a connection.
        ca_file: PEM file of the certificates to trust; default those that the system trusts.

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
        _transport: EngineTransport | None = None,
    ) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._transport = _transport
        self._connection = Connection(
            Address.of(base_url, api_key),
            retry=retry or RetryPolicy(),
            max_connections=max_connections,
            connect_timeout_s=connect_timeout_s,
            ca_file=None if ca_file is None else fspath(ca_file),
            transport=_transport,
        )
        self.files = AsyncFiles(self._connection, timeout_s)
        self.batches = AsyncBatches(self._connection, self.files, timeout_s)
        self.cartridges = AsyncCartridges(self._connection, timeout_s)
        self.weights = AsyncWeights(self._connection, timeout_s)

    @classmethod
    def embedded(
        cls,
        model: str | PathLike[str] | None = None,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        **flags: Any,
    ) -> AsyncClient:
        """A client with an engine of its own in this process, and no port.

        ``async with``, or the first request, loads the model; ``close`` ends the engine.
        It has every route but those of files and batches.

        Args:
            model: a Hugging Face directory or repository id; None is the bundled model.
            timeout_s: as for the class.
            retry: as for the class.
            flags: those of ``toka``.

        Raises:
            ConfigError: a flag is unknown or wrong.
        """
        from tokasaurus.launch.async_llm import AsyncLLM

        transport = EngineTransport(AsyncLLM(model, **flags))
        keys = flags.get("api_key") or ""
        return cls(
            EMBEDDED_URL,
            api_key=first_key(keys if isinstance(keys, str) else keys[0]),
            timeout_s=timeout_s,
            retry=retry,
            _transport=transport,
        )

    @property
    def base_url(self) -> str:
        """The address of the engine, without ``/v1``."""
        return self._connection.address.url

    # --- text -------------------------------------------------------------------------------------

    async def complete(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """Continues prompts, by ``/v1/completions``.

        Args:
            prompt: one or several.
            model: the name in the request.
            cartridges: that come before each prompt; a text is a local file or name.
            logprobs: those of the chosen tokens, and of this many likeliest ones in each place.
            timeout_s: as for the class.
            fields: any further field of the route, such as ``temperature``, ``max_tokens``, ``n``.

        Raises:
            RequestError: the request is wrong; names the field.
            EngineError: the engine cannot be reached, or cannot answer; retries did not help.
        """
        body = requests.completion(prompt, model or self._model, cartridges, logprobs, fields)
        return await self._answer(COMPLETIONS, body, timeout_s)

    async def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """Answers a conversation, by ``/v1/chat/completions``.

        Args:
            messages: the conversation; a text is one message of the user.
            model, cartridges, logprobs, timeout_s, fields: as of :meth:`complete`.

        Raises:
            RequestError, EngineError: as of :meth:`complete`.
        """
        body = requests.chat(messages, model or self._model, cartridges, logprobs, fields)
        return await self._answer(CHAT, body, timeout_s)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """Answers a prompt, by the engine's own protocol ``/generate``.

        The answer has ``prompt_ids``; with ``prompt_logprobs=k`` also those.

        Args:
            prompt: a text, which becomes the user's message; or token ids, which stay as they are.
            model, cartridges, logprobs, timeout_s, fields: as of :meth:`complete`;
                ``system`` is the system message.

        Raises:
            RequestError, EngineError: as of :meth:`complete`.
        """
        body = requests.generation(prompt, model or self._model, cartridges, logprobs, fields)
        return await self._answer(GENERATE, body, timeout_s)

    def stream_complete(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncStream:
        """The same as :meth:`complete`, piece by piece. Nothing is sent before the first."""
        body = requests.completion(prompt, model or self._model, cartridges, logprobs, fields)
        return self._stream(COMPLETIONS, {"stream_options": _USAGE, **body}, timeout_s)

    def stream_chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncStream:
        """The same as :meth:`chat`, piece by piece. Nothing is sent before the first."""
        body = requests.chat(messages, model or self._model, cartridges, logprobs, fields)
        return self._stream(CHAT, {"stream_options": _USAGE, **body}, timeout_s)

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        cartridges: Iterable[CartridgeLike] | CartridgeLike | None = None,
        logprobs: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncStream:
        """The same as :meth:`generate`, piece by piece. Nothing is sent before the first."""
        body = requests.generation(prompt, model or self._model, cartridges, logprobs, fields)
        return self._stream(GENERATE, body, timeout_s)

    async def embed(
        self,
        texts: Prompt,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> NDArray[np.float32]:
        """Vectors of length 1 for texts or token ids, by ``/v1/embeddings``.

        Returns:
            [inputs, dimensions]; one row for a single text, too.

        Raises:
            RequestError, EngineError: as of :meth:`complete`.
        """
        body = {"input": texts, "encoding_format": "base64", **fields}
        name = model or self._model
        if name is not None:
            body["model"] = name
        return read_embeddings(await self._post("/v1/embeddings", body, timeout_s))

    # --- the engine -------------------------------------------------------------------------------

    async def ping(self) -> bool:
        """Whether the server listens. It may still load its model."""
        try:
            status, _ = await self._connection.status(Call("GET", "/ping", timeout_s=_PING_S))
        except EngineError:
            return False
        return status == 200

    async def health(self) -> Health:
        """How the engine is.

        Raises:
            EngineError: there is no answer.
        """
        status, body = await self._connection.status(Call("GET", "/health", timeout_s=_PING_S))
        try:
            fields = msgspec.json.decode(body)
        except msgspec.DecodeError:
            fields = {}
        return read_health(status == 200, fields if isinstance(fields, dict) else {})

    async def wait_until_ready(self, timeout_s: float | None = 600.0) -> Health:
        """Waits until the engine serves.

        Raises:
            TimedOut: it does not serve in this time; says how it is.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                health = await self.health()
                if health.serves:
                    return health
                state = f"its status is {health.status!r}"
            except EngineError as error:
                state = str(error)
            if deadline is not None and time.monotonic() > deadline:
                raise TimedOut(f"the engine does not serve within {timeout_s:g} s: {state}")
            await asyncio.sleep(_POLL_S)

    async def models(self) -> list[Model]:
        """The models of the server; an engine has one.

        Raises:
            EngineError: there is no answer.
        """
        answer = await self._connection.json(Call("GET", "/v1/models", timeout_s=self._timeout_s))
        return [read_model(each) for each in answer["data"]]

    # --- its own life -----------------------------------------------------------------------------

    async def close(self) -> None:
        """Closes all connections; requests under way fail. An embedded engine ends."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        if self._transport is not None:
            try:
                await self._transport.load()
            except BaseException:
                await self.close()
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _answer(self, path: str, body: dict[str, Any], timeout_s: float | None) -> Answer:
        return read_answer(await self._post(path, body, timeout_s))

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float | None) -> Any:
        limit = self._timeout_s if timeout_s is None else timeout_s
        return await self._connection.json(Call("POST", path, body, timeout_s=limit))

    def _stream(self, path: str, body: dict[str, Any], timeout_s: float | None) -> AsyncStream:
        limit = self._timeout_s if timeout_s is None else timeout_s
        call = Call("POST", path, {**body, "stream": True}, timeout_s=limit)
        return AsyncStream(self._connection, call)
