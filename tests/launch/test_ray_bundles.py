"""What an engine asks of a Ray cluster. No Ray is needed to plan it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tokasaurus.config.engine import EngineConfig
from tokasaurus.integrations.ray.bundles import plan_bundles
from tokasaurus.launch.remote.launcher import Place
from tokasaurus.protocol.role import Role

GPUS = [{"CPU": 64, "GPU": 4}] * 3 + [{"CPU": 8}]


def test_a_replica_is_on_one_node_if_a_node_has_room_for_it():
    bundles = plan_bundles(EngineConfig(dp_size=3, pp_size=2, tp_size=2), GPUS)
    assert str(bundles) == "3 x 4 GPU"
    assert bundles.room_in(GPUS) == 3
    assert bundles.places[Role("worker", 1, 3)] == Place(1, 3)
    assert bundles.places[Role("manager", 2)] == Place(2)


def test_otherwise_its_stages_are_on_several_nodes_and_each_stage_on_one():
    bundles = plan_bundles(EngineConfig(dp_size=2, pp_size=3, tp_size=4), GPUS)
    assert str(bundles) == "6 x 4 GPU"
    assert bundles.room_in(GPUS) == 3  # so it waits, or fails
    assert bundles.places[Role("worker", 1, 5)] == Place(4, 1)
    assert bundles.places[Role("manager", 1)] == Place(3)


def test_a_stage_is_never_divided():
    """Its ranks share each layer: they wait for a node that has room for all."""
    bundles = plan_bundles(EngineConfig(tp_size=8), GPUS)
    assert str(bundles) == "1 x 8 GPU"
    assert bundles.room_in(GPUS) == 0


def test_on_the_cpu_a_worker_gets_the_cores_that_it_computes_with():
    for nodes, flags in ((GPUS, {"device": "cpu"}), ([{"CPU": 64}], {})):
        bundles = plan_bundles(EngineConfig(dp_size=4, cpu_threads=16, **flags), nodes)
        assert str(bundles) == "4 x 16 CPU"
        assert bundles.room_in([{"CPU": 64}]) == 4
    assert str(plan_bundles(EngineConfig(), [{"CPU": 64}])) == "1 x 1 CPU"


def test_without_ray_the_error_names_the_extra(tmp_path):
    """Whether or not Ray is installed where the tests run."""
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('ray')\n")
    done = subprocess.run(
        [sys.executable, "-m", "tokasaurus.entry", "launcher=ray", "port=0"],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(filter(None, sys.path))}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "launcher=ray needs Ray; install it with pip install 'tokasaurus[ray]'" in done.stderr


def test_a_client_outside_of_the_cluster_is_told_to_go_there():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokasaurus[ray]'")
    assert ray is not None
    from tokasaurus.errors import ConfigError
    from tokasaurus.integrations.ray.launcher import connect

    with pytest.raises(ConfigError, match="on a node of the cluster"):
        connect(EngineConfig(launcher="ray", ray_address="ray://head:10001"))
