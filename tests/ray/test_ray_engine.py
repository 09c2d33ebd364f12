"""``launcher=ray``: replicas on the nodes of a cluster; when a node is lost, no request is."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from engine_process import EngineProcess, eventually

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokasaurus[ray]'")

FLAGS = (
    "launcher=ray",
    "device=cpu",
    "max_seqs_per_forward=16",
    "kv_cache_num_tokens=16384",
    "attention=reference",
)
REQUEST = {
    "model": "m",
    "prompt": "A B C D",
    "max_tokens": 300,
    "temperature": 0.0,
    "extra_body": {"ignore_eos": True},
}


def start(cluster, directory: Path, *flags: str) -> EngineProcess:
    address = f"ray_address={cluster.address}"
    return EngineProcess(directory / "toka.log", *FLAGS, address, *flags)


@pytest.fixture
def engine(cluster, tmp_path: Path) -> Iterator[EngineProcess]:
    made = start(cluster, tmp_path, "dp_size=2")
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


def whole(engine: EngineProcess, seed: int) -> list[str]:
    done = engine.client(timeout=120).completions.create(**REQUEST, n=6, seed=seed)
    return [choice.text for choice in done.choices]


def stream(engine: EngineProcess) -> str:
    chunks = engine.client(timeout=120).completions.create(**REQUEST, stream=True)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def nodes_of(engine: EngineProcess, cluster) -> dict[str, object]:
    """The node of each process, by its role: the raylet that has started its actor."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        children[int(path.parent.name)] = int(fields[1])
    raylets = {
        info[0].process.pid: node
        for node in cluster.list_all_nodes()
        for name, info in node.all_processes.items()
        if name == "raylet"
    }
    found = {}
    for name, pid in re.findall(r" (manager\S*|worker\S*)\s+process id (\d+)", engine.log):
        ancestor = int(pid)
        while ancestor not in raylets and ancestor > 1:
            ancestor = children.get(ancestor, 0)
        found[name] = raylets.get(ancestor)
    return found


def test_replicas_are_on_different_nodes_and_a_lost_node_loses_no_request(engine, cluster):
    nodes = nodes_of(engine, cluster)
    assert nodes["manager"] is nodes["worker"] is not None
    assert nodes["manager-1"] is nodes["worker-1-0"] is not None
    assert nodes["manager"] is not nodes["manager-1"]
    expected = [stream(engine), whole(engine, 9)]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, engine) for _ in range(4)]
        answers = [pool.submit(whole, engine, 9) for _ in range(4)]
        before = engine.metrics()["generated_tokens_total"]
        eventually(
            lambda: engine.metrics()["generated_tokens_total"] > before + 200, "both compute", 60
        )
        cluster.remove_node(nodes["manager-1"], allow_graceful=False)
        assert [each.result(120) for each in streams] == [expected[0]] * 4
        assert [each.result(120) for each in answers] == [expected[1]] * 4
    assert "lost the outpost" in engine.log
    assert "1 replica goes on" in engine.log
    assert engine.get("/health")[0] == 200
    # The replica moves to the node that has room.
    eventually(lambda: "replica 1 is ready again" in engine.log, "the replica is back", 90)
    now = nodes_of(engine, cluster)
    assert now["manager"] is nodes["manager"]
    assert now["manager-1"] is now["worker-1-0"] is not None
    assert now["manager-1"] not in (nodes["manager"], nodes["manager-1"])
    with ThreadPoolExecutor(8) as pool:  # more than one replica has seats for
        assert list(pool.map(partial(whole, engine), [9] * 8)) == [expected[1]] * 8
    engine.signal(signal.SIGTERM)
    assert engine.wait_exit(30) == 0


def test_stages_and_replicas_run_on_several_nodes(cluster, tmp_path):
    """No node has room for two workers, so the stages of the replica are on two."""
    engine = start(cluster, tmp_path, "pp_size=2")
    try:
        engine.wait_ready()
        nodes = nodes_of(engine, cluster)
        assert nodes["worker"] is not nodes["worker-0-1"]
        assert nodes["manager"] is nodes["worker"]
        assert len(set(whole(engine, 1))) == 1
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit(30) == 0
    finally:
        engine.stop()


def test_an_engine_that_has_no_room_says_what_it_needs_and_what_there_is(cluster, tmp_path):
    engine = start(cluster, tmp_path, "dp_size=5", "launch_timeout_s=3")
    assert engine.wait_exit(60) == 2
    assert "5 x 1 CPU are needed, each on one node; the cluster has room for 3" in engine.log
    engine.stop()


def test_a_killed_supervisor_leaves_nothing_on_the_nodes(engine, cluster):
    pids = [int(pid) for pid in re.findall(r"process id (\d+)", engine.log)]
    assert len(pids) == 5
    engine.process.kill()
    engine.process.wait()
    for pid in pids:
        path = Path(f"/proc/{pid}/cmdline")
        eventually(
            lambda path=path: not path.exists() or "tokasaurus" not in path.read_text(),
            f"process {pid} ends",
        )


def test_without_a_cluster_the_error_says_how_to_start_one(tmp_path):
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, "ray_address=127.0.0.1:1")
    assert engine.wait_exit(120) == 2
    assert "ray_address=127.0.0.1:1: no Ray cluster answers" in engine.log
    assert "ray start --head" in engine.log
    engine.stop()
