"""The way to one engine that runs elsewhere: attempts, patience, and what is known of it.

An attempt that has no answer in time is looked into: while the engine serves, its queue may be
long, and to ask again would only start over at its end. So it is given up only if the engine does
not serve. An engine that is down may be starting again; requests wait until it serves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from tokasaurus.client.address import Address
from tokasaurus.client.cartridges import AsyncCartridges
from tokasaurus.client.connection import Connection
from tokasaurus.client.failures import failed_time
from tokasaurus.client.requests import Call, path
from tokasaurus.client.retrying import Attempts, Failure, RetryPolicy
from tokasaurus.errors import EngineError, TimedOut, TokasaurusError
from tokasaurus.integrations.verl.gate import Flight

__all__ = ["Aborted", "RemoteEngine"]

log = logging.getLogger(__name__)

_LOOK_S = 5.0  # for a look at the engine's health
_FIRST_POLL_S, _LONGEST_POLL_S = 0.1, 1.0
_TELL_S = 5.0  # between two lines about a wait
_COMMAND_S = 630.0  # a little longer than the engine takes itself for new weights
_CONTROL_CONNECTIONS = 16
_UPLOADS = 4  # of cartridges at once
_BACKOFF = 2.0
_LONGER_EACH_TIME = 1.5
_LONGEST_DELAY_S = 60.0


class Aborted(Exception):
    """The request was aborted between two attempts, so there are no tokens of it."""


class RemoteEngine:
    """One engine, for one event loop.

    Args:
        url: its address.
        api_key: an admin key, or the key of an engine that has no admin keys.
        max_retries: of a request, after its first attempt.
        base_timeout_s: until a first attempt without an answer is looked into.
        retry_delay_s: before the first retry, and twice as long before each further one.
        startup_timeout_s: that the engine may take to start, or to start again.
        max_connections: requests for tokens under way at once.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        max_retries: int = 5,
        base_timeout_s: float = 120.0,
        retry_delay_s: float = 2.0,
        startup_timeout_s: float = 300.0,
        max_connections: int = 1024,
    ) -> None:
        self.address = Address.of(url, api_key)
        self._base_timeout_s = base_timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._retry = RetryPolicy(
            max_retries=max_retries,
            starting_delay_s=retry_delay_s,
            backoff_factor=_BACKOFF,
            max_delay_s=max(_LONGEST_DELAY_S, retry_delay_s),
        )
        once = RetryPolicy(max_retries=0)
        self._tokens = self._connection(once, max_connections)
        # Of their own, so that a command waits for no request.
        self._control = self._connection(once, _CONTROL_CONNECTIONS)
        self._files = self._connection(self._retry, _UPLOADS)
        self.cartridges = AsyncCartridges(self._files, None)
        self._return: asyncio.Task[None] | None = None

    def _connection(self, retry: RetryPolicy, max_connections: int) -> Connection:
        return Connection(
            self.address, retry=retry, max_connections=max_connections, connect_timeout_s=10.0
        )

    @property
    def url(self) -> str:
        """The address, without ``/v1``."""
        return self.address.url

    # --- requests for tokens ----------------------------------------------------------------------

    async def post(
        self,
        where: str,
        body: Mapping[str, Any],
        *,
        request_id: str | None = None,
        flight: Flight | None = None,
    ) -> dict[str, Any]:
        """The answer to a request, which is sent again where that may help.

        Args:
            where: the path of the route.
            body: JSON.
            request_id: of all attempts.
            flight: an abort of it ends the attempts.

        Raises:
            RequestError: the request is wrong, and would be so again.
            EngineError: the engine cannot be reached, or cannot answer; retries did not help.
            Aborted: there is no attempt any more that the engine could answer.
        """
        flight = flight or Flight(request_id or "")
        headers = {"X-Request-Id": request_id} if request_id else {}
        call = Call("POST", where, body, headers=headers)
        attempts = Attempts(self._retry)
        patience_ends = time.monotonic() + self._startup_timeout_s
        while True:
            limit_s = self._base_timeout_s * _LONGER_EACH_TIME**attempts.num_retries
            try:
                return _json(await self._attempt(call, limit_s, flight), call)
            except Failure as failure:
                if flight.is_aborted.is_set():
                    raise Aborted from failure
                delay_s = attempts.delay_after(failure)
                log.warning(
                    "request %s: %s; retry %d follows in %.1f s",
                    request_id,
                    failure.error,
                    attempts.num_retries,
                    delay_s,
                )
                if failure.maybe_done and request_id:
                    await self._drop(request_id)
            await _unless(flight.is_aborted, asyncio.sleep(delay_s))
            await _unless(flight.is_aborted, self._until_back(patience_ends))

    async def _attempt(self, call: Call, limit_s: float, flight: Flight) -> bytes:
        """The answer to one attempt. Raises Failure, or Aborted if it is dropped."""
        began = time.monotonic()
        task = asyncio.ensure_future(
            self._tokens.once(call, call.headers.get("X-Request-Id") or "req_rollout")
        )
        dropped = asyncio.ensure_future(flight.is_dropped.wait())
        try:
            while True:
                await asyncio.wait(
                    {task, dropped}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
                )
                if task.done():
                    return task.result()
                if dropped.done():
                    raise Aborted
                waited_s = time.monotonic() - began
                if not await self.serves():
                    raise failed_time(self.url, waited_s)
                log.info(
                    "request %s has no answer after %.0f s; %s serves, so it goes on to wait",
                    flight.request_id,
                    waited_s,
                    self.url,
                )
        finally:
            dropped.cancel()
            if not task.done():
                task.cancel()
            with suppress(BaseException):
                await task

    async def _drop(self, request_id: str) -> None:
        """Ends what the engine may still compute for an attempt whose answer was lost."""
        with suppress(TokasaurusError):
            await self.command("/abort_request", {"rid": request_id}, limit_s=_LOOK_S)

    async def _until_back(self, patience_ends: float) -> None:
        """Waits until the engine serves, or patience ends. All requests share one wait."""
        remaining_s = patience_ends - time.monotonic()
        if remaining_s <= 0:
            return
        if self._return is None or self._return.done():
            self._return = asyncio.ensure_future(self._poll_until_back(remaining_s))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._return), remaining_s)

    async def _poll_until_back(self, limit_s: float) -> None:
        with suppress(EngineError):
            await self.wait_until_ready(limit_s)

    # --- the engine -------------------------------------------------------------------------------

    async def serves(self) -> bool:
        """Whether the engine takes requests now."""
        try:
            status, _ = await self._control.status(Call("GET", "/health", timeout_s=_LOOK_S))
        except EngineError:
            return False
        return status == 200

    async def wait_until_ready(self, limit_s: float | None = None) -> None:
        """Waits until the engine serves, and says in the log what it waits for.

        Args:
            limit_s: default ``startup_timeout_s``.

        Raises:
            TimedOut: it does not serve in this time; says how it is.
            EngineError: this is no engine, or it cannot be asked at all.
        """
        limit_s = self._startup_timeout_s if limit_s is None else limit_s
        began, told, poll_s = time.monotonic(), 0.0, _FIRST_POLL_S
        while (state := await self._what_is_missing()) is not None:
            waited_s = time.monotonic() - began
            if waited_s >= limit_s:
                raise TimedOut(
                    f"the engine at {self.url} does not serve within {limit_s:g} s: {state}. Start"
                    " it with `toka`, or set actor_rollout_ref.rollout.custom.tokasaurus_url to"
                    " its address (startup_timeout says how long it is waited for)"
                )
            if waited_s >= told:
                log.warning("waiting for the engine at %s (%.0f s): %s", self.url, waited_s, state)
                told = waited_s + _TELL_S
            await asyncio.sleep(min(poll_s, max(0.0, limit_s - waited_s)))
            poll_s = min(_LONGEST_POLL_S, poll_s * _LONGER_EACH_TIME)
        if told:
            log.warning("the engine at %s serves", self.url)

    async def _what_is_missing(self) -> str | None:
        """Why the engine does not serve yet; None if it does, or does not say."""
        try:
            status, body = await self._control.status(Call("GET", "/health", timeout_s=_LOOK_S))
        except EngineError as error:
            if "is not trusted" in str(error) or "cannot be asked" in str(error):
                raise  # it will be so again
            return str(error)
        if status == 503 or status >= 500:
            with suppress(msgspec.DecodeError, AttributeError):
                return f"its status is {msgspec.json.decode(body).get('status')!r}"
            return f"it answers with status {status}"
        if status != 200:
            raise EngineError(
                f"{self.url}/health answers with status {status}; is it an engine?"
                + (" TOKASAURUS_API_KEY may lack its key." if status in (401, 403) else "")
            )
        return None

    async def max_model_len(self) -> int | None:
        """Tokens of prompt and answer together that the engine allows; None if it does not tell."""
        models = (await self.ask("/v1/models")).get("data") or [{}]
        length = models[0].get("max_model_len")
        return length if isinstance(length, int) else None

    async def ask(self, where: str, limit_s: float = _LOOK_S) -> dict[str, Any]:
        """The JSON that a GET gives.

        Raises:
            RequestError, EngineError: there is none.
        """
        answer = await self._control.json(Call("GET", where, timeout_s=limit_s))
        return answer if isinstance(answer, dict) else {}

    async def command(
        self,
        where: str,
        body: Mapping[str, Any] | None = None,
        *,
        limit_s: float = _COMMAND_S,
        **query: Any,
    ) -> dict[str, Any]:
        """Tells the engine to do something. Each command may be given twice.

        Raises:
            AccessDenied: the engine wants an admin key.
            RequestError, EngineError: it is refused, or there is no answer.
        """
        where = path(*where.strip("/").split("/"), query=query)
        answer = await self._control.json(Call("POST", where, body or {}, timeout_s=limit_s))
        return answer if isinstance(answer, dict) else {}

    async def close(self) -> None:
        """Closes all connections; requests under way fail."""
        await self._tokens.close()
        await self._control.close()
        await self._files.close()


def _json(body: bytes, call: Call) -> dict[str, Any]:
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answer = None
    if not isinstance(answer, dict):
        raise EngineError(f"{call.path} has answered with what is no JSON object; is it an engine?")
    return answer


async def _unless(event: asyncio.Event, work: Awaitable[None]) -> None:
    """Does the work, unless the event comes first. Raises Aborted then."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Aborted
        await task
    finally:
        stopped.cancel()
        task.cancel()
