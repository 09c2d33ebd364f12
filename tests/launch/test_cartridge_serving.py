"""Cartridges over HTTP with real processes: two replicas behind two HTTP processes, and batches."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from checkpoints import make_checkpoint
from engine_process import EngineProcess, eventually, running
from text_cartridges import save_cartridge

pytestmark = [pytest.mark.engine, pytest.mark.long]

IDS = [random.Random(7).randrange(256) for _ in range(40)]
N = 21  # not a whole number of pages
BODY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 3}
FLAGS = (
    "max_seqs_per_forward=8",
    "kv_cache_num_tokens=2048",
    "page_size=16",
    "cpu_threads=1",
    "attention=compiled",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return make_checkpoint(directory, "llama", seed=3, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    directory = tmp_path_factory.mktemp("engine")
    flags = (*FLAGS, f"model={model}", "server_processes=2", "dp_size=2")
    with running(directory, *flags) as process:
        yield process


@pytest.fixture
def files(engine: EngineProcess) -> Path:
    """The directory of the engine's cartridges."""
    return engine.log_path.parent / "cartridges"


def post(engine: EngineProcess, path: str, **body: object) -> dict:
    """Over a connection of its own, which any of the processes takes."""
    answer = httpx.post(f"{engine.url}{path}", json={**BODY, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def behind(engine: EngineProcess, ids: list[int], name: str, **body: object) -> dict:
    named = {"id": name, "source": "local", "force_redownload": True}
    return post(engine, "/v1/completions", prompt=ids, cartridges=[named], **body)


def assert_alike(got: dict, expected: dict) -> None:
    for one, other in zip(got["choices"], expected["choices"], strict=True):
        assert one["text"] == other["text"]
        pairs = zip(
            one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], strict=True
        )
        assert all(abs(a - b) < 1e-5 for a, b in pairs)


def listed(engine: EngineProcess) -> dict[str, dict]:
    entries = httpx.get(f"{engine.url}/v1/cartridges").json()["data"]
    return {each["id"]: each for each in entries}


def num_users(engine: EngineProcess) -> int:
    return sum(each["users"] for each in listed(engine).values())


def test_every_process_answers_behind_a_cartridge_as_behind_its_text(engine, files, model):
    save_cartridge(model, IDS[:N], files / "text.safetensors")
    whole = post(engine, "/v1/completions", prompt=IDS)
    for _ in range(12):
        answer = behind(engine, IDS[N:], "text.safetensors")
        assert_alike(answer, whole)
        details = answer["usage"]["prompt_tokens_details"]
        assert details["cartridge_tokens"] == N
    # As veRL's configuration has it: a trainer's file among the temporary ones.
    path = save_cartridge(model, IDS[:N], engine.private / "cartridge.pt")
    assert_alike(behind(engine, IDS[N:], str(path)), whole)
    stream = {"prompt": IDS[N:], "cartridges": [{"id": "text.safetensors", "source": "local"}]}
    with httpx.stream(
        "POST",
        f"{engine.url}/custom/cartridge/completions",
        json={**BODY, **stream, "stream": True},
    ) as answer:
        events = [
            json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")
        ]
    assert "".join(each["choices"][0]["text"] for each in events) == whole["choices"][0]["text"]
    refused = httpx.post(
        f"{engine.url}/v1/completions",
        json={"prompt": "a", "cartridges": [{"id": "nothing", "source": "local"}]},
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cartridges")
    assert num_users(engine) == 0


def test_a_changed_file_changes_the_answers_of_every_process(engine, files, model):
    """Requests in flight finish on the version that they began with."""
    path = save_cartridge(model, IDS[:N], files / "changing.safetensors")
    whole = post(engine, "/v1/completions", prompt=IDS)
    long = {"max_tokens": 300, "logprobs": None}
    expected = post(engine, "/v1/completions", prompt=IDS, **long)["choices"]
    answers: list[dict] = []
    asking = [
        threading.Thread(target=lambda: answers.append(behind(engine, IDS[N:], path.name, **long)))
        for _ in range(6)
    ]
    for each in asking:
        each.start()
    eventually(lambda: num_users(engine) > 0, "requests use it")
    save_cartridge(model, IDS[:8], path)
    for _ in range(6):
        assert_alike(behind(engine, IDS[8:], path.name), whole)
    for each in asking:
        each.join()
    assert len(answers) == 6
    for answer in answers:
        assert answer["usage"]["prompt_tokens_details"]["cartridge_tokens"] in (N, 8)
        if answer["usage"]["prompt_tokens_details"]["cartridge_tokens"] == N:
            assert answer["choices"][0]["text"] == expected[0]["text"]
    eventually(lambda: len(listed(engine)[path.name]["versions"]) == 1, "the old version goes")


def test_an_http_process_that_is_killed_leaves_no_cartridge_in_use(engine, files, model):
    save_cartridge(model, IDS[:N], files / "left.safetensors")
    long = {"max_tokens": 480, "n": 16, "logprobs": None}

    def ask() -> None:
        try:
            behind(engine, [65] * 3, "left.safetensors", **long)
        except httpx.HTTPError:
            ended.append(True)

    ended: list[bool] = []
    asking = [threading.Thread(target=ask) for _ in range(6)]
    for each in asking:
        each.start()
    eventually(lambda: num_users(engine) > 0, "requests use it")
    os.kill(engine.child("http-1"), signal.SIGKILL)
    os.kill(engine.child("http-2"), signal.SIGKILL)
    for each in asking:
        each.join()
    assert ended
    eventually(lambda: engine.get("/health")[0] == 200, "they are started again")
    eventually(lambda: num_users(engine) == 0, "nothing uses it any more")
    whole = post(engine, "/v1/completions", prompt=IDS)
    assert_alike(behind(engine, IDS[N:], "left.safetensors"), whole)


def test_requests_of_a_lost_replica_go_on_behind_their_cartridge(engine, files, model):
    """The replica that is started again knows the cartridge without being asked."""
    save_cartridge(model, IDS[:N], files / "moving.safetensors")
    long = {"max_tokens": 450, "logprobs": None}
    expected = post(engine, "/v1/completions", prompt=IDS, **long)["choices"][0]["text"]
    answers: list[dict] = []
    asking = [
        threading.Thread(
            target=lambda: answers.append(
                behind(engine, IDS[N:], "moving.safetensors", n=6, **long)
            )
        )
        for _ in range(8)
    ]
    for each in asking:
        each.start()
    eventually(lambda: num_users(engine) == 8, "requests run")
    os.kill(engine.child("worker"), signal.SIGKILL)
    for each in asking:
        each.join()
    assert len(answers) == 8
    assert {choice["text"] for each in answers for choice in each["choices"]} == {expected}
    eventually(lambda: engine.metrics().get('replica_up{replica="0"}') == 1, "it is back")
    several = behind(engine, IDS[N:], "moving.safetensors", n=12, **long)
    assert {choice["text"] for choice in several["choices"]} == {expected}
    eventually(
        lambda: listed(engine)["moving.safetensors"]["versions"][0]["residence"]["device"] == 2,
        "both replicas have it",
    )


def test_uploads_are_for_all_processes_and_batches(engine, model, tmp_path):
    data = save_cartridge(model, IDS[:N], tmp_path / "upload.safetensors").read_bytes()
    for _ in range(3):
        answer = httpx.post(
            f"{engine.url}/v1/cartridges", files={"file": ("a", data)}, data={"name": "uploaded"}
        )
        assert answer.status_code == 200, answer.text
    whole = post(engine, "/v1/completions", prompt=IDS)
    for _ in range(6):
        assert_alike(behind(engine, IDS[N:], "uploaded"), whole)
    client = engine.client()
    named = [{"id": "uploaded", "source": "local"}]
    lines = [
        {
            "custom_id": url,
            "method": "POST",
            "url": url,
            "body": {**BODY, "prompt": IDS[N:], "cartridges": named},
        }
        for url in ("/v1/completions", "/custom/cartridge/completions")
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", io.BytesIO(text)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    eventually(
        lambda: (
            client.batches.retrieve(batch.id).status
            not in ("validating", "in_progress", "finalizing")
        ),
        "the batch ends",
    )
    batch = client.batches.retrieve(batch.id)
    print(batch)
    for line in client.files.content(batch.output_file_id).text.splitlines():
        assert_alike(json.loads(line)["response"]["body"], whole)
    deleted = httpx.delete(f"{engine.url}/v1/cartridges/uploaded")
    assert deleted.json()["deleted"]
    assert "uploaded" not in listed(engine)


def test_lines_of_toka_batch_have_cartridges(model, tmp_path):
    path = save_cartridge(model, IDS[:N], tmp_path / "cartridges" / "text.safetensors")
    named = [{"id": path.name, "source": "local"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [
        {**BODY, "prompt": IDS},
        {**BODY, "prompt": IDS[N:], "cartridges": named},
        {**BODY, "prompt": IDS[N:], "cartridges": [{"id": "nothing", "source": "local"}]},
    ]
    source.write_text("\n".join(map(json.dumps, bodies)))
    flags = (*FLAGS, f"model={model}", f"cartridge_dir={path.parent}", f"data_dir={tmp_path}/data")
    subprocess.run(
        [sys.executable, "-m", "tokasaurus.launch.batch_run", "run", source, target, *flags],
        check=True,
        timeout=120,
    )
    whole, behind_it, wrong = (json.loads(line) for line in target.read_text().splitlines())
    assert_alike(behind_it["response"]["body"], whole["response"]["body"])
    assert wrong["response"]["body"]["error"]["param"] == "cartridges"
