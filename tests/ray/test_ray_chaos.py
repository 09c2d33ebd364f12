"""Raylets are killed and stopped at random moments, under load."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import FLAGS, NUM_MOMENTS, Load, ask, is_whole, undisturbed
from engine_process import EngineProcess, eventually, running

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokasaurus[ray]'")

_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
NUM_REPLICAS = 2  # the cluster has three nodes, with room for one each


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    with running(tmp_path_factory.mktemp("one"), *FLAGS) as engine:
        yield undisturbed(engine)


def kill(cluster, chance: random.Random) -> None:
    """A machine is lost, and another one joins."""
    cluster.remove_node(chance.choice([*cluster.worker_nodes]), allow_graceful=False)
    cluster.add_node(**_NODE)


def stop(cluster, chance: random.Random) -> None:
    """A raylet hangs for a while: shorter or longer than the cluster is patient."""
    node = chance.choice([*cluster.worker_nodes])
    (raylet,) = node.all_processes["raylet"]
    raylet.process.send_signal(signal.SIGSTOP)
    time.sleep(chance.choice([0.5, 3.0, 8.0]))
    raylet.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("strike", [kill, stop])
@pytest.mark.timeout(1200)
def test_every_request_is_answered_once_whatever_happens_to_raylets(
    cluster, tmp_path: Path, expected: list[list[str]], strike
) -> None:
    chance = random.Random(strike.__name__)
    flags = (*FLAGS, "launcher=ray", f"ray_address={cluster.address}", f"dp_size={NUM_REPLICAS}")
    engine = EngineProcess(tmp_path / "toka.log", *flags)
    try:
        engine.wait_ready()
        load = Load(engine, expected)
        try:
            for moment in range(NUM_MOMENTS):
                time.sleep(chance.uniform(0.0, 3.0))
                strike(cluster, chance)
                eventually(
                    lambda: is_whole(engine, NUM_REPLICAS), f"{moment}: the engine heals", 120
                )
        finally:
            load.end()
        load.check()
        assert ask(engine, 1) == expected[1]
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit(30) == 0
    finally:
        engine.stop()
