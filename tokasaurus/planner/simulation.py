"""Runs a part of a demand on one replica in virtual time, and predicts what the whole takes.

Replicas get equal loads, so one of them tells the time of all: the one with most to do. It runs so
many sequences that most of them come and go while others wait. The rest is taken to go on at the
rate at which tokens came while sequences waited.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.planner.candidates import Candidate
from tokasaurus.planner.demand import Demand
from tokasaurus.planner.replay import Replay, Timing
from tokasaurus.planner.report import Report

__all__ = ["Simulated", "simulate"]

# Sequences that are simulated, as a multiple of those that run at a time: fewer where answers are
# long, so that a simulation has about this number of batches.
_MOST_ROUNDS, _LEAST_ROUNDS = 3.0, 1.5
_NUM_BATCHES = 4000


@dataclass(frozen=True)
class Simulated:
    """What a configuration does.

    Attributes:
        seconds: until the last answer.
        tokens_per_s: generated tokens of all replicas over these seconds.
        share: of a replica's sequences that were simulated.
        report: of the replica.
    """

    seconds: float
    tokens_per_s: float
    share: float
    report: Report


def simulate(
    candidate: Candidate, demand: Demand, timing: Timing, until: float, *, whole: bool = False
) -> Simulated | None:
    """Predicts the time of a demand.

    Args:
        candidate: the configuration.
        demand: of all replicas.
        timing: of a replica.
        until: when to give up, on the clock ``time.monotonic``.
        whole: simulate every sequence of the replica.

    Returns:
        The prediction; None if it took too long.
    """
    manager = candidate.manager
    parts = demand.dealt(candidate.layout.dp_size, manager.max_running)
    most = max(parts, key=lambda part: part.num_prompt_tokens + part.num_output_tokens)
    part = most if whole else most.first(_num_sequences(most, manager))
    run = Replay(part.trace, manager, timing)
    while run.advance():
        if time.monotonic() > until:
            return None
    report = run.report()
    seconds = report.makespan_s
    if part is not most:
        seconds += _rest_s(most, part, report)
    return Simulated(
        seconds=seconds,
        tokens_per_s=demand.num_output_tokens / seconds,
        share=part.num_sequences / most.num_sequences,
        report=report,
    )


def _num_sequences(demand: Demand, manager: ManagerConfig) -> int:
    # About the batches in which all sequences that run have been replaced by others.
    num_batches = manager.num_lanes * demand.num_output_tokens / demand.num_sequences
    rounds = min(max(_NUM_BATCHES / num_batches, _LEAST_ROUNDS), _MOST_ROUNDS)
    return max(int(rounds * manager.max_running), 1)


def _rest_s(whole: Demand, part: Demand, report: Report) -> float:
    """How much longer the whole takes than the part."""
    num_tokens = whole.num_output_tokens - part.num_output_tokens
    rate = report.tokens_per_s if report.steady is None else report.steady.tokens_per_s
    later_s = whole.trace[-1].arrival_s - part.trace[-1].arrival_s
    if report.steady is None and later_s:  # the device keeps up with what arrives
        return later_s
    return max(num_tokens / rate, later_s)
