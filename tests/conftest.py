"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "MODEL" not in os.environ:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background inherits it ignored, and so would all that tests start to interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from engine_process import EngineProcess, running

from tokasaurus.model import instruction_sets
from tokasaurus.model.instruction_sets import INSTRUCTION_SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor",
        choices=[each.name for each in INSTRUCTION_SETS],
        help="let this process believe that the processor runs no better instruction set",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "MODEL" in os.environ:
        _fetch(os.environ["MODEL"])
    name = config.getoption("--processor")
    if name is not None:
        (chosen,) = instruction_sets.candidate_sets(name)
        told = Path(tempfile.mkdtemp()) / "cpuinfo"
        told.write_text(f"flags : {' '.join(chosen.features)}\n")
        instruction_sets._CPU_INFO = told
        instruction_sets._processor_features.cache_clear()


def _fetch(model: str) -> None:
    """Downloads a model if need be: that may take longer than a test may."""
    # The tests of other people's clients run where the engine's libraries are not installed.
    from tokasaurus.errors import ModelError
    from tokasaurus.launch.model_files import find_model

    try:
        find_model(model)
    except ModelError as error:
        raise pytest.UsageError(f"MODEL: {error}") from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that run engines first: they are the slowest, and none is left to the end."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


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
