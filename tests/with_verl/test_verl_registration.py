"""veRL finds the rollout, or somebody is told why not. Each test is a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("verl", reason="veRL is not installed: make test-verl")

HAS_PLUGINS = version("verl") >= "0.9"
LOOK = """
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
print(get_rollout_replica_class("tokasaurus").__name__, get_rollout_class("tokasaurus").__name__)
"""
FOUND = "TokasaurusReplica ServerAdapter"


def program(script: str, **environment: str) -> tuple[str, str]:
    """What it prints, and what it says on the way."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**inherited, **environment},
        check=False,
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.skipif(not HAS_PLUGINS, reason="this veRL has no entry points")
def test_the_entry_point_is_enough():
    assert program(LOOK)[0] == FOUND
    assert program(LOOK, VERL_USE_EXTERNAL_PLUGINS="other,tokasaurus")[0] == FOUND
    stdout, stderr = program(LOOK, VERL_USE_EXTERNAL_PLUGINS="none")
    assert stdout == ""
    assert "Unknown rollout mode: tokasaurus" in stderr


def test_the_module_is_enough():
    off = {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    for module in ("tokasaurus.integrations.verl", "tokasaurus.integrations.verl.plugin"):
        assert program(LOOK, VERL_USE_EXTERNAL_MODULES=module, **off)[0] == FOUND


def test_the_order_of_imports_does_not_matter():
    first = "import tokasaurus.integrations.verl.server\n" + LOOK
    module = {"VERL_USE_EXTERNAL_MODULES": "tokasaurus.integrations.verl.plugin"}
    assert program(first, **module)[0] == FOUND
    after = "import verl, tokasaurus.integrations.verl\n" + LOOK
    assert program(after, VERL_USE_EXTERNAL_PLUGINS="none")[0] == FOUND


BROKEN = """
import sys, types
base = types.ModuleType("verl.workers.rollout.base")  # of a veRL whose tables have other names
base.BaseRollout = base.get_rollout_class = type("BaseRollout", (), {})
sys.modules["verl.workers.rollout.base"] = base
try:
    import verl
except ImportError as error:
    print("refused:", error)
from verl.workers.rollout.replica import get_rollout_replica_class
try:
    get_rollout_replica_class("tokasaurus")
except ImportError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not HAS_PLUGINS, reason="this veRL has no entry points")
def test_a_broken_entry_point_is_seen_in_the_log_and_where_the_rollout_is_asked_for():
    """veRL itself says nothing."""
    stdout, stderr = program(BROKEN)
    reason = "has no tables of rollouts that others can fill, or cannot import them"
    assert "the rollout 'tokasaurus' cannot be used: veRL" in stderr
    assert reason in stderr
    assert stdout.count("refused: the rollout 'tokasaurus' cannot be used") == 1
    assert reason in stdout


def test_a_broken_module_stops_the_import():
    off = {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    stdout, stderr = program(
        BROKEN, VERL_USE_EXTERNAL_MODULES="tokasaurus.integrations.verl", **off
    )
    assert stdout.startswith("refused: veRL")
    assert "the rollout 'tokasaurus' cannot be used" in stderr
