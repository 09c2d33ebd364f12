"""The language model with a real engine: both protocols, logprobs, cartridges, the program."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ports import held_port
from text_cartridges import save_cartridge

import tokasaurus.client.lm
from tokasaurus.client.lm import TokasaurusClient, call_log, get_lm_client
from tokasaurus.client.lm.run import main
from tokasaurus.demo import MODEL_DIR

pytestmark = pytest.mark.engine

PACKAGE = Path(tokasaurus.client.lm.__file__).parent
PAIRS = [
    ("", "What is 3 + 4?"),
    ("You know dinosaurs.", "What did Triceratops eat?"),
    ("Say hello.", "tell me a joke"),
]


@pytest.fixture(autouse=True)
def _no_directory_of_logs(monkeypatch):
    monkeypatch.setattr(call_log, "_base", None)


def client_of(engine, **keys) -> TokasaurusClient:
    fields = {"model": "toka:tokasaurus-demo", "base_url": engine.url, "temperature": 0.0}
    return get_lm_client({**fields, "stop_sequences": [], "on_failure": "raise", **keys})


def test_the_protocols_give_the_same_texts(engine):
    with client_of(engine) as one, client_of(engine, protocol="toka") as other:
        texts = one.call_many(PAIRS)
        assert other.call_many(PAIRS) == texts
        assert "Answer: 7" in texts[0]
        assert one.totals.model_dump(exclude={"duration"}) == other.totals.model_dump(
            exclude={"duration"}
        )


def test_stop_sequences_end_answers(engine):
    for protocol in ("openai", "toka"):
        with client_of(engine, protocol=protocol, stop_sequences=["Answer"]) as lm:
            text = lm.call("", "What is 3 + 4?")
            assert text.startswith("3 + 4 = 7.")
            assert "Answer" not in text


def test_both_protocols_give_the_same_arrays(engine):
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    replies = []
    for protocol in ("openai", "toka"):
        with client_of(engine, protocol=protocol, top_logprobs=3) as lm:
            replies.append(lm.call(messages))
    one, other = replies
    assert one["output_ids"] == other["output_ids"]
    assert one["topk_token_ids"].shape == (len(one["output_ids"]), 3)
    assert one["topk_token_ids"][:, 0].tolist() == one["output_ids"]  # temperature 0
    for name in ("logprobs", "topk_logprobs", "topk_token_ids"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-4)
        assert one[name].dtype == other[name].dtype
    with client_of(engine) as lm:
        reply = lm.call(messages)
        assert (reply["output_ids"], reply["logprobs"]) == (one["output_ids"], None)


def test_cartridges_come_before_conversations(engine):
    """Behind the KV of a text, both protocols see the text."""
    ids = [random.Random(3).randrange(7, 2048) for _ in range(21)]
    save_cartridge(MODEL_DIR, ids, engine.log_path.parent / "cartridges" / "lm.safetensors")
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    replies = []
    for protocol in ("openai", "toka"):
        with client_of(engine, protocol=protocol, top_logprobs=0, max_output_tokens=20) as lm:
            lm.config.on_truncation = "return"
            plain = lm.call(messages)
            replies.append(lm.call(messages, ["lm.safetensors"]))
            assert replies[-1]["logprobs"].tolist() != plain["logprobs"].tolist()
            assert replies[-1]["topk_logprobs"] is None
            lm.config.cartridges = ["lm.safetensors"]
            assert lm.call("", "What is 3 + 4?") != ""
            assert lm.call(messages)["output_ids"] == replies[-1]["output_ids"]
    assert replies[0]["output_ids"] == replies[1]["output_ids"]


def test_an_error_of_the_engine_is_named(engine):
    with client_of(engine, on_failure="return_empty", extra_body={"temprature": 1}) as lm:
        assert lm.call("", "hello") == ""
        assert (lm.totals.failures, lm.totals.retries) == (1, 0)


def test_the_shipped_configurations_run(engine, tmp_path, monkeypatch, capsys):
    """From a directory without them, so they are the package's."""
    monkeypatch.chdir(tmp_path)
    address = f"agent.lm_config.base_url={engine.url}/v1"
    program = ("--config", "configs/memoryless_toka_demo.yaml", address)
    for protocol in ("openai", "toka"):
        given = (f"agent.lm_config.protocol={protocol}", "evaluation.limit=20")
        assert main([*program, *given, "results_dir=results"]) == 0
        printed = capsys.readouterr()
        assert "100.0%" in printed.out, printed.out
        assert "20/20" in printed.err
        lines = list(map(json.loads, Path("results/results.jsonl").read_text().splitlines()))
        assert [line["index"] for line in lines] == list(range(20))
        assert all(line["is_right"] for line in lines)
    assert not Path("results/llm_calls").exists()

    given = (address, "evaluation.limit=3", "results_dir=finer")
    assert main(["--config=configs/finer/memoryless_toka_llama3b.yaml", *given]) in (0, 1)
    calls = sorted(Path("finer/llm_calls/validation/val_0/actions").glob("*.json"))
    assert len(calls) == 3
    entry = json.loads(calls[0].read_text())
    assert "XBRL" in entry["system_prompt"]
    assert entry["context"]["call_type"] == "action"
    assert set(entry["extra"]) in ({"metrics"}, {"error"})


