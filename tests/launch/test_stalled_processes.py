"""Processes that hang, as SIGSTOP makes them: what /health, the metrics and the log say."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_process import EngineProcess, eventually, running

pytestmark = pytest.mark.engine

PROGRAM = (sys.executable, Path(__file__).parents[1] / "engine_variants.py", "two_replicas")
# Small batches: the time limit of a worker grows with its largest batch.
FLAGS = ("stall_timeout_s=1", "max_tokens_per_forward=64", "max_seqs_per_forward=8")
REQUEST = {"model": "m", "prompt": "A B C D", "max_tokens": 600, "temperature": 0.0}
ENDLESS = {**REQUEST, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[EngineProcess]:
    with running(tmp_path_factory.mktemp("watched"), *FLAGS) as engine:
        yield engine


def health(engine: EngineProcess) -> tuple[int, dict[str, object]]:
    status, body = engine.get("/health")
    return status, json.loads(body)


@pytest.mark.parametrize("role", ["worker", "manager"])
def test_a_process_that_hangs_is_named_until_it_goes_on(watched, role):
    pid = watched.child(role)
    with ThreadPoolExecutor(1) as pool:
        os.kill(pid, signal.SIGSTOP)
        try:
            answer = pool.submit(watched.client(timeout=120).completions.create, **ENDLESS)
            eventually(lambda: health(watched)[0] == 503, "the stall is noticed", 20)
            status, body = health(watched)
            assert (status, body["status"], body["stalled"]) == (503, "stalled", [role])
            assert watched.metrics()["stalled_processes"] == 1
            assert f"the {role} has work and has made no progress for" in watched.log
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: health(watched)[0] == 200, "the stall is over", 20)
        assert answer.result(60).usage.completion_tokens == 600
    assert "stalled" not in health(watched)[1]
    assert f"the {role} makes progress again" in watched.log


def test_of_two_replicas_the_one_that_hangs_is_named_and_the_other_serves(tmp_path):
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, "cpu_threads=1", program=PROGRAM)
    try:
        engine.wait_ready()
        pid = engine.child("worker-1-0")
        os.kill(pid, signal.SIGSTOP)
        client = engine.client(timeout=120)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(client.completions.create, **ENDLESS) for _ in range(2)]
            eventually(lambda: "stalled" in health(engine)[1], "the stall is noticed", 20)
            status, body = health(engine)
            assert (status, body["status"], body["stalled"]) == (200, "ok", ["worker-1-0"])
            # All of these go to the other replica, more than it has seats for.
            short = {**REQUEST, "max_tokens": 3, "n": 20}
            assert len(client.completions.create(**short).choices) == 20
            os.kill(engine.child("worker"), signal.SIGSTOP)
            more = pool.submit(client.completions.create, **ENDLESS)
            eventually(lambda: health(engine)[0] == 503, "now nothing goes on", 20)
            assert health(engine)[1]["stalled"] == ["worker", "worker-1-0"]
            os.kill(engine.child("worker"), signal.SIGCONT)
            os.kill(pid, signal.SIGCONT)
            for answer in [*answers, more]:
                assert answer.result(60).usage.completion_tokens == 600
        eventually(lambda: "stalled" not in health(engine)[1], "the stall is over", 20)
    finally:
        engine.stop()
