"""The way to an engine: connections, attempts and their time, answers and streams.

It knows no route. At most ``max_connections`` requests are under way; others wait for their turn,
which does not count as time. Below it is a transport of httpx: sockets, or the engine in this
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import httpx2 as httpx
import msgspec

from tokasaurus.client.address import Address
from tokasaurus.client.certificates import trusted
from tokasaurus.client.failures import error_of, failed_connection, failed_time, refusal
from tokasaurus.client.requests import Call, Form, encoded
from tokasaurus.client.retrying import Attempts, Failure, RetryPolicy
from tokasaurus.errors import ConfigError, EngineError, RequestError, Unreachable
from tokasaurus.open_files import allow_many_files
from tokasaurus.rounding import ceil_div
from tokasaurus.version import __version__

__all__ = ["Connection"]

T = TypeVar("T")
_KEEP_ALIVE_S = 60.0  # less than the engine's, which is 75
_UNUSUAL_FILES = 512  # more connections than this need a higher limit of open files
_MADE_AT_ONCE = 64
_CONNECTIONS_PER_POOL = 4
"""A pool looks at each of its connections for each request, so large ones are slow: with 1,024
requests under way, pools of 256 cost 3.9 ms of CPU a request, of 64 1.6 ms, and of 16 1.1 ms. In
another run pools of 16 cost 0.87 ms, of 4 0.76 ms, and of 1 0.73 ms."""


class _Connecting:
    """Lets few connections be made at a time, since the time of each runs while others are made.

    Its ``trace`` is httpx's extension of that name, which a request awaits at each of its steps.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_MADE_AT_ONCE)

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        step, _, state = event.rpartition(".")
        if not step.endswith(("connect_tcp", "start_tls")):
            return
        if state == "started":
            await self._places.acquire()
        else:
            self._places.release()