def test_what_is_wrong_with_a_configuration_is_named(engine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = "config=configs/memoryless_toka_demo.yaml"
    cases = [
        (["config=missing.yaml"], "missing.yaml"),
        ([], "agent is required"),
        ([demo, "agent.lm_config.stop_sequence=x"], "did you mean 'stop_sequences'"),
        ([demo, "agent.lm_config.temperature=-1"], "agent.lm_config.temperature"),
        ([demo, "agent.lm_config.model=gpt-4"], "toka:"),
        ([demo, "agent.type=react"], "memoryless_agent"),
        ([demo, "agent.memory=x"], "agent.memory"),
        ([demo, "evaluation.data=missing.jsonl"], "dinosaurs.jsonl, finer.jsonl"),
        ([demo, "evaluation.dat=x"], "the nearest is 'data'"),
        ([demo, "evaluation.prompt=hello"], "{question}"),
        ([demo, "launch=T", f"agent.lm_config.base_url={engine.url}"], "leave launch out"),
        ([demo, "launch=T", "agent.lm_config.base_url=http://example.org"], "this machine"),
        ([demo, "launch=T", "engine.port=1"], "engine.port"),
    ]
    for words, expected in cases:
        try:
            status = main(words)
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().err
        assert (status, expected in said) == (2, True), (words, said)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def started(port: int, *words: str) -> subprocess.Popen:
    program = (sys.executable, "-m", "tokasaurus.client.lm.run")
    url = f"agent.lm_config.base_url=http://localhost:{port}"
    return subprocess.Popen(
        [*program, "--config", PACKAGE / "configs/memoryless_toka_demo.yaml", url, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )


@pytest.fixture
def port():
    with held_port() as held:
        yield held


def test_launch_says_why_an_engine_does_not_start(port):
    run = started(port, "--launch", "engine.max_seqs_per_forward=0")
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 1, printed
    assert "max_seqs_per_forward" in printed


@pytest.mark.long
def test_launch_starts_an_engine_and_leaves_none_behind(port, tmp_path):
    small = "engine={'max_tokens_per_forward': 64, 'kv_cache_num_tokens': 2048}"
    run = started(port, "--launch", "evaluation.limit=5", small, f"results_dir={tmp_path}")
    printed, _ = run.communicate(timeout=150)
    assert run.returncode == 0, printed
    assert "accuracy" in printed
    assert not listens(port)

    run = started(port, "--launch", "evaluation.limit=5", small)
    deadline = time.monotonic() + 100
    while not listens(port):
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert not listens(port)
