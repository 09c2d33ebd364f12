"""The table of sources in the guide for veRL, row by row, against a real engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from cartridge_hosts import Hub, Wandb, s3_server
from checkpoints import make_checkpoint
from engine_process import EngineProcess, running
from file_server import file_server
from text_cartridges import save_cartridge

pytestmark = pytest.mark.engine

IDS = [random.Random(5).randrange(256) for _ in range(30)]
N = 11
NAME = "hazyresearch/cartridge-wauoq23f"
FLAGS = ("kv_cache_num_tokens=1024", "max_seqs_per_forward=8", "cpu_threads=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", seed=3)


@pytest.fixture(scope="module")
def cartridge(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of the first N tokens."""
    return save_cartridge(
        model, IDS[:N], tmp_path_factory.mktemp("cartridge") / "cartridge.safetensors"
    ).read_bytes()


def ask(engine: EngineProcess, ids: list[int], **cartridge: object) -> httpx2.Response:
    body = {"prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    if cartridge:
        body["cartridges"] = [cartridge]
    path = "/custom/cartridge/completions" if cartridge else "/v1/completions"
    return httpx2.post(f"{engine.url}{path}", json=body, timeout=60)


def assert_is_behind_the_text(engine: EngineProcess, **cartridge: object) -> None:
    whole, answer = ask(engine, IDS), ask(engine, IDS[N:], **cartridge)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == whole.json()["choices"][0]["text"]
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert details["cartridge_tokens"] == N


def refused(answer: httpx2.Response) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "cartridges"), answer.text
    return error["message"]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Wandb]]:
    """The Hub and W&B, which the environment of an engine names."""
    with file_server() as first, file_server() as second:
        monkeypatch.setenv("HF_ENDPOINT", first.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("WANDB_BASE_URL", second.url)
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        yield Hub(first), Wandb(second)


@pytest.mark.long
def test_the_table_of_sources_is_true(hosts, model, cartridge, tmp_path):
    hub, wandb = hosts
    hub.put("cache-step4092.pt", cartridge)
    wandb.put(f"{NAME.partition('/')[0]}/cartridges/cartridge-wauoq23f", "cache_last.pt", cartridge)
    with running(tmp_path, *FLAGS, f"model={model}") as engine:
        # The directory for temporary files of this engine is not /tmp.
        path = engine.private / "cartridge.pt"
        path.write_bytes(cartridge)
        assert_is_behind_the_text(engine, id=str(path), source="local", force_redownload=True)
        for source in ("huggingface", "wandb"):
            assert_is_behind_the_text(engine, id=NAME, source=source)
            assert_is_behind_the_text(engine, id=NAME, source=source, force_redownload=True)
        assert_is_behind_the_text(engine, id=NAME)  # wandb is the default
        wandb.runs.clear()
        message = refused(ask(engine, IDS, id=NAME, source="wandb", force_redownload=True))
        assert "there is no run hazyresearch/cartridges/cartridge-wauoq23f" in message
        assert "no such file" in refused(ask(engine, IDS, id=f"{path}x", source="local"))
        hub.server.answers.clear()
        gone = ask(engine, IDS, id="hazyresearch/other", source="huggingface")
        assert "there is no repository hazyresearch/other" in refused(gone)
        assert_is_behind_the_text(engine, id=NAME, source="huggingface")


@pytest.mark.long
def test_a_host_that_cannot_be_reached_is_a_502_and_others_are_served(
    monkeypatch, model, cartridge, tmp_path
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with running(tmp_path, *FLAGS, f"model={model}") as engine:
        answer = ask(engine, IDS, id=NAME, source="huggingface")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "source_unavailable")
        assert f"cartridge '{NAME}' of source 'huggingface'" in error["message"]
        assert ask(engine, IDS).status_code == 200


@pytest.mark.s3
def test_the_row_of_s3_is_true(monkeypatch, model, cartridge, tmp_path):
    import boto3

    with s3_server() as url:
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="cartridge.pt", Body=cartridge)
        with running(tmp_path, *FLAGS, f"model={model}") as engine:
            assert_is_behind_the_text(engine, id="s3://bucket/cartridge.pt", source="s3")
            assert "there is no s3://bucket/other.pt" in refused(
                ask(engine, IDS, id="s3://bucket/other.pt", source="s3")
            )
