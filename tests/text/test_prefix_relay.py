"""Cartridges of an HTTP process: what it asks the server for, and gives back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tokasaurus.cartridges.specification import CartridgeSpec
from tokasaurus.errors import (
    Conflict,
    EngineDead,
    EngineError,
    EngineOverloaded,
    NotFound,
    ReplicasLost,
    RequestError,
    RequestTooLong,
    SourceUnavailable,
    StorageFull,
)
from tokasaurus.protocol.relaying import AcquirePrefix, FromHTTP, ReleasePrefix
from tokasaurus.text.cartridges import Prefix
from tokasaurus.text.prefix_relay import PrefixRelay, RemotePrefixes

SPEC = CartridgeSpec("a", "local", True)


class Both:
    """A server and two HTTP processes, whose messages pass at once.

    Attributes:
        asked: the specs that the server was asked for.
        num_leases: that the server has given and not got back.
        gate: acquiring waits for it.
        error: raised instead of giving a lease.
    """

    def __init__(self) -> None:
        self.asked: list[list[CartridgeSpec]] = []
        self.num_leases = 0
        self.num_waiting = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.relay = PrefixRelay(self, lambda number, message: self.remotes[number].take(message))
        self.remotes = {number: RemotePrefixes(self.pass_on, number) for number in (1, 2)}

    def pass_on(self, message: FromHTTP) -> None:
        if isinstance(message, AcquirePrefix):
            self.relay.acquire(message)
        else:
            assert isinstance(message, ReleasePrefix)
            self.relay.release(message.ticket)

    async def acquire(self, specs: list[CartridgeSpec]) -> Both:
        self.asked.append(specs)
        self.num_waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.num_waiting -= 1
        if self.error is not None:
            raise self.error
        self.num_leases += 1
        return self

    # What a lease has.
    prefix = Prefix("name", 21, ("digest",))

    def release(self) -> None:
        self.num_leases -= 1


def with_both(test: Callable[[Both], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            both = Both()
            await test(both)
            await asyncio.sleep(0)
            assert (both.num_leases, both.num_waiting) == (0, 0)

        asyncio.run(main())

    run.__doc__ = test.__doc__
    return run


@with_both
async def test_a_lease_is_given_and_given_back(both: Both) -> None:
    first = await both.remotes[1].acquire([SPEC, CartridgeSpec("b")])
    second = await both.remotes[2].acquire([SPEC])
    assert first.prefix == second.prefix == both.prefix
    assert both.asked == [[SPEC, CartridgeSpec("b")], [SPEC]]
    assert both.num_leases == 2
    for lease in (first, second, second):
        lease.release()
    assert both.num_leases == 0


@with_both
async def test_errors_are_what_they_were(both: Both) -> None:
    for error in (
        RequestError("wrong", "cartridges"),
        RequestTooLong("too long", "cartridges"),
        NotFound("none", "id"),
        Conflict("not now"),
        SourceUnavailable("it is away"),
        StorageFull("full"),
        EngineDead("it burnt"),
    ):
        both.error = error
        with pytest.raises(type(error)) as raised:
            await both.remotes[1].acquire([SPEC])
        assert type(raised.value) is type(error)
        assert str(raised.value) == str(error)
        assert getattr(raised.value, "field", None) == getattr(error, "field", None)
    for error in (EngineOverloaded("busy", 3), ReplicasLost("a", "b"), ValueError("a defect")):
        both.error = error
        with pytest.raises(EngineError) as raised:
            await both.remotes[1].acquire([SPEC])
        if not isinstance(error, ValueError):
            assert str(raised.value) == str(error)
        else:
            assert "defect" not in str(raised.value)


@with_both
async def test_a_request_that_does_not_wait_any_more_gives_up_its_lease(both: Both) -> None:
    """Whether the server has it already or not."""
    both.gate.clear()
    asking = asyncio.ensure_future(both.remotes[1].acquire([SPEC]))
    while not both.num_waiting:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    await asyncio.sleep(0)
    assert both.num_waiting == 0
    asking = asyncio.ensure_future(both.remotes[1].acquire([SPEC]))
    while not both.num_waiting:
        await asyncio.sleep(0)
    both.gate.set()
    while not both.num_leases:
        await asyncio.sleep(0)
    asking.cancel()  # the answer is there, and nothing has taken it
    await asyncio.wait([asking])
    if not asking.cancelled():
        asking.result().release()


@with_both
async def test_a_process_that_ends_gives_up_what_it_has_and_waits_for(both: Both) -> None:
    kept = await both.remotes[2].acquire([SPEC])
    await both.remotes[1].acquire([SPEC])
    both.gate.clear()
    asking = asyncio.ensure_future(both.remotes[1].acquire([SPEC]))
    while not both.num_waiting:
        await asyncio.sleep(0)
    both.relay.close(1)
    await asyncio.sleep(0)
    assert (both.num_leases, both.num_waiting) == (1, 0)
    kept.release()
    asking.cancel()
    await asyncio.wait([asking])
