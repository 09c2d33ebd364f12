"""An engine whose weights trainers may change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_process import running

from tokasaurus.client import Client

FLAGS = ("dtype=float32", "kv_cache_num_tokens=4096", "cpu_threads=1")


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with (
        running(tmp_path_factory.mktemp("engine"), *FLAGS) as engine,
        Client(engine.url) as made,
    ):
        yield made
