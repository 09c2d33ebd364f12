"""Cartridges of requests of HTTP processes, whose engine is behind the server's process.

::

    HTTP process  RemotePrefixes ──AcquirePrefix, ReleasePrefix──▶ PrefixRelay  server
                                 ◀──PrefixAcquired, PrefixRefused──
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokasaurus import errors
from tokasaurus.cartridges.specification import CartridgeSpec
from tokasaurus.errors import EngineError, RequestError, TokasaurusError
from tokasaurus.protocol.relaying import (
    AcquirePrefix,
    FromHTTP,
    PrefixAcquired,
    PrefixRefused,
    ReleasePrefix,
    ToHTTP,
)
from tokasaurus.text.cartridges import Lease, Prefix, PrefixSource
from tokasaurus.text.numbering import PROCESS_SHIFT, process_of

__all__ = ["PrefixRelay", "RemotePrefixes"]

log = logging.getLogger(__name__)


class PrefixRelay:
    """The server's side: has a lease for each ticket of an HTTP process.

    Args:
        prefixes: where prefixes come from.
        send: gives a message to the process with this number, if it has not ended.
    """

    def __init__(self, prefixes: PrefixSource, send: Callable[[int, ToHTTP], None]) -> None:
        self._prefixes = prefixes
        self._send = send
        self._leases: dict[int, Lease] = {}  # by ticket
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by ticket, of those that wait

    def acquire(self, message: AcquirePrefix) -> None:
        """Begins to look for the cartridges, and answers when they are found or not."""
        task = asyncio.get_running_loop().create_task(self._acquire(message))
        self._tasks[message.ticket] = task
        task.add_done_callback(lambda _: self._tasks.pop(message.ticket, None))

    def release(self, ticket: int) -> None:
        """The requests have ended, or do not wait any more."""
        task = self._tasks.pop(ticket, None)
        if task is not None:
            task.cancel()
        lease = self._leases.pop(ticket, None)
        if lease is not None:
            lease.release()

    def close(self, number: int) -> None:
        """An HTTP process has ended."""
        for ticket in [*self._leases, *self._tasks]:
            if process_of(ticket) == number:
                self.release(ticket)

    async def _acquire(self, message: AcquirePrefix) -> None:
        ticket, number = message.ticket, process_of(message.ticket)
        try:
            lease = await self._prefixes.acquire([CartridgeSpec(*each) for each in message.specs])
        except Exception as error:
            if not isinstance(error, TokasaurusError):
                log.exception("cartridges could not be found")
            self._send(number, _refusal(ticket, error))
            return
        self._leases[ticket] = lease
        prefix = lease.prefix
        self._send(number, PrefixAcquired(ticket, prefix.name, prefix.num_tokens, prefix.digests))


class RemotePrefixes:
    """The side of an HTTP process.

    Args:
        give: gives a message to the server; must not block.
        number: of this process.
    """

    def __init__(self, give: Callable[[FromHTTP], None], number: int) -> None:
        self._give = give
        self._next_ticket = number << PROCESS_SHIFT
        self._waiting: dict[int, asyncio.Future[Prefix]] = {}  # by ticket

    async def acquire(self, specs: Sequence[CartridgeSpec]) -> Lease:
        """The prefix that specs stand for now. Raises RequestError or EngineError."""
        ticket = self._next_ticket
        self._next_ticket += 1
        answer = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        named = tuple((spec.id, spec.source, spec.force_redownload) for spec in specs)
        self._give(AcquirePrefix(ticket, named))
        try:
            prefix = await answer
        except asyncio.CancelledError:
            self._give(ReleasePrefix(ticket))
            raise
        finally:
            del self._waiting[ticket]
        return _RemoteLease(prefix, ticket, self._give)

    def take(self, message: PrefixAcquired | PrefixRefused) -> None:
        """Takes an answer of the server."""
        answer = self._waiting.get(message.ticket)
        if answer is None or answer.done():  # its request has gone
            return
        if isinstance(message, PrefixAcquired):
            answer.set_result(Prefix(message.name, message.num_tokens, message.digests))
        else:
            answer.set_exception(_error(message))


@dataclass(eq=False)
class _RemoteLease:
    prefix: Prefix
    _ticket: int
    _give: Callable[[FromHTTP], None]
    _is_released: bool = False

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._give(ReleasePrefix(self._ticket))


def _refusal(ticket: int, error: Exception) -> PrefixRefused:
    if isinstance(error, RequestError):
        return PrefixRefused(ticket, type(error).__name__, error.message, error.field)
    if isinstance(error, TokasaurusError):
        return PrefixRefused(ticket, type(error).__name__, str(error))
    return PrefixRefused(ticket, EngineError.__name__, "the server failed; its log says why")


def _error(message: PrefixRefused) -> TokasaurusError:
    """The error that the server had, or its nearest kind that takes a message alone."""
    kind = getattr(errors, message.kind, EngineError)
    if issubclass(kind, RequestError):
        return kind(message.reason, message.field)
    try:
        error: TokasaurusError = kind(message.reason)
    except TypeError:
        return EngineError(message.reason)
    return error