class Connection:
    """Sends requests to one engine, for one event loop.

    Args:
        address: of the engine.
        retry: when to send a request again.
        max_connections: requests under way at once.
        connect_timeout_s: for making a connection.
        ca_file: PEM file of the certificates to trust; None trusts those of the system.
        transport: None uses sockets.

    Raises:
        ConfigError: the certificates cannot be read, or a number is out of range, or more than the
            open files that this process may have.
    """

    def __init__(
        self,
        address: Address,
        *,
        retry: RetryPolicy,
        max_connections: int,
        connect_timeout_s: float,
        ca_file: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if max_connections < 1:
            raise ConfigError(f"max_connections={max_connections} must be at least 1")
        self.address = address
        self._retry = retry
        self._turns = asyncio.Semaphore(max_connections)
        self._extensions = {"trace": _Connecting().trace}
        headers = {"User-Agent": f"tokasaurus-client/{__version__}"}
        if address.api_key is not None:
            headers["Authorization"] = f"Bearer {address.api_key}"
        transports = [transport] if transport else _sockets(address, max_connections, ca_file)
        self._pools = [
            httpx.AsyncClient(
                base_url=address.url,
                headers=headers,
                transport=each,
                timeout=httpx.Timeout(None, connect=connect_timeout_s),
            )
            for each in transports
        ]
        self._free = list(range(max_connections))  # turns; a turn always uses the same pool
        self._is_closed = False

    async def json(
        self, call: Call, already: Callable[[], Awaitable[Any | None]] | None = None
    ) -> Any:
        """The answer's JSON.

        Args:
            call: the request.
            already: asked before a retry, where a failed attempt may have been carried out:
                the answer that it had, or None if it was not carried out.

        Raises:
            RequestError: the request is wrong.
            EngineError: the engine cannot be reached, or cannot answer; retries did not help.
        """
        body = await self._until_it_works(call, self.once, already)
        if not isinstance(body, bytes):
            return body
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise EngineError(
                f"{self.address.url}{call.path} has answered with what is no JSON; is it an engine?"
            ) from None

    async def status(self, call: Call) -> tuple[int, bytes]:
        """Status and body of one attempt, whatever the status is.

        Raises:
            EngineError: there is no answer.
        """
        try:
            async with self._turn() as pool:
                answer = await self._in_time(pool.send(self._request(pool, call)), call)
                return answer.status_code, answer.content
        except Failure as failure:
            raise failure.error from failure.__cause__

    @contextlib.asynccontextmanager
    async def lines(self, call: Call) -> AsyncIterator[AsyncIterator[str]]:
        """The answer, line by line as it comes. What fails before it begins is retried.

        Raises:
            RequestError: the request is wrong.
            EngineError: the engine cannot be reached, or cannot answer, or breaks off.
        """
        async with contextlib.AsyncExitStack() as held:

            async def begin(call: Call, request_id: str) -> httpx.Response:
                async with contextlib.AsyncExitStack() as attempt:
                    pool = await attempt.enter_async_context(self._turn())
                    request = self._request(pool, call, request_id)
                    answer = await self._in_time(pool.send(request, stream=True), call)
                    attempt.push_async_callback(answer.aclose)
                    if answer.status_code >= 300:
                        body = await self._in_time(answer.aread(), call)
                        raise refusal(answer.status_code, answer.headers, body)
                    held.push_async_exit(attempt.pop_all())
                    return answer

            answer = await self._until_it_works(call, begin, None)
            lines = self._lines(answer, call)
            held.push_async_callback(lines.aclose)
            yield lines

    async def events(self, call: Call) -> AsyncGenerator[Mapping[str, Any], None]:
        """The events of a stream, to its ``[DONE]``.

        Raises:
            RequestError, EngineError: as of :meth:`lines`, or of an event that is an error.
        """
        async with self.lines(call) as lines:
            async for line in lines:
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                try:
                    event = msgspec.json.decode(data)
                except msgspec.DecodeError:
                    raise EngineError(f"an event of the stream is no JSON: {data[:200]}") from None
                if isinstance(event, dict) and event.get("error") and "choices" not in event:
                    raise error_of(_status_of(event), event)
                yield event
        raise Unreachable("the stream broke off before its end")

    async def close(self) -> None:
        """Closes all connections; requests under way fail."""
        self._is_closed = True
        for pool in self._pools:
            await pool.aclose()

    async def _until_it_works(
        self,
        call: Call,
        attempt: Callable[[Call, str], Awaitable[T]],
        already: Callable[[], Awaitable[Any | None]] | None,
    ) -> T | Any:
        """What the first attempt gives that does not fail. All have the same request id."""
        request_id = call.headers.get("X-Request-Id") or f"req_{uuid.uuid4().hex}"
        attempts = Attempts(self._retry)
        while True:
            try:
                return await attempt(call, request_id)
            except Failure as failure:
                if self._is_closed:
                    raise EngineError("the client was closed during this request") from None
                if not call.is_repeatable:
                    raise failure.error from failure.__cause__
                delay_s = attempts.delay_after(failure)
            await asyncio.sleep(delay_s)
            if already is not None and attempts.maybe_done:
                with contextlib.suppress(EngineError):
                    done = await already()
                    if done is not None:
                        return done

    async def once(self, call: Call, request_id: str) -> bytes:
        """The body of the answer to one attempt.

        Raises:
            Failure: it has failed; says whether a retry may help.
            EngineError: the client is closed.
        """
        async with self._turn() as pool:
            with _content(call.form) as content:
                request = self._request(pool, call, request_id, content)
                answer = await self._in_time(pool.send(request), call)
            if answer.status_code >= 300:
                raise refusal(answer.status_code, answer.headers, answer.content)
            return answer.content

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[httpx.AsyncClient]:
        """Waits for its turn. The pool that it gets has a connection for it."""
        async with self._turns:
            if self._is_closed:
                raise EngineError("this client is closed; make another")
            number = self._free.pop()
            try:
                yield self._pools[number // _CONNECTIONS_PER_POOL % len(self._pools)]
            finally:
                self._free.append(number)

    def _request(
        self,
        pool: httpx.AsyncClient,
        call: Call,
        request_id: str | None = None,
        file: bytes | BinaryIO | None = None,
    ) -> httpx.Request:
        headers = dict(call.headers)
        if request_id is not None:
            headers.setdefault("X-Request-Id", request_id)
        content: dict[str, Any] = {}
        if call.form is not None and file is not None:
            content = {
                "data": dict(call.form.fields),
                "files": {"file": (call.form.filename, file)},
            }
        elif call.content is not None:
            headers["Content-Type"] = "application/octet-stream"
            content = {"content": call.content}
        elif call.body is not None:
            headers["Content-Type"] = "application/json"
            content = {"content": encoded(call.body)}
        return pool.build_request(
            call.method, call.path, headers=headers, extensions=self._extensions, **content
        )

    async def _in_time(self, work: Awaitable[T], call: Call) -> T:
        """What the work gives. Raises Failure if the connection breaks, or the time is up."""
        try:
            return await asyncio.wait_for(work, call.timeout_s)
        except (asyncio.TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise failed_time(self.address.url, call.timeout_s) from error
        except httpx.TransportError as error:
            raise failed_connection(error, self.address.url) from error

    async def _lines(self, answer: httpx.Response, call: Call) -> AsyncGenerator[str, None]:
        lines = answer.aiter_lines()
        while True:
            try:
                line = await self._in_time(anext(lines, None), call)
            except Failure as failure:
                raise failure.error from failure.__cause__
            if line is None:
                return
            yield line


def _sockets(
    address: Address, max_connections: int, ca_file: str | None
) -> list[httpx.AsyncBaseTransport]:
    """Pools that have ``max_connections`` together."""
    if max_connections > _UNUSUAL_FILES:
        limit = allow_many_files()
        if max_connections > limit:
            raise ConfigError(
                f"max_connections={max_connections} needs a file for each, and this process may"
                f" have {limit} open at most; lower it, or raise that limit (ulimit -Hn)"
            )
    verify = trusted(address.url, ca_file)
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_S
    )
    num_pools = ceil_div(max_connections, _CONNECTIONS_PER_POOL)
    return [
        httpx.AsyncHTTPTransport(
            verify=verify,
            limits=limits,
            proxy=address.proxy,
            socket_options=_notice_dead_peers(),
        )
        for _ in range(num_pools)
    ]


def _notice_dead_peers() -> list[tuple[int, int, int]]:
    """Options of sockets: an answer may take hours, but a machine that has gone is noticed."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


@contextlib.contextmanager
def _content(form: Form | None) -> Iterator[bytes | BinaryIO | None]:
    """The file that a form uploads, open for one attempt.

    Raises:
        RequestError: it cannot be read.
    """
    if form is None:
        yield None
        return
    if isinstance(form.content, bytes):
        yield form.content
        return
    try:
        file = form.content.open("rb")
    except OSError as error:
        raise RequestError(f"file={form.content}: {error.strerror}", "file") from None
    with file:
        yield file


def _status_of(event: Mapping[str, Any]) -> int:
    """The status that an error in a stream would have had."""
    kind = event["error"].get("type") if isinstance(event["error"], dict) else None
    return _STATUSES.get(str(kind), 500)


_STATUSES = {
    "invalid_request_error": 400,
    "timeout_error": 408,
    "rate_limit_error": 429,
    "bad_gateway": 502,
    "service_unavailable": 503,
    "insufficient_storage": 507,
}
