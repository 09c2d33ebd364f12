"""Several replicas as real processes: requests go on when one dies or hangs, and it returns."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from engine_process import EngineProcess, eventually
from openai.types import Completion

pytestmark = [pytest.mark.engine, pytest.mark.processes]

T = TypeVar("T")

FLAGS = (
    "max_seqs_per_forward=16",
    # The time limit of a worker grows with its largest batch.
    "max_tokens_per_forward=64",
    "kv_cache_num_tokens=16384",
    "cpu_threads=1",
    # A drain that does not end by itself would take longer than any test waits.
    "shutdown_timeout_s=600",
)
# For processes that hang. A machine with more work may need as long for a batch.
IMPATIENT = "stall_timeout_s=2"
REQUEST = {
    "model": "m",
    "prompt": "A B C D",
    "max_tokens": 600,
    # Draws would differ where a batch of another size rounds in another way.
    "temperature": 0.0,
    "extra_body": {"ignore_eos": True},
}


@contextmanager
def replicas(directory: Path, *flags: str, number: int = 2) -> Iterator[EngineProcess]:
    engine = EngineProcess(directory / "toka.log", *FLAGS, f"dp_size={number}", *flags)
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


def health(engine: EngineProcess) -> tuple[int, dict[str, object]]:
    status, body = engine.get("/health")
    return status, json.loads(body)


def check_that_all_goes_on(engine: EngineProcess, strike: Callable[[], None]) -> None:
    """Clients ask one request after the other, and get their tokens, whatever strikes."""
    is_over = threading.Event()

    def answers(ask: Callable[[], T]) -> list[T]:
        got = [ask()]
        while not is_over.is_set():
            got.append(ask())
        return got

    def texts() -> list[str]:  # of more samples than one replica has seats for
        return [choice.text for choice in whole(engine, 9).choices]

    expected, expected_texts = stream(engine, 0), texts()
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(answers, lambda: stream(engine, 0)) for _ in range(2)]
        wholes = pool.submit(answers, texts)
        try:
            eventually(lambda: min(samples_of_replicas(engine)) > 0, "both have samples", 60)
            strike()
            time.sleep(0.5)  # one that hangs is noticed by the requests that it has
        finally:
            is_over.set()
        for each in streams:  # greedy ones are equal
            got = each.result(120)
            assert got == [expected] * len(got)
        got_texts = wholes.result(120)
        assert got_texts == [expected_texts] * len(got_texts)


def samples_of_replicas(engine: EngineProcess) -> list[float]:
    """How many samples each has at this moment."""
    figures = engine.metrics()
    return [figures.get(f'replica_samples{{replica="{number}"}}', 0) for number in (0, 1)]


def all_are_well(engine: EngineProcess) -> bool:
    return set(health(engine)[1]["replicas"].values()) == {"ok"}


@pytest.mark.parametrize("role", ["worker", pytest.param("manager-1", marks=pytest.mark.long)])
def test_requests_go_on_when_a_replica_dies_and_it_starts_again(tmp_path: Path, role: str) -> None:
    with replicas(tmp_path) as engine:
        former = engine.child(role)

        def kill() -> None:
            os.kill(former, signal.SIGSTOP)  # so that it cannot finish what it has
            number = 1 if role == "manager-1" else 0
            eventually(lambda: samples_of_replicas(engine)[number] > 0, "it has samples", 60)
            os.kill(former, signal.SIGKILL)

        check_that_all_goes_on(engine, kill)
        assert f"the {role} ended: killed by SIGKILL" in engine.log
        assert "1 replica goes on, and it is started again" in engine.log
        assert health(engine)[0] == 200
        eventually(lambda: all_are_well(engine), "the replica is back", 60)
        assert engine.child(role) != former
        check_that_all_goes_on(engine, lambda: None)
        figures = engine.metrics()
        assert figures["lost_replicas_total"] == 1
        assert figures["moved_samples_total"] > 0
        for number in (0, 1):
            assert figures[f'replica_generated_tokens{{replica="{number}"}}'] > 0
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0


@pytest.mark.long
@pytest.mark.parametrize("role", ["worker-1-0", "manager"])
def test_a_replica_that_hangs_is_ended_and_its_requests_go_on(tmp_path: Path, role: str) -> None:
    with replicas(tmp_path, IMPATIENT) as engine:
        former = engine.child(role)
        check_that_all_goes_on(engine, lambda: os.kill(former, signal.SIGSTOP))
        assert f"the {role} has work and has made no progress for" in engine.log
        eventually(lambda: all_are_well(engine), "the replica is back", 60)
        assert engine.child(role) != former
        with pytest.raises(ProcessLookupError):
            os.kill(former, 0)


@pytest.mark.long
def test_when_all_replicas_hang_they_are_replaced_one_after_the_other(tmp_path: Path) -> None:
    with replicas(tmp_path, IMPATIENT) as engine, ThreadPoolExecutor(4) as pool:
        expected = stream(engine, 0)
        for role in ("worker", "worker-1-0"):
            os.kill(engine.child(role), signal.SIGSTOP)
        waiting = [pool.submit(stream, engine, 0) for _ in range(4)]
        eventually(lambda: health(engine)[1].get("status") == "stalled", "all hang")
        eventually(lambda: all_are_well(engine), "both are back", 90)
        for each in waiting:  # moved once, or ended twice where it was
            error = each.exception(60)
            if error is None:
                assert each.result() == expected
            else:
                assert "two replicas ended while they had this request" in str(error)
        assert stream(engine, 0) == expected


@pytest.mark.long
def test_the_engine_ends_with_its_last_replica(tmp_path: Path) -> None:
    with replicas(tmp_path, "replica_restarts=0") as engine:
        os.kill(engine.child("worker"), signal.SIGKILL)
        eventually(lambda: "1 replica goes on, and it is not" in engine.log, "it is noticed")
        assert stream(engine, 0)[1] == 600
        assert health(engine)[1]["replicas"] == {"0": "ended", "1": "ok"}
        os.kill(engine.child("manager-1"), signal.SIGKILL)
        assert engine.wait_exit() == 1
        assert "toka: the manager-1 ended: killed by SIGKILL" in engine.log
        assert list(engine.private.iterdir()) == []


@pytest.mark.long
def test_requests_wait_while_all_replicas_start_again(tmp_path: Path) -> None:
    with replicas(tmp_path) as engine:
        expected = stream(engine, 0)
        for role in ("worker", "worker-1-0"):
            os.kill(engine.child(role), signal.SIGKILL)
        eventually(lambda: health(engine)[1]["status"] == "restarting", "all are gone")
        assert health(engine)[0] == 503
        assert stream(engine, 0) == expected
        eventually(lambda: all_are_well(engine), "both are back", 60)
        assert health(engine)[0] == 200


def test_a_drain_ends_all_replicas(tmp_path: Path) -> None:
    with replicas(tmp_path) as engine:
        names = ("manager", "worker", "manager-1", "worker-1-0")
        pids = [engine.child(name) for name in names]
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_replica_that_hangs_while_it_starts_again_is_ended(tmp_path: Path) -> None:
    program = (sys.executable, Path(__file__).parents[1] / "engine_variants.py", "impatient")
    flags = (*FLAGS, IMPATIENT, "dp_size=2")
    engine = EngineProcess(tmp_path / "toka.log", *flags, program=program)
    try:
        engine.wait_ready()
        former = engine.child("worker-1-0")
        os.kill(former, signal.SIGKILL)
        eventually(lambda: engine.child("worker-1-0") != former, "it is started again")
        os.kill(engine.child("worker-1-0"), signal.SIGSTOP)
        late = re.compile(r"the worker-1-0 was not ready \d+ s after its start; 1 replica goes on")
        eventually(lambda: late.search(engine.log) is not None, "it is noticed", 100)
        eventually(lambda: all_are_well(engine), "the replica is back", 100)
    finally:
        engine.stop()
