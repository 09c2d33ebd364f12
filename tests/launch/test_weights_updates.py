"""New weights while requests run, with eight batches in flight: transformers judges each token."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from engine_process import EngineProcess, eventually
from oracle import reference_logits
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.engine, pytest.mark.processes]

PROGRAM = (sys.executable, Path(__file__).parents[1] / "engine_variants.py", "all_steps_ahead")
FLAGS = ("scheduling_steps_ahead=8", "kv_cache_num_tokens=16384", "dtype=float32", "cpu_threads=1")
# Logprobs of the same weights differ by less, since transformers rounds differently; those of other
# weights differ by more.
TOLERANCE = 1e-3
NUM_STREAMS = 10
# Enough for three weights, however fast tokens are drawn while weights are replaced. One of several
# replicas may be far ahead of another.
NUM_TOKENS = 1600 if "dp_size" in os.environ.get("OVERRIDES", "") else 800


@dataclass
class Stream:
    """A request, its tokens, their logprobs, and the version of the weights that drew each."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def read(self, engine: EngineProcess) -> None:
        body = {
            "prompt": self.prompt_ids,
            "temperature": 1,
            "logprobs": 0,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "return_weights_versions": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{engine.port}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))

    def _take(self, piece: dict) -> None:
        self.token_ids += piece["output_ids"]
        self.logprobs += piece["logprobs"]["token_logprobs"]
        for run in piece["weights_versions"]:
            self.versions += [run["version"]] * run["num_tokens"]
        self.finish_reason = piece["finish_reason"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path / "toka.log", *FLAGS, program=PROGRAM)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


@pytest.fixture
def checkpoints(engine: EngineProcess, tmp_path: Path) -> list[Path]:
    """The model that the engine starts with, and two others of the same shape."""
    original = Path(ask(engine, "GET", "/model_info")[1]["model_path"])
    paths = [original]
    for seed in (1, 2):
        path = tmp_path / f"weights-{seed}"
        shutil.copytree(original, path)
        torch.manual_seed(seed)
        tensors = load_file(original / "model.safetensors")
        changed = {
            name: tensor + 0.3 * tensor.float().std().to(tensor.dtype) * torch.randn_like(tensor)
            for name, tensor in tensors.items()
        }
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths


def ask(engine: EngineProcess, method: str, path: str, body: object = None, **headers: str):
    """Status and JSON of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    data = None if method == "GET" else data
    headers = {"Content-Type": "application/json", **headers}
    url = f"http://127.0.0.1:{engine.port}{path}"
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def put_half(engine: EngineProcess, checkpoint: Path) -> None:
    """An update of which only some tensors arrive: it is refused as a whole."""
    tensors = load_file(checkpoint / "model.safetensors")
    half = dict(list(tensors.items())[::2])
    update = put(engine, {"0": half}, checkpoint.parent)
    status, error = ask(engine, "POST", f"/v1/weights/updates/{update}/commit", {"num_buckets": 1})
    assert status == 400, error
    assert ask(engine, "DELETE", f"/v1/weights/updates/{update}")[0] in (200, 404)


def put_whole(engine: EngineProcess, checkpoint: Path) -> int:
    """An update in two buckets; returns the version of the weights."""
    tensors = list(load_file(checkpoint / "model.safetensors").items())
    buckets = {"0": dict(tensors[::2]), "1": dict(tensors[1::2])}
    update = put(engine, buckets, checkpoint.parent)
    status, done = ask(engine, "POST", f"/v1/weights/updates/{update}/commit", {"num_buckets": 2})
    assert status == 200, done
    return done["weights_version"]


def put(engine: EngineProcess, buckets: dict[str, dict], directory: Path) -> str:
    update = ask(engine, "POST", "/v1/weights/updates")[1]["id"]
    for number, tensors in buckets.items():
        file = directory / "bucket.safetensors"
        save_file(tensors, file)
        data = file.read_bytes()
        checksum = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
        status, answer = ask(
            engine, "PUT", f"/v1/weights/updates/{update}/buckets/{number}", data, **checksum
        )
        assert status == 200, answer
    return update


def num_wrong(checkpoint: Path, stream: Stream, positions: list[int]) -> int:
    """Tokens at these positions to which the checkpoint gives another logprob."""
    logits = reference_logits(checkpoint, stream.prompt_ids, stream.token_ids)[positions]
    chosen = torch.tensor(stream.token_ids)[positions, None]
    expected = logits.log_softmax(dim=-1).gather(1, chosen)[:, 0]
    differs = (torch.tensor(stream.logprobs)[positions] - expected).abs() > TOLERANCE
    return int(differs.sum())


def test_each_token_comes_from_the_weights_that_its_version_names(engine, checkpoints):
    streams = [Stream([20 + number, 30, 40 + 2 * number]) for number in range(NUM_STREAMS)]

    def has(num_tokens: int, version: int) -> bool:
        return min(stream.versions.count(version) for stream in streams) >= num_tokens

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        reading = [pool.submit(stream.read, engine) for stream in streams]
        eventually(lambda: has(50, 0), "the first weights draw tokens")
        status, done = ask(
            engine, "POST", "/update_weights_from_disk", {"model_path": str(checkpoints[1])}
        )
        assert (status, done["success"]) == (200, True)
        eventually(lambda: has(30, 1), "the second weights draw tokens")
        put_half(engine, checkpoints[2])
        eventually(lambda: has(50, 1), "they still do after an update that was refused")
        assert put_whole(engine, checkpoints[2]) == 2
        for each in reading:
            each.result()
    judged = dict.fromkeys(range(3), 0)
    told_apart = dict.fromkeys(range(3), 0)
    for stream in streams:
        assert stream.finish_reason == "length"
        assert len(stream.token_ids) == len(stream.versions) == NUM_TOKENS
        assert stream.versions == sorted(stream.versions)
        for version in range(3):
            positions = [at for at, each in enumerate(stream.versions) if each == version]
            assert num_wrong(checkpoints[version], stream, positions) == 0, version
            judged[version] += len(positions)
            told_apart[version] += num_wrong(checkpoints[version - 1], stream, positions)
    for version, count in judged.items():
        assert count >= 50 * NUM_STREAMS or (version == 2 and count > 0), judged
        # The judge can tell: other weights give other logprobs. A tenth of the tokens or so is
        # certain under all weights, and the last weights may have drawn only a few tokens.
        assert told_apart[version] > 0.7 * count - 3, (judged, told_apart)
