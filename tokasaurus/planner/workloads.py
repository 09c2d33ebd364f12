"""Three kinds of workload, drawn from a seed. Their sizes suit a replay of seconds.

Lengths are log-normal, as those of served traffic roughly are. All requests of a trace have the
same max_tokens, since most clients leave it alone, so it says little about a completion's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tokasaurus.planner.trace import TraceRequest
from tokasaurus.protocol.arrays import Int64Array

__all__ = ["WORKLOADS", "chat", "reasoning", "repeated_sampling"]


def repeated_sampling(seed: int, size: float = 1.0) -> list[TraceRequest]:
    """Samples of a few problems, n=1,024 each, which all arrive at the beginning.

    The lengths of the samples of a problem depend on the problem.
    """
    chance = np.random.default_rng([seed, 1])
    num_samples = _scaled(1024, size)
    return [
        TraceRequest(
            arrival_s=0.0,
            prompt_tokens=int(prompt_tokens),
            output_tokens=_tuple(_lognormal(chance, median, 0.5, num_samples, 1024)),
            max_tokens=1024,
        )
        for prompt_tokens, median in zip(
            chance.integers(100, 400, 6), _lognormal(chance, 120, 0.6, 6, 400), strict=True
        )
    ]


def chat(seed: int, size: float = 1.0) -> list[TraceRequest]:
    """Short questions after a common system prompt, which arrive faster than they are answered."""
    chance = np.random.default_rng([seed, 2])
    count = _scaled(4000, size)
    arrivals = np.cumsum(chance.exponential(1 / 2000, count))
    prompts = 64 + _lognormal(chance, 120, 0.9, count, 1024)
    outputs = _lognormal(chance, 150, 0.8, count, 1024)
    return [
        TraceRequest(
            arrival_s=float(arrivals[index]),
            prompt_tokens=int(prompts[index]),
            prefix_id=0,
            prefix_tokens=64,
            output_tokens=(int(outputs[index]),),
            max_tokens=1024,
        )
        for index in range(count)
    ]


def reasoning(seed: int, size: float = 1.0) -> list[TraceRequest]:
    """Long chains of thought with a heavy tail: half end within 400 tokens, and few reach 8,192."""
    chance = np.random.default_rng([seed, 3])
    count = _scaled(1000, size)
    prompts = chance.integers(50, 300, count)
    outputs = _lognormal(chance, 400, 1.2, count, 8192)
    return [
        TraceRequest(
            arrival_s=0.0,
            prompt_tokens=int(prompts[index]),
            output_tokens=(int(outputs[index]),),
            max_tokens=8192,
        )
        for index in range(count)
    ]


WORKLOADS: Mapping[str, Callable[[int, float], list[TraceRequest]]] = {
    "sampling": repeated_sampling,
    "chat": chat,
    "reasoning": reasoning,
}


def _scaled(count: int, size: float) -> int:
    return max(1, round(count * size))


def _lognormal(
    chance: np.random.Generator, median: float, sigma: float, count: int, limit: int
) -> Int64Array:
    drawn = chance.lognormal(np.log(median), sigma, count)
    return np.clip(np.rint(drawn), 1, limit).astype(np.int64)


def _tuple(values: Int64Array) -> tuple[int, ...]:
    return tuple(values.tolist())
