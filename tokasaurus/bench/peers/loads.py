"""Runs requests in an engine of several processes, and says what a roofline allows for them.

The manager and the worker have processes of their own, as below ``toka``. The text core is here, so
that no time goes into HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokasaurus.bench.peers.checkpoint import Shape
from tokasaurus.bench.peers.workloads import Request
from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import EngineDead
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.replicated import QUIET, ReplicatedEngine
from tokasaurus.protocol.messages import Statistics
from tokasaurus.rounding import ceil_div
from tokasaurus.text.params import SamplingParams

__all__ = ["LoadedEngine", "Rates", "bound_s", "loaded_engine"]

_STATISTICS_S = 5.0


@dataclass(frozen=True)
class Rates:
    """Of a device.

    Attributes:
        flops: a second, of products.
        bytes: a second.
    """

    flops: float
    bytes: float


def bound_s(
    shape: Shape,
    width: int,
    requests: Sequence[Request],
    max_seqs: int,
    rates: Rates,
    *,
    shares: bool,
) -> float:
    """The seconds of the roofline: a device that multiplies and reads, one after the other.

    Products are those of all rows, and attention is over all positions. Reading is the weights once
    for each step, and keys and values of each sequence once for each of its steps. Steps are as few
    as the number of sequences that may run allows.

    Args:
        shape: of the model.
        width: bytes of a number.
        requests: what runs.
        max_seqs: sequences that may run together.
        rates: of the device.
        shares: the keys and values of a prompt are read once for all of its samples.
    """
    head = shape.hidden_size * shape.vocab_size
    sizes = (each for each in shape.tensors().values() if len(each) == 2)
    parameters = sum(rows * columns for rows, columns in sizes)  # the head has the embedding's
    rows = draws = pairs = positions = 0
    for request in requests:
        prompt, new, n = len(request.prompt), request.max_tokens, request.n
        rows += prompt + n * (new - 1)
        draws += n * new
        own = n * new * (new - 1) // 2
        pairs += prompt * (prompt + 1) // 2 + n * (new - 1) * prompt + own
        positions += own + (1 if shares else n) * (new - 1) * prompt
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
    flops = 2 * ((parameters - head) * rows + head * draws) + attention
    sequences = sum(request.n for request in requests)
    longest = max(each.max_tokens for each in requests)
    steps = max(ceil_div(draws, min(sequences, max_seqs)), longest)
    num_bytes = steps * parameters * width + positions * shape.kv_bytes(width)
    return flops / rates.flops + num_bytes / rates.bytes


class LoadedEngine:
    """An engine with its model loaded.

    Args:
        engine: which has one replica.
    """

    def __init__(self, engine: ReplicatedEngine) -> None:
        self._engine = engine

    def run(self, requests: Sequence[Request]) -> float:
        """Runs requests that all come at once, at temperature 1. Returns the seconds."""
        engine = self._engine
        prepared = [
            engine.prepare(
                request.prompt,
                SamplingParams(
                    max_tokens=request.max_tokens, n=request.n, temperature=1.0, ignore_eos=True
                ),
            )
            for request in requests
        ]
        started = time.perf_counter()
        changed: list[int] = []
        generations = [
            engine.generations.start(each, on_change=partial(changed.append, number))
            for number, each in enumerate(prepared)
        ]
        unfinished = set(range(len(generations)))
        while unfinished:
            engine.step()
            for number in changed:
                if (error := generations[number].error) is not None:
                    raise error
                if generations[number].finished:
                    unfinished.discard(number)
            changed.clear()
        return time.perf_counter() - started

    def statistics(self, least_tokens: int) -> Statistics:
        """The manager's figures when it rests, after it has generated so many tokens in all.

        Raises:
            EngineDead: they do not come.
        """
        deadline = time.monotonic() + _STATISTICS_S
        while time.monotonic() < deadline:
            self._engine.step()
            found = self._engine.generations.statistics
            if found is None or found.num_running:
                continue
            if found.num_generated_tokens >= least_tokens:
                return found
        raise EngineDead(f"the manager has not reported {least_tokens} tokens")

    @property
    def manager_pid(self) -> int:
        """The process id of the manager."""
        return self._engine.manager_pid(0)


@contextmanager
def loaded_engine(flags: Mapping[str, Any]) -> Iterator[LoadedEngine]:
    """An engine for as long as the block lasts.

    Args:
        flags: of ``EngineConfig``.
    """
    engine = ReplicatedEngine(assemble(EngineConfig.from_flags(**{**QUIET, **flags})))
    try:
        yield LoadedEngine(engine)
    finally:
        engine.close()
