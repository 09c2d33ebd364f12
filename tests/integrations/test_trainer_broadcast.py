"""Weights that a trainer broadcasts to a real engine, and trainers that die, are silent, or lie."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_process import eventually, running
from file_server import Answer, file_server
from ports import held_port
from test_trainer_buckets import PROMPT, check_weights, noisy_model

from tokasaurus.client import Client, RetryPolicy
from tokasaurus.errors import ConfigError, Conflict, EngineError, RequestError
from tokasaurus.integrations.trainer import BroadcastSender, BucketSender
from tokasaurus.weights_groups import GroupPlace, WeightsGroup

pytestmark = [pytest.mark.engine, pytest.mark.processes]

FLAGS = ("dtype=float32", "kv_cache_num_tokens=4096", "cpu_threads=1")
TRAINER = Path(__file__).with_name("foreign_trainer.py")
NO_RETRY = RetryPolicy(max_retries=0)


@pytest.fixture
def sender(client):
    with BroadcastSender(client.base_url, bucket_bytes=1 << 20, timeout_s=10) as made:
        yield made


@pytest.fixture
def port():
    """Where a group meets."""
    with held_port() as held:
        yield held


def tokens(client):
    answer = client.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
    return answer.token_ids.tolist()


def foreign(client, checkpoint, mode):
    """What the engine answers a trainer that knows nothing of us; None if it died."""
    with held_port() as port:
        command = [sys.executable, TRAINER, client.base_url, checkpoint, mode, str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    if mode == "die":
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def saved(model, directory):
    model.save_pretrained(directory)
    return directory


def test_an_engine_runs_the_weights_that_a_trainer_broadcasts(client, sender, tmp_path):
    for step in (1, 2):
        model = noisy_model(step)
        before = client.weights.version().version
        assert sender.send(model.state_dict(), f"step-{step}") == [before + 1]
        version = client.weights.version()
        assert (version.version, version.label) == (before + 1, f"step-{step}")
        check_weights(client, model, tmp_path / str(step))


def test_a_trainer_written_for_sglang_needs_no_change(client, tmp_path):
    model = noisy_model(3)
    before = client.weights.version().version
    answers = foreign(client, saved(model, tmp_path / "model"), "send")
    assert [status for status, _ in answers] == [200] * 4
    assert [body.get("complete") for _, body in answers] == [None, False, False, True]
    assert client.weights.version().label == "foreign"
    assert client.weights.version().version == before + 1
    check_weights(client, model, tmp_path / "again")


def test_what_a_trainer_has_begun_ends_when_the_next_one_joins(client, tmp_path):
    client._loop.run(client._async.weights.start())  # it ends before it makes a group
    before = client.weights.version().version
    answers = foreign(client, saved(noisy_model(8), tmp_path / "model"), "send")
    assert [status for status, _ in answers] == [200] * 4
    assert answers[-1][1]["complete"]
    assert client.weights.version().version == before + 1


@pytest.mark.parametrize("mode", ["die", "silent", pytest.param("short", marks=pytest.mark.long)])
def test_a_trainer_that_fails_leaves_the_weights_as_they_were(client, sender, tmp_path, mode):
    version, expected = client.weights.version(), tokens(client)
    checkpoint = saved(noisy_model(4), tmp_path / "model")
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(foreign, client, checkpoint, mode)
        while not failing.done():  # requests do not wait for the trainer
            assert tokens(client) == expected
        answers = failing.result()
    if answers is not None:
        status, body = answers[-1]
        said = "has not come within" if mode == "silent" else "fewer bytes"
        assert (status, said in body["error"]["message"]) == (409, True), answers
    assert client.weights.version() == version
    model = noisy_model(5)
    sender.send(model.state_dict())
    check_weights(client, model, tmp_path / "next")


def test_nothing_waits_for_a_trainer_that_never_comes(client, port):
    expected = tokens(client)

    def join():
        place = {"first_rank": 1, "world_size": 2, "backend": "gloo", "timeout_s": 1.5}
        client._loop.run(client._async.weights.join_group("g", "127.0.0.1", port, **place))

    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        joining = pool.submit(join)
        num_answers = 0
        while not joining.done():
            assert tokens(client) == expected
            num_answers += 1
        assert time.monotonic() - started < 30
        assert num_answers > 1
        with pytest.raises(Conflict, match="no trainer listens at"):
            joining.result()


def test_a_trainer_may_take_the_place_of_one_that_is_silent(client, port, tmp_path):
    """With a group of the same name, while the engine still receives from the other one."""
    name, weights = "weight_update_group", client._async.weights
    place = {"first_rank": 1, "world_size": 2, "backend": "gloo", "timeout_s": 60}
    joining = client._loop.begin(weights.join_group(name, "127.0.0.1", port, **place))
    silent = WeightsGroup(GroupPlace(name, "127.0.0.1", port, 0, 2, "gloo"), 30)
    joining.result(30)
    tensors = (["model.norm.weight"], ["float32"], [[192]])
    receiving = client._loop.begin(weights.receive(name, *tensors, timeout_s=60))
    answers = foreign(client, saved(noisy_model(9), tmp_path / "model"), "send")
    assert [status for status, _ in answers] == [200] * 4, answers
    assert answers[-1][1]["complete"]
    with pytest.raises(Conflict, match="left meanwhile"):
        receiving.result(30)
    silent.close()


def test_an_engine_that_refuses_is_told_of_while_another_waits_for_it(client):
    with file_server() as other:
        other.answers |= {
            "/get_world_size": Answer.json({"world_size": 1}),
            "/init_weights_update_group": Answer.json({"error": {"message": "not here"}}, 409),
            "/destroy_weights_update_group": Answer.json({}),
        }
        urls = [client.base_url, other.url]
        with (
            BroadcastSender(urls, timeout_s=30) as sender,
            pytest.raises(Conflict, match="not here"),  # and not that ranks are missing
        ):
            sender.send(noisy_model(1).state_dict())
        # Nor does anything wait for them afterwards, which the end of the program would cut off.
        assert "weights-group" not in [each.name for each in threading.enumerate()]
    assert other.count("POST", "/destroy_weights_update_group") == 1


def test_a_group_whose_ranks_do_not_come_is_not_in_the_way_of_the_next():
    def make(name, world_size, listens=lambda port: None):
        place = GroupPlace(name, "127.0.0.1", 0, 0, world_size, "gloo")
        return WeightsGroup(place, 3.0, on_listening=listens)

    listening = Future()
    with ThreadPoolExecutor(1) as pool:
        lonely = pool.submit(make, "lonely", 2, listening.set_result)
        listening.result(20)
        group = make("next", 1)
        assert not lonely.done()
        with pytest.raises(EngineError, match="not all 2 ranks"):
            lonely.result()
        group.close()


LATE_RANK = """
import sys, time
from tokasaurus import weights_groups as groups

