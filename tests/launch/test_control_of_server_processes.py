"""Weights, pauses, memory and receipts of an engine whose port several processes share.

What is done through one process holds for requests of the others, and for a process that starts
afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_process import EngineProcess, eventually, running
from http_connections import Connection, one_to_each
from safetensors.torch import load_file, save, save_file

from tokasaurus.demo import MODEL_DIR
from tokasaurus.launch.verify import main as verify

pytestmark = [pytest.mark.engine, pytest.mark.long]

FLAGS = (
    "server_processes=2",
    "max_seqs_per_forward=8",
    "max_tokens_per_forward=64",
    "kv_cache_num_tokens=16384",
    "cpu_threads=1",
    "shutdown_timeout_s=600",
)
GENERATE = "/v1/completions"
UPDATES = "/v1/weights/updates"
BODY = {"prompt": "A B C D", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
LONG = {**BODY, "max_tokens": 1900, "n": 4, "return_weights_versions": True}
ASKED = {**BODY, "logprobs": 1, "seed": 5, "receipt": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with running(tmp_path_factory.mktemp("engine"), *FLAGS) as process:
        yield process


@pytest.fixture
def two(engine: EngineProcess) -> Iterator[list[Connection]]:
    connections = one_to_each(engine, 2)
    yield connections
    for connection in connections:
        connection.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Other weights for the bundled model."""
    torch.manual_seed(3)
    tensors = load_file(MODEL_DIR / "model.safetensors")
    changed = {
        name: tensor + (0.3 * tensor.float().std() * torch.randn(tensor.shape)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def figure(engine: EngineProcess, name: str) -> float:
    return engine.metrics().get(name, 0.0)


def in_flight(engine: EngineProcess, number: int) -> None:
    eventually(lambda: figure(engine, "prompts_in_flight") == number, f"{number} are in flight")


def text(connection: Connection) -> str:
    status, answer = connection.ask(GENERATE, BODY)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def receipt(connection: Connection) -> dict:
    status, answer = connection.ask(GENERATE, ASKED)
    assert status == 200, answer
    assert "void" not in answer["receipt"], answer["receipt"]
    return answer["receipt"]


def in_place_of(engine: EngineProcess, connection: Connection) -> Connection:
    """Kills the process of a connection; returns a connection to the one that is started anew."""
    known = {each.process for each in one_to_each(engine, 2)}
    os.kill(engine.child(connection.process), signal.SIGKILL)
    connection.close()
    found: list[Connection] = []

    def is_back() -> bool:
        found.append(Connection(engine))
        return found[-1].process not in known

    eventually(is_back, "another process has taken its place")
    for other in found[:-1]:
        other.close()
    return found[-1]


def put(connections: list[Connection], tensors: dict[str, torch.Tensor]) -> str:
    """Sends an update, a bucket through each connection; returns its id."""
    update = connections[0].ask(UPDATES)[1]["id"]
    for number, connection in enumerate(connections):
        names = sorted(tensors)[number :: len(connections)]
        data = save({name: tensors[name] for name in names})
        checksum = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
        path = f"PUT {UPDATES}/{update}/buckets/{number}"
        status, answer = connection.ask(path, data, **checksum)
        assert status == 200, answer
    return update


def test_new_weights_and_receipts_are_those_of_the_engine(engine, two, checkpoint, tmp_path):
    first, second = two
    before = receipt(first)
    assert receipt(second)["digest"] == before["digest"]
    # From a directory, through one process, while a request of the other runs.
    second.begin(GENERATE, {**LONG, "receipt": True})
    in_flight(engine, 1)
    eventually(lambda: figure(engine, "running_sequences") == 4, "it runs")
    body = {"model_path": str(checkpoint), "weight_version": "spring"}
    status, done = first.ask("/update_weights_from_disk", body)
    assert (status, done["success"]) == (200, True)
    status, answer = second.end()
    assert status == 200
    for choice in answer["choices"]:
        runs = [(run["version"], run["label"]) for run in choice["weights_versions"]]
        assert runs == [(0, "default"), (1, "spring")]
        assert sum(run["num_tokens"] for run in choice["weights_versions"]) == 1900
    assert "weights of several versions drew its tokens: 0, 1" in answer["receipt"]["void"]
    after = receipt(first)
    assert after["model"]["weights"] != before["model"]["weights"]
    assert receipt(second)["digest"] == after["digest"]
    # In buckets, of which each process gets one; the last ones count.
    tensors = load_file(MODEL_DIR / "model.safetensors")
    update = put(two, tensors)
    status, done = second.ask(f"{UPDATES}/{update}/commit", {"num_buckets": 2})
    assert (status, done["weights_version"]) == (200, 2), done
    again = receipt(second)
    assert again["model"]["weights"] == before["model"]["weights"]
    assert again["answer"] == before["answer"]
    # A process that starts now has heard of no update.
    new = in_place_of(engine, first)
    assert receipt(new)["digest"] == again["digest"]
    assert new.ask("/generate", {"text": "A"})[1]["meta_info"]["weight_version"] == "2"
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(again))
    assert verify([str(path), f"url={engine.url}"]) == 0
    new.close()


def test_a_pause_holds_requests_of_all_processes_also_of_one_that_starts_meanwhile(engine, two):
    first, second = two
    expected = text(first)
    long = first.ask(GENERATE, LONG)[1]["choices"]
    second.begin(GENERATE, LONG)
    eventually(lambda: figure(engine, "running_sequences") == 4, "it runs")
    assert first.ask("/pause?mode=keep")[0] == 200
    new = in_place_of(engine, first)
    new.begin(GENERATE, BODY)
    in_flight(engine, 2)
    tokens = figure(engine, "generated_tokens_total")
    third = Connection(engine)
    assert third.ask("/v1/embeddings/nothing")[0] in (404, 405)  # others are answered
    time.sleep(0.3)
    assert (figure(engine, "generated_tokens_total"), figure(engine, "paused")) == (tokens, 1)
    assert third.ask("/resume")[0] == 200
    assert new.end()[1]["choices"][0]["text"] == expected
    answered = second.end()[1]["choices"]
    assert [each["text"] for each in answered] == [each["text"] for each in long]
    for connection in (new, third):
        connection.close()


def test_a_pause_ends_or_waits_for_the_requests_of_other_processes(engine, two):
    first, second = two
    second.begin(GENERATE, {**LONG, "n": 8})
    eventually(lambda: figure(engine, "running_sequences") == 8, "it runs")
    assert first.ask("/pause?mode=abort")[0] == 200
    status, answer = second.end()
    assert status == 200
    assert {each["finish_reason"] for each in answer["choices"]} == {"abort"}
    assert second.ask("/resume")[0] == 200
    second.begin(GENERATE, LONG)
    eventually(lambda: figure(engine, "running_sequences") == 4, "it runs")
    assert first.ask("/pause?mode=wait")[0] == 200
    status, answer = second.end()
    assert {each["finish_reason"] for each in answer["choices"]} == {"length"}
    assert second.ask("/resume")[0] == 200


def test_released_memory_is_restored_through_another_process(engine, two):
    first, second = two
    expected = [text(connection) for connection in two]
    assert first.ask("/sleep?level=1")[0] == 200
    new = in_place_of(engine, first)
    for connection in (new, second):
        connection.begin(GENERATE, BODY)
    in_flight(engine, 2)
    third = Connection(engine)
    assert third.ask("/wake_up")[0] == 200
    answers = [connection.end()[1]["choices"][0]["text"] for connection in (new, second)]
    assert answers == expected
    for connection in (new, third):
        connection.close()
