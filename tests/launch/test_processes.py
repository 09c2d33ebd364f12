"""A whole engine as a user runs it: real processes, real clients, and every way it can end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from engine_process import EngineProcess, free_port, running

pytestmark = pytest.mark.engine

LONG = {"model": "m", "prompt": "A B C D", "max_tokens": 1500, "temperature": 1.0}
ENDLESS = {**LONG, "extra_body": {"ignore_eos": True}}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def busy_s(pid: int, over_s: float) -> float:
    """Seconds of processor time that a process takes within so many seconds."""

    def used() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(over_s)
    return (used() - before) / os.sysconf("SC_CLK_TCK")


def private_directories() -> set[Path]:
    return set(Path(os.environ.get("TMPDIR", "/tmp")).glob("tokasaurus-*"))


@pytest.fixture
def own_engine(tmp_path):
    """An engine that the test may kill; checks that nothing of it is left afterwards."""
    before = private_directories()
    with running(tmp_path) as engine:
        pids = [engine.process.pid, engine.child("manager"), engine.child("worker")]
        yield engine
    assert [pid for pid in pids if alive(pid)] == []
    assert private_directories() <= before


def stream_until_error(engine: EngineProcess) -> tuple[int, Exception | None]:
    chunks = 0
    try:
        for _ in engine.client().completions.create(**ENDLESS, stream=True):
            chunks += 1
    except openai.APIError as error:
        return chunks, error
    return chunks, None


def wait_for_tokens(engine: EngineProcess) -> None:
    """Returns once the engine is generating for somebody."""
    # First in the queue: behind many that are known to be long it might wait until one of them ends.
    urgent = {**LONG, "max_tokens": 2, "extra_body": {"priority": -1}}
    for _ in engine.client().completions.create(**urgent, stream=True):
        pass
    time.sleep(0.3)


@pytest.mark.parametrize("role", ["worker", "manager"])
def test_a_killed_process_answers_everyone_and_ends_the_engine(own_engine, role):
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream_until_error, own_engine) for _ in range(2)]
        whole = pool.submit(own_engine.client().completions.create, **ENDLESS)
        wait_for_tokens(own_engine)
        os.kill(own_engine.child(role), signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            chunks, error = stream.result(timeout=20)
            assert chunks > 0
            assert role in str(error)
        with pytest.raises(openai.InternalServerError) as refused:
            whole.result(timeout=20)
        assert refused.value.status_code == 503
        assert role in refused.value.message
    assert own_engine.wait_exit(20) == 1
    assert time.monotonic() - killed < 20
    assert f"toka: the {role} ended: killed by SIGKILL" in own_engine.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(own_engine, number):
    request = {**ENDLESS, "max_tokens": 300}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own_engine.client().completions.create, **request)
        wait_for_tokens(own_engine)
        own_engine.signal(number)
        assert answer.result(timeout=40).usage.completion_tokens == 300
    assert own_engine.wait_exit(20) == 0


def test_a_terminal_interrupts_the_whole_group(own_engine):
    """Ctrl-C goes to every process of the group, not to toka alone."""
    os.killpg(own_engine.process.pid, signal.SIGINT)
    assert own_engine.wait_exit(20) == 0


def test_a_drain_refuses_newcomers_and_is_bounded(tmp_path):
    with running(tmp_path, "shutdown_timeout_s=2") as engine:
        with ThreadPoolExecutor(1) as pool:
            endless = pool.submit(
                engine.client().completions.create, **{**ENDLESS, "n": 64, "max_tokens": 1900}
            )
            wait_for_tokens(engine)
            engine.signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                engine.client().completions.create(**LONG)
            with pytest.raises(openai.APIError):
                endless.result(timeout=30)
        assert engine.wait_exit(15) == 0


def test_a_second_signal_stops_at_once(own_engine):
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(stream_until_error, own_engine)
        wait_for_tokens(own_engine)
        own_engine.signal(signal.SIGTERM)
        time.sleep(0.3)
        own_engine.signal(signal.SIGTERM)
        assert own_engine.wait_exit(10) == 130
        endless.cancel()


def test_children_of_a_killed_supervisor_end(tmp_path):
    engine = EngineProcess(tmp_path / "toka.log")
    engine.wait_ready()
    children = [engine.child("manager"), engine.child("worker")]
    os.kill(engine.process.pid, signal.SIGKILL)
    engine.process.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_busy_port_fails_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = EngineProcess(tmp_path / "toka.log", port=port)
        assert engine.wait_exit(30) == 2
    assert f"port {port}" in engine.log
    assert "port=" in engine.log
    assert "worker" not in engine.log


def test_a_broken_model_is_reported_without_a_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    engine = EngineProcess(tmp_path / "toka.log", f"model={tmp_path / 'empty'}")
    assert engine.wait_exit(60) != 0
    assert "config.json" in engine.log
    assert "Traceback" not in engine.log


@pytest.mark.parametrize("role", ["manager", "model"])
def test_another_process_in_the_foreground(tmp_path, role):
    with running(tmp_path, f".d{role}") as engine:
        assert engine.client().completions.create(**{**LONG, "max_tokens": 3}).choices
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit(20) == 0


def test_200_at_once(engine):
    """Every kind of request at the same time; each gets its own answer."""

    async def ask(client, i):
        request = {"model": "m", "prompt": [20 + i] * (1 + i % 40), "seed": i, "temperature": 1.0}
        request |= {"max_tokens": 5 + i % 20, "extra_body": {"ignore_eos": True}}
        if i % 2:
            return (await client.completions.create(**request)).choices[0].text
        chunks = await client.completions.create(**request, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everyone():
        async with openai.AsyncOpenAI(
            api_key="none", base_url=f"{engine.url}/v1", max_retries=0, timeout=120
        ) as client:
            together = await asyncio.gather(*(ask(client, i) for i in range(200)))
            alone = [await ask(client, i) for i in range(0, 200, 25)]
        return together, alone

    together, alone = asyncio.run(everyone())
    assert together[::25] == alone  # a seed's tokens do not depend on what else runs


def test_disconnects_free_the_engine(engine):
    """Clients that go away leave no work behind: the worker falls idle long before they would be served."""
    worker = engine.child("worker")
    for stream in (True, False):
        body = json.dumps({**LONG, "ignore_eos": True, "n": 64, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        clients = [socket.create_connection(("127.0.0.1", engine.port)) for _ in range(4)]
        for client in clients:
            client.sendall(head.encode() + body)
        wait_for_tokens(engine)
        assert busy_s(worker, over_s=0.5) > 0
        for client in clients:
            client.close()
        deadline = time.monotonic() + 20
        while busy_s(worker, over_s=0.5) > 0.02:
            assert time.monotonic() < deadline
    answer = engine.client(timeout=60).completions.create(**{**LONG, "max_tokens": 3})
    assert answer.usage.completion_tokens <= 3


def test_a_wrong_flag_names_the_right_one():
    seen = subprocess.run(
        [sys.executable, "-m", "tokasaurus.entry", f"prot={free_port()}"],
        capture_output=True,
        text=True,
    )
    assert seen.returncode == 2
    assert "prot" in seen.stderr
    assert "port" in seen.stderr
    assert "Traceback" not in seen.stderr


def test_statistics_travel_from_the_manager(engine):
    """A real manager's figures are current when it rests, whatever it told while it worked."""

    def generated():
        for line in engine.get("/metrics")[1].splitlines():
            if line.startswith("tokasaurus_generated_tokens_total "):
                return float(line.split()[1])
        return 0.0

    before = generated()
    engine.client().completions.create(**{**ENDLESS, "max_tokens": 50}, n=4)
    deadline = time.monotonic() + 20
    while generated() != before + 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
