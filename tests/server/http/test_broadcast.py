"""A stream for many viewers, without a web server: what is made, and who gets it."""

from __future__ import annotations

import asyncio

import pytest

from tokasaurus.errors import EngineOverloaded
from tokasaurus.server.http.broadcast import Broadcast


class Source:
    """Makes numbered events; each first one may fail."""

    def __init__(self) -> None:
        self.num_first = self.num_next = 0
        self.fails = False
        self.is_over = False

    async def first(self) -> bytes:
        self.num_first += 1
        await asyncio.sleep(0)
        if self.fails:
            raise ZeroDivisionError
        return b"first %d" % self.num_first

    async def next(self) -> bytes | None:
        if self.is_over:
            return None
        self.num_next += 1
        return b"next %d" % self.num_next


def broadcast(source, interval_s=0.01, most=100) -> Broadcast:
    return Broadcast(source.first, source.next, interval_s, most)


async def read(viewer, number):
    found = []
    with viewer:
        async for event in viewer.events():
            found.append(event)
            if len(found) == number:
                break
    return found


def test_viewers_that_come_together_share_the_first_event_and_all_others():
    async def run():
        source = Source()
        many = broadcast(source, interval_s=0.05)
        viewers = await asyncio.gather(*[many.join() for _ in range(50)])
        found = await asyncio.gather(*[read(viewer, 3) for viewer in viewers])
        assert found == [[b"first 1", b"next 1", b"next 2"]] * 50
        assert (source.num_first, many.num_viewers) == (1, 0)

    asyncio.run(run())


def test_nothing_is_made_without_viewers_and_it_begins_again():
    async def run():
        source = Source()
        many = broadcast(source)
        await read(await many.join(), 2)
        await asyncio.sleep(0.05)
        num_made = many.num_made
        await asyncio.sleep(0.05)
        assert many.num_made == num_made
        found = await read(await many.join(), 2)
        assert found == [b"first 2", b"next %d" % source.num_next]

    asyncio.run(run())


def test_a_slow_viewer_gets_the_latest_event_only():
    async def run():
        source = Source()
        viewer = await broadcast(source).join()
        with viewer:
            events = viewer.events()
            assert await anext(events) == b"first 1"
            while source.num_next < 5:
                await asyncio.sleep(0.01)
            assert (await anext(events)) in (b"next 5", b"next %d" % source.num_next)

    asyncio.run(run())


def test_a_first_event_that_fails_is_made_again():
    async def run():
        source = Source()
        many = broadcast(source)
        source.fails = True
        with pytest.raises(ZeroDivisionError):
            await many.join()
        source.fails = False
        await asyncio.sleep(0.05)
        assert await read(await many.join(), 1) == [b"first 2"]

    asyncio.run(run())


def test_the_source_ends_all_streams_and_too_many_viewers_are_refused():
    async def run():
        source = Source()
        many = broadcast(source, most=2)
        viewers = [await many.join() for _ in range(2)]
        with pytest.raises(EngineOverloaded):
            await many.join()
        source.is_over = True
        for viewer in viewers:
            assert await read(viewer, 10) == [b"first 1"]

    asyncio.run(run())


def test_viewers_that_come_together_keep_to_the_limit():
    async def run():
        many = broadcast(Source(), most=4)
        joins = [many.join() for _ in range(10)]
        found = await asyncio.gather(*joins, return_exceptions=True)
        assert sum(isinstance(each, EngineOverloaded) for each in found) == 6
        assert many.num_viewers == 4

    asyncio.run(run())


def test_a_viewer_that_reads_late_reads_the_first_event_and_then_the_latest():
    async def run():
        source = Source()
        many = broadcast(source)
        viewer = await many.join()
        while source.num_next < 3:
            await asyncio.sleep(0.01)
        found = await read(viewer, 2)
        assert found[0] == b"first 1"
        assert int(found[1].removeprefix(b"next ")) >= 2

    asyncio.run(run())
