"""An event loop in a thread: many callers, and its end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokasaurus.errors import EngineError
from tokasaurus.loop_thread import LoopThread


async def nothing():
    pass


def test_callers_that_begin_together_share_one_loop():
    async def loop_of():
        return asyncio.get_running_loop()

    for _ in range(20):
        loop = LoopThread()
        with ThreadPoolExecutor(8) as threads:
            seen = set(threads.map(lambda _: loop.run(loop_of()), range(8)))  # noqa: B023
        assert len(seen) == 1
        loop.close(nothing())
        assert seen.pop().is_closed()


def test_its_end_is_that_of_calls_under_way():
    loop, begun = LoopThread(), threading.Event()

    async def endless():
        begun.set()
        await asyncio.sleep(1000)

    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(lambda: loop.run(endless()))
        assert begun.wait(30)
        loop.close(nothing())
        with pytest.raises(EngineError, match="closed"):
            call.result(30)
    loop.close(nothing())
