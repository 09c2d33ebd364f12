"""What importing Tokasaurus gives, and what it must not drag in."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tokasaurus

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "zmq")


def test_public_names():
    assert set(tokasaurus.__all__) == {
        "LLM",
        "CompletionOutput",
        "EngineConfig",
        "RequestOutput",
        "SamplingParams",
        "__version__",
    }
    for name in tokasaurus.__all__:
        assert getattr(tokasaurus, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Lllm'"):
        _ = tokasaurus.Lllm


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tokasaurus", HEAVY),
        ("tokasaurus.protocol.messages", HEAVY),
        ("tokasaurus.common_types", HEAVY),
        ("tokasaurus.manager.manager", HEAVY),
        ("tokasaurus.server.app", ("torch",)),
    ],
)
def test_importing_stays_light(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
