"""Processes that hang, as SIGSTOP makes them: what /health, the metrics and the log say."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_process import EngineProcess, eventually, running

pytestmark = [pytest.mark.engine, pytest.mark.processes]

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
            eventually(lambda: health(watched)[0] == 503, "the stall is noticed")
            status, body = health(watched)
            assert (status, body["status"], body["stalled"]) == (503, "stalled", [role])
            assert watched.metrics()["stalled_processes"] == 1
            assert f"the {role} has work and has made no progress for" in watched.log
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: health(watched)[0] == 200, "the stall is over")
        assert answer.result(60).usage.completion_tokens == 600
    assert "stalled" not in health(watched)[1]
    assert f"the {role} makes progress again" in watched.log


@pytest.mark.long
def test_of_replicas_that_all_hang_one_that_goes_on_is_kept(tmp_path):
    with running(tmp_path, *FLAGS, "cpu_threads=1", "dp_size=2") as engine:
        client = engine.client(timeout=120)
        workers = [engine.child(role) for role in ("worker", "worker-1-0")]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(client.completions.create, **ENDLESS) for _ in range(4)]
            named = ["worker", "worker-1-0"]
            eventually(
                lambda: health(engine)[1].get("stalled") == named, "the stall is noticed", 20
            )
            status, body = health(engine)
            assert (status, body["status"]) == (503, "stalled")
            assert body["replicas"] == {"0": "stalled", "1": "stalled"}
            os.kill(workers[0], signal.SIGCONT)
            for answer in answers:
                assert answer.result(60).usage.completion_tokens == 600
        assert "the worker makes progress again" in engine.log
        assert "the worker-1-0 had work and made no progress; 1 replica goes on" in engine.log
        assert engine.child("worker") == workers[0]
