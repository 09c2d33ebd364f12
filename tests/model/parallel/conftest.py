"""Ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_processes import RankProcesses


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    """Four of them."""
    processes = RankProcesses(4, Path(tmp_path_factory.mktemp("ranks")))
    yield processes
    processes.end()
