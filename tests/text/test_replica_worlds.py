"""Random worlds in which replicas die get the tokens of a world in which none does."""

from __future__ import annotations

import pytest
from replica_world import ReplicaWorld


def run_worlds(seeds: range) -> tuple[int, int, int]:
    """Runs a world of each seed.

    Returns:
        The samples that went on elsewhere with tokens, the replicas that were started again, and
        the requests that two dead replicas had.
    """
    num_replayed = num_restarts = num_failed = 0
    for seed in seeds:
        world = ReplicaWorld(seed)
        try:
            world.run(num_requests=40)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        num_replayed += world.num_replayed
        num_restarts += len(world.former)
        num_failed += world.num_failed
    return num_replayed, num_restarts, num_failed


def test_every_request_gets_its_tokens_once_though_replicas_die() -> None:
    num_replayed, num_restarts, num_failed = run_worlds(range(8))
    # Else these worlds show little.
    assert num_replayed > 15
    assert num_restarts > 5
    assert num_failed > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_request_gets_its_tokens_once_in_many_worlds() -> None:
    num_replayed, _, _ = run_worlds(range(1_000, 2_000))
    assert num_replayed > 2_000
