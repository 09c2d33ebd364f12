"""How the threads of workers share the processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_process import started

from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch import processor
from tokasaurus.launch.processor import bound_spinning, with_threads
from tokasaurus.planner.configuration import simulated_slices


def test_threads_sleep_soon_unless_the_user_chose_how_they_wait():
    for given, expected in (
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "1000"}, {"GOMP_SPINCOUNT": "1000"}),
    ):
        environment = dict(given)
        bound_spinning(environment)
        assert environment == expected


def test_workers_share_the_cores(monkeypatch):
    one = simulated_slices(EngineConfig())
    worker = one.replicas[0].workers[0]
    for num_cores, num_replicas, expected in ((8, 1, None), (8, 2, 4), (8, 3, 2), (2, 4, 1)):
        monkeypatch.setattr(processor, "num_cores", lambda count=num_cores: count)
        slices = replace(one, replicas=one.replicas * num_replicas)
        assert with_threads(worker, slices).num_threads == expected, (num_cores, num_replicas)
        chosen = replace(worker, num_threads=7)
        assert with_threads(chosen, slices).num_threads == 7


@pytest.mark.engine
def test_only_the_process_that_computes_loads_torch(tmp_path: Path, monkeypatch):
    """And its threads sleep, although nothing outside the engine says so."""
    with started(tmp_path, is_ready=True) as engine:
        for role in ("server", "manager", "worker"):
            maps = Path(f"/proc/{engine.child(role)}/maps").read_text()
            assert ("libtorch_cpu" in maps) == (role == "worker"), role
        keeper = Path(f"/proc/{engine.process.pid}/maps").read_text()
        assert "libtorch_cpu" not in keeper
        assert "numpy" not in keeper
