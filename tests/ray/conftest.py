"""A Ray cluster of several raylets on this machine, each with room for one worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NUM_NODES = 3
_MEMORY_BYTES = 80_000_000  # of each node's object store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder: it runs with ``make test-ray``."""
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_environment() -> None:
    """Lets raylets, and the actors that they start, import what these tests import."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))


@pytest.fixture
def cluster(ray_environment: None) -> Iterator:
    """A cluster whose head has no room for workers; it dies with the test."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": _MEMORY_BYTES,
        },
    )
    try:
        for _ in range(NUM_NODES):
            made.add_node(num_cpus=1, object_store_memory=_MEMORY_BYTES)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()
