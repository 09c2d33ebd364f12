"""Random worlds in which replicas die get the tokens of a world in which none does."""

from __future__ import annotations

import pytest
from replica_world import ReplicaWorld


def run_worlds(seeds: range) -> int:
    """Runs a world of each seed; returns the samples that went on elsewhere with tokens."""
    num_replayed = 0
    for seed in seeds:
        world = ReplicaWorld(seed)
        try:
            world.run(num_requests=40)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        num_replayed += world.num_replayed
    return num_replayed


def test_every_request_gets_its_tokens_once_though_replicas_die() -> None:
    assert run_worlds(range(8)) > 15  # else these worlds show little


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_request_gets_its_tokens_once_in_many_worlds() -> None:
    assert run_worlds(range(1_000, 2_000)) > 2_000
