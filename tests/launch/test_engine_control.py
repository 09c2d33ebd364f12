"""Control of a real engine over HTTP: pauses, aborts, memory, and new weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from engine_process import EngineProcess, eventually, running
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.engine

ADMIN = "sk-admin"
PROMPT = {"prompt": "A B C D A B C D A B", "temperature": 0, "max_tokens": 8}
LONG = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "seed": 3, "n": 8}
UPDATES = "/v1/weights/updates"


def controlled(directory: Path) -> AbstractContextManager[EngineProcess]:
    key_file = directory / "admin"
    key_file.write_text(f"{ADMIN}\n")
    # A drain that does not end by itself would take longer than any test waits.
    flags = ("kv_cache_num_tokens=8192", "shutdown_timeout_s=600")
    return running(directory, f"admin_api_key_file={key_file}", *flags)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """For tests that leave it awake, with the weights of its model."""
    with controlled(tmp_path_factory.mktemp("engine")) as ready:
        yield ready


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """For a test that ends it or leaves other weights behind."""
    with controlled(tmp_path) as ready:
        yield ready


def ask(engine, line, body=None, key=ADMIN, **headers):
    """Status and JSON of a request such as "POST /pause"."""
    method, path = line.split(" ")
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    if method == "POST" and data is None:
        data = b""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
    request = urllib.request.Request(
        f"http://127.0.0.1:{engine.port}{path}", data, headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def text(engine):
    status, answer = ask(engine, "POST /v1/completions", PROMPT)
    assert status == 200, answer
    return answer["choices"][0]["text"]


class Stream:
    """A long request that has begun to answer; its events are read to the end when asked for."""

    def __init__(self, engine):
        body = json.dumps({**LONG, "stream": True, "return_weights_versions": True}).encode()
        url = f"http://127.0.0.1:{engine.port}/v1/completions"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        self._answer = urllib.request.urlopen(request, timeout=120)
        self._lines = [self._answer.readline()]

    def events(self):
        with self._answer:
            self._lines += self._answer.readlines()
        return [json.loads(each[6:]) for each in self._lines if each.startswith(b"data: {")]

    def choices(self):
        """The finish reason of each choice, and its runs of versions."""
        found = {}
        for choice in (event["choices"][0] for event in self.events()):
            one = found.setdefault(choice["index"], {"reason": None, "runs": []})
            one["reason"] = choice["finish_reason"]
            one["runs"] += choice["weights_versions"]
        return list(found.values())


def model_path(engine):
    return Path(ask(engine, "GET /model_info")[1]["model_path"])


@pytest.fixture
def other_weights(engine, tmp_path):
    """A checkpoint whose first token after PROMPT is another one; in two files."""
    tensors = load_file(model_path(engine) / "model.safetensors")
    rng = np.random.default_rng(1)
    changed = {
        name: tensor if "norm" in name else rng.permutation(tensor.ravel()).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
    directory = tmp_path / "other"
    directory.mkdir()
    names = sorted(changed)
    save_file({n: changed[n] for n in names[::2]}, directory / "one.safetensors")
    save_file({n: changed[n] for n in names[1::2]}, directory / "two.safetensors")
    return directory


def test_only_the_admin_key_controls(engine):
    assert ask(engine, "POST /pause", key="sk-other")[0] == 401
    assert ask(engine, "GET /is_paused") == (200, {"is_paused": False})


def test_requests_wait_while_the_engine_is_paused(engine):
    before = text(engine)
    stream = Stream(engine)
    assert ask(engine, "POST /pause?mode=keep") == (200, {"status": "paused"})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(text, engine)
        eventually(lambda: ask(engine, "GET /health")[1]["running"] == 2, "both are there")
        assert ask(engine, "GET /health")[1]["status"] == "ok"
        assert not waiting.done()
        assert ask(engine, "POST /resume") == (200, {"status": "resumed"})
        assert waiting.result() == before
    assert {choice["reason"] for choice in stream.choices()} == {"length"}


def test_a_pause_that_waits_lets_what_has_begun_finish(engine):
    stream = Stream(engine)
    assert ask(engine, "POST /pause?mode=wait") == (200, {"status": "paused"})
    assert {choice["reason"] for choice in stream.choices()} == {"length"}
    assert ask(engine, "POST /resume") == (200, {"status": "resumed"})


@pytest.mark.parametrize("path", ["/pause?mode=abort", "/abort_requests"])
def test_an_abort_answers_with_the_tokens_so_far(engine, path):
    streams = [Stream(engine) for _ in range(3)]
    assert ask(engine, f"POST {path}")[0] == 200
    choices = [choice for stream in streams for choice in stream.choices()]
    assert len(choices) == 24
    assert "abort" in {choice["reason"] for choice in choices}
    assert {choice["reason"] for choice in choices} <= {"abort", "length"}
    num_tokens = sum(run["num_tokens"] for choice in choices for run in choice["runs"])
    assert 0 < num_tokens < 24 * LONG["max_tokens"]
    if "pause" in path:
        assert ask(engine, "POST /resume")[0] == 200
    assert text(engine)


def test_memory_is_released_and_restored(engine):
    before = text(engine)
    assert ask(engine, "POST /sleep?level=1") == (200, {"status": "sleeping"})
    assert ask(engine, "POST /resume")[0] == 409
    assert ask(engine, "POST /wake_up?tags=weights") == (200, {"status": "sleeping"})
    assert ask(engine, "POST /wake_up") == (200, {"status": "awake"})
    assert text(engine) == before
    assert ask(engine, "POST /release_memory_occupation", {"tags": ["kv_cache"]})[0] == 200
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(text, engine)
        eventually(lambda: ask(engine, "GET /health")[1]["running"] == 1, "it waits")
        assert not waiting.done()
        assert ask(engine, "POST /resume_memory_occupation", {})[0] == 200
        assert waiting.result() == before


@pytest.mark.processes
@pytest.mark.parametrize("path", ["/pause?mode=keep", "/sleep?mode=keep", "/pause?mode=wait"])
def test_a_drain_does_not_wait_for_requests_that_a_pause_holds(own_engine, path):
    stream = Stream(own_engine)
    with ThreadPoolExecutor(1) as pool:
        assert ask(own_engine, f"POST {path}")[0] == 200
        held = pool.submit(ask, own_engine, "POST /v1/completions", PROMPT)
        num_held = 1 if "wait" in path else 2
        eventually(lambda: ask(own_engine, "GET /health")[1]["running"] == num_held, "they wait")
        own_engine.signal(signal.SIGTERM)
        assert own_engine.wait_exit() == 0
        status, answer = held.result()
    assert (status, "while it was paused" in answer["error"]["message"]) == (503, True)
    assert (
        f"{num_held} prompts did not finish, since the engine is paused or asleep" in own_engine.log
    )
    last = stream.events()[-1]
    assert "error" in last if "keep" in path else last["choices"][0]["finish_reason"] == "length"


def test_weights_that_diverged_do_not_end_the_engine(engine, other_weights):
    before = text(engine)
    original = {"model_path": str(model_path(engine))}
    for file in other_weights.glob("*.safetensors"):
        nan = {name: np.full_like(tensor, np.nan) for name, tensor in load_file(file).items()}
        save_file(nan, file)
    update = {"model_path": str(other_weights)}
    assert ask(engine, "POST /update_weights_from_disk", update)[0] == 200
    for sampling in ({}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.5}, {"temperature": 0}):
        request = {"prompt": "A B C", "max_tokens": 4, "ignore_eos": True, "logprobs": 1}
        status, answer = ask(engine, "POST /v1/completions", {**request, **sampling})
        assert status == 200, answer
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None] * 4
    assert ask(engine, "POST /update_weights_from_disk", original)[0] == 200
    assert text(engine) == before


@pytest.mark.processes
def test_an_engine_whose_weights_are_gone_says_so_and_shuts_down_at_once(own_engine, other_weights):
    update = {"model_path": str(other_weights)}
    assert ask(own_engine, "POST /update_weights_from_disk", update)[0] == 200
    for file in other_weights.glob("*.safetensors"):
        file.unlink()
    assert ask(own_engine, "POST /release_memory_occupation") == (200, {"status": "ok"})
    status, answer = ask(own_engine, "POST /resume_memory_occupation")
    assert (status, "wait for an update" in answer["message"]) == (200, True)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(ask, own_engine, "POST /v1/completions", PROMPT)
        eventually(lambda: ask(own_engine, "GET /health")[1]["running"] == 1, "it waits")
        own_engine.signal(signal.SIGTERM)
        assert own_engine.wait_exit() == 0
        assert held.result()[0] == 503


@pytest.mark.processes
def test_weights_from_disk_while_requests_run(own_engine, other_weights):
    before = text(own_engine)
    stream = Stream(own_engine)
    body = {"model_path": str(other_weights), "weight_version": "other"}
    status, updated = ask(own_engine, "POST /update_weights_from_disk", body)
    assert (status, updated["success"], updated["weight_version"]) == (200, True, "other")
    choices = stream.choices()
    labels = {(run["version"], run["label"]) for choice in choices for run in choice["runs"]}
    assert labels == {(0, "default"), (1, "other")}
    for choice in choices:
        versions = [run["version"] for run in choice["runs"]]
        assert versions == sorted(versions)
        assert sum(run["num_tokens"] for run in choice["runs"]) == LONG["max_tokens"]
    after = text(own_engine)
    assert after != before
    meta_info = ask(own_engine, "POST /generate", {"text": "hi"})[1]["meta_info"]
    assert meta_info["weight_version"] == "other"
    # Wrong weights change nothing.
    wrong = {"model_path": str(other_weights / "one.safetensors"), "weight_version": "wrong"}
    status, error = ask(own_engine, "POST /update_weights_from_disk", wrong)
    assert (status, error["error"]["param"]) == (400, "model_path"), error
    assert ask(own_engine, "GET /weight_info")[1] == {
        "weight_version": "other",
        "weights_version": 1,
    }
    assert text(own_engine) == after
    eventually(lambda: own_engine.metrics().get("weights_version") == 1, "it is counted")
    original = {"model_path": str(model_path(own_engine))}
    assert ask(own_engine, "POST /update_weights_from_disk", original)[0] == 200
    assert text(own_engine) == before
    # An update restores the weights of an engine that is asleep.
    assert ask(own_engine, "POST /sleep")[0] == 200
    assert ask(own_engine, "POST /update_weights_from_disk", body)[0] == 200
    assert ask(own_engine, "POST /wake_up") == (200, {"status": "awake"})
    assert text(own_engine) == after


def test_weights_over_http_survive_a_release_of_memory(engine, other_weights):
    before = text(engine)
    original = {"model_path": str(model_path(engine))}
    version = ask(engine, "GET /weight_info")[1]["weights_version"]
    update = ask(engine, f"POST {UPDATES}")[1]["id"]
    for number, name in enumerate(("one", "two")):
        data = (other_weights / f"{name}.safetensors").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        path = f"PUT {UPDATES}/{update}/buckets/{number}"
        assert ask(engine, path, data, **{"X-Checksum-SHA256": digest})[0] == 200
        assert ask(engine, path, data, **{"X-Checksum-SHA256": "0" * 64})[0] == 400
        if number == 0:
            status, error = ask(engine, f"POST {UPDATES}/{update}/commit", {"num_buckets": 1})
            assert status == 400, error
            assert text(engine) == before
    shutil.rmtree(other_weights)
    status, done = ask(engine, f"POST {UPDATES}/{update}/commit", {"num_buckets": 2})
    assert (status, done["status"], done["weights_version"]) == (200, "committed", version + 1)
    after = text(engine)
    assert after != before
    assert ask(engine, "POST /sleep")[0] == 200
    assert ask(engine, "POST /wake_up") == (200, {"status": "awake"})
    assert text(engine) == after
    assert ask(engine, "POST /update_weights_from_disk", original)[0] == 200
    assert text(engine) == before