read = groups._WatchedStore.get

def read_late(self, key):
    time.sleep(0.5)
    return read(self, key)

groups._WatchedStore.get = read_late
groups.WeightsGroup(groups.GroupPlace("g", "127.0.0.1", int(sys.argv[1]), 1, 2, "gloo"), 30).close()
"""


def test_rank_0_keeps_the_store_for_ranks_that_still_read_from_it(port):
    late = subprocess.Popen([sys.executable, "-c", LATE_RANK, str(port)])
    group = WeightsGroup(GroupPlace("g", "127.0.0.1", port, 0, 2, "gloo"), 30)
    assert late.wait(60) == 0
    group.close()


def wrong_tensors(kind):
    tensors = dict(noisy_model(6).state_dict())
    norm = "model.norm.weight"
    if kind == "unknown":
        tensors["model.extra.weight"] = torch.ones(2)
    elif kind == "shape":
        tensors[norm] = torch.ones(3)
    elif kind == "dtype":
        tensors[norm] = tensors[norm].to(torch.int8)
    elif kind == "nan":
        tensors[norm] = torch.full_like(tensors[norm], torch.nan).view(torch.int32).fill_(-1)
        tensors[norm] = tensors[norm].view(torch.float32)
    else:
        del tensors[norm]
    return tensors


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("unknown", RequestError, r"does not use a tensor model\.extra\.weight"),
        ("shape", RequestError, r"model\.norm\.weight has shape \[3\]"),
        ("dtype", RequestError, r"model\.norm\.weight is torch\.int8"),
        ("nan", Conflict, "fewer bytes than it has announced, or NaN"),
        ("missing", Conflict, r"have not come: model\.norm\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(client, sender, kind, error, message):
    version, expected = client.weights.version(), tokens(client)
    with pytest.raises(error, match=message):
        sender.send(wrong_tensors(kind))
    assert client.weights.version() == version
    assert tokens(client) == expected
    sender.send(noisy_model(7).state_dict())
    assert client.weights.version().version == version.version + 1


def test_what_an_engine_says_comes_after_its_worker_has_left_the_group(monkeypatch):
    """Its answer goes through more processes than the end of the worker's connection."""

    class Left:
        def broadcast(self, tensor, timeout_s):
            raise EngineError("another rank is gone")

        def close(self):
            pass

    def refuse(question):
        time.sleep(0.3)
        return Answer.json({"error": {"message": "no such tensor"}}, 400)

    with file_server() as engine:
        for path in ("/start_weight_update", "/destroy_weights_update_group"):
            engine.answers[path] = Answer.json({})
        engine.answers["/update_weights_from_distributed"] = refuse
        with BroadcastSender(engine.url, retry=NO_RETRY) as sender:
            monkeypatch.setattr(sender, "_group", Left())
            with pytest.raises(RequestError, match="no such tensor"):
                sender.send({"x": torch.ones(2)})


