"""The broadcast to viewers, without HTTP: what they read first, their limit, and failures."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from tokasaurus.errors import EngineOverloaded
from tokasaurus.server.http.broadcast import Broadcast, Viewer


def broadcast(make_first, max_viewers=4):
    numbers = count(1)

    async def make_next():
        return b"next %d" % next(numbers)

    return Broadcast(make_first, make_next, 0.01, max_viewers)


async def made(broadcast, more):
    """Returns when this many events more have been made."""
    wanted = broadcast.num_made + more
    while broadcast.num_made < wanted:
        await asyncio.sleep(0.001)


def test_viewers_that_come_together_keep_to_the_limit():
    async def run():
        gate = asyncio.Event()

        async def make_first():
            await gate.wait()
            return b"first"

        watched = broadcast(make_first)
        joins = [asyncio.ensure_future(watched.join()) for _ in range(10)]
        await asyncio.sleep(0)
        gate.set()
        found = await asyncio.gather(*joins, return_exceptions=True)
        assert sum(isinstance(each, Viewer) for each in found) == watched.num_viewers == 4
        assert sum(isinstance(each, EngineOverloaded) for each in found) == 6
        await watched.close()

    asyncio.run(run())


def test_a_first_event_that_failed_is_made_again():
    async def run():
        failures = iter([RuntimeError("for once")])

        async def make_first():
            for failure in failures:
                raise failure
            return b"first"

        watched = broadcast(make_first)
        with pytest.raises(RuntimeError, match="for once"):
            await watched.join()
        assert await anext((await watched.join()).events()) == b"first"
        await watched.close()

    asyncio.run(run())


def test_a_first_event_is_not_kept_for_later_if_nobody_stayed():
    async def run():
        gate, numbers = asyncio.Event(), count(1)

        async def make_first():
            number = next(numbers)
            await gate.wait()
            return b"first %d" % number

        watched = broadcast(make_first)
        gone = asyncio.ensure_future(watched.join())
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.wait({gone})
        gate.set()
        assert await anext((await watched.join()).events()) == b"first 2"
        await watched.close()

    asyncio.run(run())


def test_a_slow_viewer_reads_the_first_event_and_then_the_latest():
    async def run():
        async def make_first():
            return b"first"

        watched = broadcast(make_first)
        viewer = await watched.join()
        await made(watched, 3)
        events = viewer.events()
        assert await anext(events) == b"first"
        assert int((await anext(events)).removeprefix(b"next ")) >= 2
        await watched.close()

    asyncio.run(run())
