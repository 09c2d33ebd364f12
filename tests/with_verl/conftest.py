"""What the tests with the real veRL share: a local Ray, and veRL's own configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY_BYTES = 80_000_000  # of Ray's object store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder: it runs with ``make test-verl``."""
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.verl)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine. Its actors import what these tests import, in either way to register."""
    os.environ["RAY_DEDUP_LOGS"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "tokasaurus.integrations.verl"
    import ray

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=_MEMORY_BYTES)
    try:
        yield
    finally:
        ray.shutdown()