def test_weights_of_a_trainer_are_gone_after_a_release_until_the_next_update(client, sender):
    sender.send(noisy_model(8).state_dict())
    expected = tokens(client)

    def control(path):
        call = client._async._post(path, {}, None)
        return client._loop.run(call)

    control("/release_memory_occupation")
    assert "wait for an update" in control("/resume_memory_occupation")["message"]
    sender.send(noisy_model(8).state_dict())
    assert tokens(client) == expected


def test_an_engine_that_is_not_there_and_arguments_that_are_wrong(port):
    with (
        BroadcastSender(f"http://127.0.0.1:{port}", retry=NO_RETRY) as sender,
        pytest.raises(EngineError, match="nothing answers"),
    ):
        sender.send(noisy_model(1).state_dict())
    with pytest.raises(ConfigError, match="backend='mpi'"):
        BroadcastSender("http://a", backend="mpi")


@pytest.mark.long
@pytest.mark.parametrize("shape", ["dp_size=2 tp_size=2", "pp_size=2"])
def test_workers_of_any_shape_take_their_parts(tmp_path, shape):
    with (
        running(tmp_path, *FLAGS, *shape.split()) as engine,
        Client(engine.url) as client,
        BroadcastSender(engine.url, bucket_bytes=1 << 20, timeout_s=30) as sender,
    ):
        for step in (1, 2):
            model = noisy_model(step)
            assert sender.send(model.state_dict()) == [step]
            for number in range(3):  # replicas take turns
                check_weights(client, model, tmp_path / f"{step}-{number}")


@pytest.mark.long
def test_a_replica_that_starts_again_waits_for_the_next_broadcast(tmp_path):
    with (
        running(tmp_path, *FLAGS, "dp_size=2") as engine,
        Client(engine.url) as client,
        BroadcastSender(engine.url, timeout_s=20) as sender,
    ):
        sender.send(noisy_model(1).state_dict())
        expected = tokens(client)
        os.kill(engine.child("worker-1-0"), signal.SIGKILL)
        eventually(lambda: "it waits for the next update" in engine.log, "a replica is back")
        for _ in range(4):
            assert tokens(client) == expected
        with pytest.raises((EngineError, RequestError)):
            sender.send(noisy_model(2).state_dict())
        assert tokens(client) == expected
        model = noisy_model(3)
        assert sender.send(model.state_dict())[0] >= 2
        eventually(lambda: "waiting for weights" not in engine.get("/server_info")[1], "it serves")
        for number in range(4):
            check_weights(client, model, tmp_path / str(number))


@pytest.mark.long
def test_a_trainer_that_is_silent_is_no_stall_and_delays_no_shutdown(port, tmp_path):
    with running(tmp_path, *FLAGS, "stall_timeout_s=1") as engine, Client(engine.url) as client:
        place = {"first_rank": 1, "world_size": 2, "backend": "gloo", "timeout_s": 60}
        join = client._async.weights.join_group("g", "127.0.0.1", port, **place)
        joining = client._loop.begin(join)
        group = WeightsGroup(GroupPlace("g", "127.0.0.1", port, 0, 2, "gloo"), 30)
        joining.result(30)
        tensors = (["model.norm.weight"], ["float32"], [[192]])
        receive = client._async.weights.receive("g", *tensors, timeout_s=60)
        receiving = client._loop.begin(receive)
        for _ in range(12):
            time.sleep(0.25)
            assert client.health().status == "ok"
        engine.signal(signal.SIGTERM)
        with pytest.raises(EngineError, match="shutting down"):
            receiving.result(30)
        assert engine.wait_exit(30) == 0
        group.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", [BroadcastSender, BucketSender])
def test_several_engines_get_the_same_weights(client, tmp_path, kind):
    (tmp_path / "other").mkdir()
    with (
        running(tmp_path / "other", *FLAGS, "tp_size=2") as engine,
        Client(engine.url) as other,
        kind([client.base_url, engine.url], bucket_bytes=1 << 20, timeout_s=30) as sender,
    ):
        for step in (1, 2):
            model = noisy_model(step)
            before = client.weights.version().version
            assert sender.send(model.state_dict(), f"both-{step}") == [before + 1, step]
            for number, each in enumerate((client, other)):
                assert each.weights.version().label == f"both-{step}"
                check_weights(each, model, tmp_path / f"{step}-{number}")
        # What one refuses, none gets.
        expected = [tokens(each) for each in (client, other)]
        with pytest.raises((RequestError, Conflict)):
            sender.send(wrong_tensors("missing"))
        assert [tokens(each) for each in (client, other)] == expected
        sender.send(noisy_model(3).state_dict())
