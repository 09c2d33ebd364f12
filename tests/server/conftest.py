from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import RunningServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RunningServer]:
    with RunningServer().running() as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The server that all tests share. Nothing may be in flight after a test."""
    shared_server.engine.reset()
    yield shared_server
    shared_server.engine.reset()
    shared_server.wait_idle()
