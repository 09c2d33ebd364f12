"""The cost of one round of admission by forecast, measured in this process."""

from __future__ import annotations

import statistics
import time

import numpy as np

from tokasaurus.manager.forecast.curve import Forecast, ForecastRows, Forest
from tokasaurus.protocol.arrays import Int64Array
from tokasaurus.rounding import ceil_div

__all__ = ["measure_admission_ms"]

_PAGE = 16
_PREFILL_RATE = 8192
_NUM_NODES = 512  # shared prefixes
_NODE_PAGES = 8
_PROMPT = (_NODE_PAGES * _PAGE, 1024)
_ROUNDS = 7


def measure_admission_ms(num_running: int, num_waiting: int, horizon: int) -> float:
    """The median milliseconds of a round: from the rows of all sequences to how many may enter.

    Every second sequence shares a prefix of its prompt with others. A tenth of the cache is free.

    Args:
        num_running: how many sequences decode.
        num_waiting: how many sequences are queued.
        horizon: about how many steps it takes until the last sequence ends.
    """
    chance = np.random.default_rng(0)
    running = _running(chance, num_running, horizon)
    waiting = _waiting(chance, num_waiting, horizon)
    forest = Forest(np.full(_NUM_NODES, -1, np.int32), np.full(_NUM_NODES, _NODE_PAGES, np.int32))

    def forecast() -> Forecast:
        return Forecast(running, waiting, forest, page_size=_PAGE, prefill_rate=_PREFILL_RATE)

    limit = int(forecast().peak() * 10 / 9)
    times = []
    for _ in range(_ROUNDS):
        started = time.thread_time()
        forecast().num_admissible(limit)
        times.append(time.thread_time() - started)
    return statistics.median(times) * 1e3


def _running(chance: np.random.Generator, count: int, horizon: int) -> ForecastRows:
    prompts = chance.integers(*_PROMPT, count)
    num_generated = chance.integers(1, horizon // 2, count)
    length = prompts + num_generated
    return ForecastRows(
        length=length,
        num_pages=ceil_div(length, _PAGE),
        num_prompt_tokens=np.zeros(count, np.int64),
        num_steps=_num_steps(chance, count, horizon),
        leaf=_leaves(chance, count),
    )


def _waiting(chance: np.random.Generator, count: int, horizon: int) -> ForecastRows:
    length = chance.integers(*_PROMPT, count)
    return ForecastRows(
        length=length,
        num_pages=ceil_div(length, _PAGE),
        num_prompt_tokens=length,
        num_steps=_num_steps(chance, count, horizon),
        leaf=_leaves(chance, count),
    )


def _num_steps(chance: np.random.Generator, count: int, horizon: int) -> Int64Array:
    """Log-normal numbers of steps, of which the largest is the horizon."""
    drawn = chance.lognormal(np.log(horizon / 8), 0.8, count).astype(np.int64)
    steps: Int64Array = np.clip(drawn, 1, horizon)
    steps[0] = horizon
    return steps


def _leaves(chance: np.random.Generator, count: int) -> Int64Array:
    leaves: Int64Array = chance.integers(0, _NUM_NODES, count)
    leaves[::2] = -1
    return leaves
