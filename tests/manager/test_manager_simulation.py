"""Random worlds: any schedule, the same tokens. What is checked after each step: see ``simulation``."""

from __future__ import annotations

import itertools

import pytest
from simulation import Simulation


def run_worlds(first_seed: int, num_events: int) -> None:
    """Runs one world after the other until so much has happened in all of them together."""
    for seed in itertools.count(first_seed):
        world = Simulation.of_seed(seed)
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {world.config} {world.habits}") from error
        num_events -= world.num_events
        if num_events <= 0:
            return


@pytest.mark.parametrize("first_seed", range(0, 500, 100))
def test_random_worlds(first_seed: int) -> None:
    """At least 50,000 arrivals, aborts, stops and preemptions, all together."""
    run_worlds(first_seed, num_events=10_000)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first_seed", range(10_000, 26_000, 1_000))
def test_many_random_worlds(first_seed: int) -> None:
    run_worlds(first_seed, num_events=20_000)
