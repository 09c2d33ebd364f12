"""The planner and the benchmarks start at once: nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "tokasaurus.planner.replay",
        "tokasaurus.planner.worker_loop",
        "tokasaurus.planner.workloads",
        "tokasaurus.bench.manager",
        "tokasaurus.bench.compare",
        "tokasaurus.bench.device_process",
    ],
)
def test_no_torch_is_imported(module):
    heavy = ("torch", "transformers", "tokenizers", "fastapi", "uvicorn")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
