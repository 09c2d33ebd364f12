"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background inherits it ignored, and so would all that tests start to interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from engine_process import EngineProcess, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deals tests to processes in groups, the slowest kind first, so that no process waits long.

    The tests of a file share fixtures and stay together. So do all tests that use the one
    ``engine``, whatever their files are.
    """
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
    for item in items:
        shares_engine = "engine" in getattr(item, "fixturenames", ())
        group = "engine" if shares_engine else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One running engine for all tests that do it no harm.

    It has the bundled model, or the one in the environment variable MODEL. `toka` itself reads
    further flags from OVERRIDES.
    """
    directory = tmp_path_factory.mktemp("engine")
    flags = ("uvicorn_log_level=warning", "trust_request_chat_template=T")
    with running(directory, *flags) as ready:
        yield ready
