"""The names that users import, and what importing them must not load."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import tokasaurus

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "zmq")


# Where users of earlier versions, and readers of the documents, look for these.
KNOWN_NAMES = {
    "tokasaurus.server.endpoints": ["Endpoints"],
    "tokasaurus.manager.scheduler": ["Scheduler"],
    "tokasaurus.manager.allocator": ["PageAllocator"],
    "tokasaurus.manager.hydragen": ["GroupFinder", "Groups"],
    "tokasaurus.model": ["get_model_cls"],
    "tokasaurus.model.llama": ["LlamaModel"],
    "tokasaurus.model.qwen": ["Qwen2Model", "Qwen3Model"],
    "tokasaurus.model.kv_cache": ["KVCache"],
    "tokasaurus.scripts.ping": ["main"],
    "tokasaurus.scripts.download": ["main"],
    "tokasaurus.common_types": ["EngineConfig"],
    "tokasaurus.client.lm.lm_factory": ["get_lm_client"],
    "tokasaurus.client.lm.tokasaurus_client": ["TokasaurusClient"],
}


def test_names_that_users_know_can_be_imported():
    missing = []
    for module, names in KNOWN_NAMES.items():
        found = importlib.import_module(module)
        missing += [
            f"{module}.{name}" for name in names if not callable(getattr(found, name, None))
        ]
    assert missing == []


def test_the_package_exports_exactly_its_public_names():
    assert set(tokasaurus.__all__) == {
        "LLM",
        "AsyncLLM",
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
        ("tokasaurus.client.lm", HEAVY),
        ("tokasaurus.client.lm.run", HEAVY),
        ("tokasaurus.server.app", ("torch",)),
    ],
)
def test_importing_loads_nothing_heavy(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
