"""Calls that several wait for."""

from __future__ import annotations

import asyncio

import pytest

from tokasaurus.cartridges.joined import JoinedCalls


def test_equal_calls_at_the_same_time_are_one():
    async def run():
        calls, begun, gate = JoinedCalls(fresh=False), [], asyncio.Event()

        async def call():
            begun.append(None)
            await gate.wait()
            return len(begun)

        waiting = [asyncio.create_task(calls.run("a", call)) for _ in range(3)]
        other = asyncio.create_task(calls.run("b", call))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(begun) == 2
        late = asyncio.create_task(calls.run("a", call))
        gate.set()
        assert await asyncio.gather(*waiting, late, other) == [2] * 5
        # What has ended is not joined.
        assert await calls.run("a", call) == 3

    asyncio.run(run())


def test_a_fresh_call_begins_after_it_was_asked_for():
    async def run():
        calls, log, gates = JoinedCalls(fresh=True), [], []

        async def call():
            gate = asyncio.Event()
            gates.append(gate)
            log.append("begin")
            await gate.wait()
            log.append("end")
            return len(gates)

        async def settle():
            for _ in range(5):
                await asyncio.sleep(0)

        first = asyncio.create_task(calls.run("a", call))
        await settle()
        later = [asyncio.create_task(calls.run("a", call)) for _ in range(3)]
        await settle()
        assert log == ["begin"]  # the second waits for the end of the first
        gates[0].set()
        await settle()
        assert log == ["begin", "end", "begin"]
        last = asyncio.create_task(calls.run("a", call))
        gates[1].set()
        await settle()
        gates[2].set()
        assert [await first, *await asyncio.gather(*later), await last] == [1, 2, 2, 2, 3]
        assert log == ["begin", "end"] * 3

    asyncio.run(run())


def test_a_call_is_cancelled_with_the_last_that_waits_for_it():
    async def run(fresh):
        calls, ends = JoinedCalls(fresh=fresh), []

        async def call():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        first, second = (asyncio.create_task(calls.run("a", call)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        assert not ends
        second.cancel()
        await asyncio.sleep(0.01)
        assert ends == ["cancelled"]

        # The next one is a call of its own.
        async def answer():
            return 7

        assert await calls.run("a", answer) == 7

    asyncio.run(run(fresh=False))
    asyncio.run(run(fresh=True))


def test_all_that_wait_get_the_error_and_it_is_not_kept():
    async def run():
        calls = JoinedCalls(fresh=False)

        async def fail():
            await asyncio.sleep(0.01)
            raise ValueError("broken")

        async def answer():
            return 7

        results = await asyncio.gather(
            *(calls.run("a", fail) for _ in range(3)), return_exceptions=True
        )
        assert [str(each) for each in results] == ["broken"] * 3
        assert await calls.run("a", answer) == 7

    asyncio.run(run())


def test_closing_ends_all_calls():
    async def run():
        calls = JoinedCalls(fresh=True)
        waiting = [asyncio.create_task(calls.run(key, lambda: asyncio.sleep(60))) for key in "aab"]
        await asyncio.sleep(0.01)
        await calls.close()
        for each in waiting:
            with pytest.raises(asyncio.CancelledError):
                await each

    asyncio.run(run())
