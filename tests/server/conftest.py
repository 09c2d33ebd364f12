from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import RunningServer, random_ids


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RunningServer]:
    with RunningServer().running() as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The server that all tests share; nothing may be in flight after any of them."""
    engine = shared_server.engine
    engine.script, engine.reject, engine.paused = random_ids, None, False
    engine.num_cached_tokens, engine.largest_step = 0, 3
    engine.received.clear()
    yield shared_server
    engine.paused = False
    shared_server.wait_idle()
