"""Two replicas as real processes: when one dies, its requests go on at the other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_process import EngineProcess, eventually
from openai.types import Completion

pytestmark = pytest.mark.engine

PROGRAM = (sys.executable, Path(__file__).parents[1] / "engine_variants.py", "two_replicas")
FLAGS = ("max_seqs_per_forward=16", "kv_cache_num_tokens=16384", "cpu_threads=1")
REQUEST = {
    "model": "m",
    "prompt": "A B C D",
    "max_tokens": 600,
    # Draws would differ where a batch of another size rounds in another way.
    "temperature": 0.0,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, program=PROGRAM)
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.stop()


def stream(engine: EngineProcess, seed: int) -> tuple[str, int]:
    """The text of a stream, and its tokens."""
    text, num_tokens = "", 0
    options = {"stream": True, "stream_options": {"include_usage": True}, "seed": seed}
    for chunk in engine.client(timeout=120).completions.create(**REQUEST, **options):
        text += "".join(choice.text for choice in chunk.choices)
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
    return text, num_tokens


def whole(engine: EngineProcess, seed: int) -> Completion:
    return engine.client(timeout=120).completions.create(**REQUEST, n=20, seed=seed)


@pytest.mark.parametrize("role", [pytest.param("manager-1", marks=pytest.mark.long), "worker"])
def test_requests_go_on_when_a_replica_dies_and_fail_with_the_last(
    pair: EngineProcess, role: str
) -> None:
    expected = [stream(pair, seed) for seed in range(2)]
    expected_texts = [choice.text for choice in whole(pair, 9).choices]
    with ThreadPoolExecutor(4) as pool:
        streams: list[Future[tuple[str, int]]] = [
            pool.submit(stream, pair, seed) for seed in range(2)
        ]
        answer = pool.submit(whole, pair, 9)  # more samples than one replica has seats for
        before = pair.metrics()["generated_tokens_total"]
        eventually(
            lambda: pair.metrics()["generated_tokens_total"] > before + 100, "both compute", 60
        )
        os.kill(pair.child(role), signal.SIGKILL)
        assert [each.result(120) for each in streams] == expected
        assert [choice.text for choice in answer.result(120).choices] == expected_texts
    assert f"the {role} ended: killed by SIGKILL" in pair.log
    assert "1 replica goes on" in pair.log
    assert pair.get("/health")[0] == 200
    rest = "manager" if role == "manager-1" else "manager-1"
    os.kill(pair.child(rest), signal.SIGKILL)
    assert pair.wait_exit(20) == 1
    assert f"toka: the {rest} ended: killed by SIGKILL" in pair.log
    assert list(pair.private.iterdir()) == []


def test_a_drain_ends_all_replicas(pair: EngineProcess) -> None:
    names = ("manager", "worker", "manager-1", "worker-1-0")
    pids = [pair.child(name) for name in names]
    pair.signal(signal.SIGTERM)
    assert pair.wait_exit(20) == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
