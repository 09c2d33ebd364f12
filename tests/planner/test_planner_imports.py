"""The planner and the benchmarks start at once: they import nothing heavy."""

from __future__ import annotations

import subprocess
import sys

_MODULES = (
    "tokasaurus.planner.replay",
    "tokasaurus.planner.plan_report",
    "tokasaurus.planner.worker_loop",
    "tokasaurus.planner.workloads",
    "tokasaurus.bench.manager",
    "tokasaurus.bench.compare",
    "tokasaurus.bench.device_process",
)
_HEAVY = ("torch", "transformers", "tokenizers", "fastapi", "uvicorn")

# Prints the first module after whose import something heavy is there.
_CODE = f"""
import importlib, sys
for module in {_MODULES!r}:
    importlib.import_module(module)
    heavy = [name for name in {_HEAVY!r} if name in sys.modules]
    if heavy:
        sys.exit(f"{{module}} imports {{heavy}}")
"""


def test_nothing_heavy_is_imported():
    seen = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
