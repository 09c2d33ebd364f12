"""Clients of other projects, in an environment of their own: ``make test-clients``.

The engine runs in the project's environment, which the variable ENGINE_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_process import EngineProcess, running

CLIENTS = ("instructor", "langchain_openai", "litellm")

# Elsewhere these files are not even read, since they import the clients.
if not all(map(importlib.util.find_spec, CLIENTS)):
    collect_ignore_glob = ["test_*.py"]

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no request to the internet at its import


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder: it runs with ``make test-clients``."""
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture
def url(engine: EngineProcess) -> str:
    """Of the engine that all tests share."""
    return f"{engine.url}/v1"


@pytest.fixture
def oracle(engine: EngineProcess):
    """OpenAI's own client, whose answers those of other clients are compared with."""
    return engine.client()


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of an engine that wants a key, and the key."""
    key = "a-key"
    with running(tmp_path_factory.mktemp("locked"), f"api_key={key}") as engine:
        yield f"{engine.url}/v1", key
