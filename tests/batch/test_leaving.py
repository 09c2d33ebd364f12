"""Runners that take turns with a store, as engines do in restarts."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from echo_batches import check, new_batch
from echo_process import MAX_SAMPLES, URL, answer

from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.store import JobStore
from tokasaurus.errors import EngineNotReady

NUM_LINES = 900
MOST_TURNS = 20


def test_each_line_is_asked_once_however_often_another_runner_takes_over(tmp_path):
    """What is in flight when a runner leaves is answered, and no other runner asks it again."""
    rng = random.Random(5)
    data_dir = tmp_path / "data"
    batch_id = new_batch(data_dir, NUM_LINES)
    asked: Counter[int] = Counter()
    goal, reached = 0, asyncio.Event()

    async def counting(path: str, body: Any, *, priority: int) -> tuple[int, bytes]:
        asked[body["number"]] += 1
        if asked.total() >= goal:
            reached.set()
        return await answer(path, body, priority=priority)

    async def take_turn(is_last: bool) -> bool:
        nonlocal goal
        runner = BatchRunner(None, counting, urls=[URL], model="echo", max_samples=MAX_SAMPLES)
        with pytest.raises(EngineNotReady, match="another engine has"):
            _ = runner.store
        runner.adopt(JobStore(data_dir))
        reached.clear()
        num_more = rng.choice([0, rng.randrange(1, MAX_SAMPLES)])
        goal = asked.total() + num_more
        await runner.start()
        if is_last:
            await runner.wait(batch_id)
        elif num_more:
            waiting = {
                asyncio.create_task(each) for each in (reached.wait(), runner.wait(batch_id))
            }
            _, left = await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
            for each in left:
                each.cancel()
        else:
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
        await runner.leave()
        assert runner.num_lines_in_flight == 0
        is_over = not await runner.on_disk(runner.store.unfinished_batches)
        await runner.give_up_store()
        await runner.close()
        return is_over

    async def take_turns() -> int:
        for turn in range(1, MOST_TURNS + 1):
            if await take_turn(turn == MOST_TURNS):
                return turn
        raise AssertionError("the last runner has left lines")

    # With those in flight, no turn but the last asks more than twice as many as may be in flight.
    assert asyncio.run(take_turns()) > 4
    check(data_dir, batch_id, NUM_LINES)
    assert set(asked.values()) == {1}
