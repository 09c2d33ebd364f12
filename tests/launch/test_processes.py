"""A whole engine as a user runs it: real processes, real clients, and every way it can end.

An engine ends once, so each one here shows all that goes with its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from engine_process import EngineProcess, eventually, running, started

pytestmark = [pytest.mark.engine, pytest.mark.processes]

LONG = {"model": "m", "prompt": "A B C D", "max_tokens": 1500, "temperature": 1.0}
# Several of these fit into the KV cache at once.
ENDLESS = {**LONG, "n": 16, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
SHORT = {**LONG, "max_tokens": 3}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def cpu_ticks(pid: int) -> int:
    """Processor time that a process has used, in ticks of the kernel, mostly hundredths."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.fixture
def own_engine(request, tmp_path):
    """An engine that the test ends, with the flags of its parameter; nothing of it may remain.

    By default a drain that does not end by itself takes longer than any test waits.
    """
    with running(tmp_path, *getattr(request, "param", ("shutdown_timeout_s=600",))) as engine:
        roles = ("server", "manager", "worker")
        pids = [engine.process.pid, *(engine.child(role) for role in roles)]
        yield engine
        if engine.process.poll() is not None:
            assert list(engine.private.iterdir()) == []
    assert [pid for pid in pids if alive(pid)] == []


class Stream:
    """A streamed request in a thread of its own."""

    def __init__(self, engine: EngineProcess, **request: object) -> None:
        self.num_chunks = 0
        self.num_tokens = 0  # as the last chunk says
        self.error: Exception | None = None
        self._begun = threading.Event()
        self._chunks = engine.client().completions
        self._request = request
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for chunk in self._chunks.create(
                **self._request, stream=True, stream_options={"include_usage": True}
            ):
                self.num_chunks += 1
                self._begun.set()
                if chunk.usage is not None:
                    self.num_tokens = chunk.usage.completion_tokens
        except openai.APIError as error:
            self.error = error

    def wait_begun(self) -> None:
        assert self._begun.wait(60), self.error

    def wait_ended(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def num_in_flight(engine: EngineProcess) -> int:
    (state,) = json.loads(engine.get("/server_info")[1])["internal_states"]
    return state["num_running_prompts"]


def check_drain_refuses(engine: EngineProcess) -> None:
    """Waits for the drain to begin, and checks what a new request is told."""
    eventually(lambda: engine.get("/health")[0] == 503, "the drain begins")
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        engine.client().completions.create(**SHORT)


@pytest.mark.parametrize("role", ["worker", "manager"])
def test_a_killed_process_ends_every_request_with_an_error_and_the_engine(own_engine, role):
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(own_engine.client().completions.create, **ENDLESS)
        streams = [Stream(own_engine, **ENDLESS) for _ in range(2)]
        for stream in streams:
            stream.wait_begun()
        eventually(lambda: num_in_flight(own_engine) == 3, "all requests are in flight")
        os.kill(own_engine.child(role), signal.SIGKILL)
        for stream in streams:
            stream.wait_ended()
            assert stream.num_chunks > 0
            assert role in str(stream.error)
        with pytest.raises(openai.InternalServerError) as refused:
            whole.result(timeout=60)
        assert refused.value.status_code == 503
        assert role in refused.value.message
    assert own_engine.wait_exit() == 1
    assert f"toka: the {role} ended: killed by SIGKILL" in own_engine.log


def test_sigterm_refuses_new_requests_and_lets_running_ones_finish(own_engine):
    """Before that, while the engine has served nothing else: its manager's figures are current
    whenever it rests, whatever it told while it worked.
    """
    request = {**LONG, "max_tokens": 50, "n": 4, "extra_body": {"ignore_eos": True}}
    own_engine.client().completions.create(**request)
    eventually(
        lambda: own_engine.metrics().get("generated_tokens_total") == 200,
        "the figures of a manager at rest",
    )
    request |= {"max_tokens": 1000, "n": 1}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own_engine.client().completions.create, **request)
        eventually(lambda: num_in_flight(own_engine) == 1, "the request is in flight")
        worker = own_engine.child("worker")
        os.kill(worker, signal.SIGSTOP)  # or the answer might come before the refusal
        own_engine.signal(signal.SIGTERM)
        check_drain_refuses(own_engine)
        os.kill(worker, signal.SIGCONT)
        assert answer.result(timeout=60).usage.completion_tokens == 1000
    assert own_engine.wait_exit() == 0


def test_two_sigints_drain_first_and_then_stop_at_once(own_engine):
    """Ctrl-C goes to every process of the group, not to toka alone."""
    short = Stream(own_engine, **{**ENDLESS, "n": 1, "max_tokens": 300})
    endless = Stream(own_engine, **ENDLESS)
    for stream in (short, endless):
        stream.wait_begun()
    os.killpg(own_engine.process.pid, signal.SIGINT)
    check_drain_refuses(own_engine)
    short.wait_ended()
    assert (short.num_tokens, short.error) == (300, None)
    assert own_engine.process.poll() is None
    os.killpg(own_engine.process.pid, signal.SIGINT)
    assert own_engine.wait_exit() == 130
    endless.wait_ended()
    assert endless.error is not None


@pytest.mark.parametrize(
    "own_engine", [(".dmanager", "shutdown_timeout_s=0.5")], indirect=True, ids=["manager"]
)
def test_a_drain_ends_after_its_timeout(own_engine):
    """With the manager in the foreground of toka."""
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(own_engine.client().completions.create, **ENDLESS)
        eventually(lambda: num_in_flight(own_engine) == 1, "the request is in flight")
        assert own_engine.client().completions.create(**SHORT).choices
        own_engine.signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError, match="shut down before this request"):
            endless.result(timeout=60)
    assert own_engine.wait_exit() == 0


@pytest.mark.parametrize(
    "own_engine", [(".dmodel", "shutdown_timeout_s=600")], indirect=True, ids=["model"]
)
def test_ctrl_c_ends_an_idle_engine(own_engine):
    """With the worker in the foreground of toka."""
    assert own_engine.client().completions.create(**SHORT).choices
    os.killpg(own_engine.process.pid, signal.SIGINT)
    assert own_engine.wait_exit() == 0


def test_children_of_a_killed_supervisor_end(tmp_path):
    with running(tmp_path) as engine:
        children = [engine.child(role) for role in ("server", "manager", "worker")]
        os.kill(engine.process.pid, signal.SIGKILL)
        engine.process.wait()
        eventually(lambda: not any(alive(pid) for pid in children), "its children end")


def test_a_busy_port_is_reported_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(tmp_path, port=port) as engine:
            assert engine.wait_exit() == 2
    assert f"port {port}" in engine.log
    assert "port=" in engine.log
    assert "worker" not in engine.log


def test_a_broken_model_is_reported_without_a_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    with started(tmp_path, f"model={tmp_path / 'empty'}") as engine:
        assert engine.wait_exit() != 0
    assert "config.json" in engine.log
    assert "Traceback" not in engine.log


def test_200_requests_at_once_get_the_answers_they_get_alone(engine):
    async def ask(client, i):
        request = {"model": "m", "prompt": [20 + i] * (1 + i % 40), "seed": i, "temperature": 1.0}
        request |= {"max_tokens": 5 + i % 20, "extra_body": {"ignore_eos": True}}
        if i % 2:
            return (await client.completions.create(**request)).choices[0].text
        chunks = await client.completions.create(**request, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def ask_all():
        async with openai.AsyncOpenAI(
            api_key="none", base_url=f"{engine.url}/v1", max_retries=0, timeout=120
        ) as client:
            together = await asyncio.gather(*(ask(client, i) for i in range(200)))
            alone = [await ask(client, i) for i in range(0, 200, 25)]
        return together, alone

    together, alone = asyncio.run(ask_all())
    assert together[::25] == alone  # a seed's tokens do not depend on what else runs


@pytest.mark.parametrize("stream", [True, False])
def test_disconnects_leave_no_work_behind(engine, stream):
    """The worker falls idle long before the requests would have been served."""
    worker = engine.child("worker")
    body = json.dumps({**LONG, "ignore_eos": True, "n": 64, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", engine.port)) for _ in range(4)]
    for client in clients:
        client.sendall(head.encode() + body)
    eventually(lambda: num_in_flight(engine) == 4, "the requests are in flight")
    before = cpu_ticks(worker)
    eventually(lambda: cpu_ticks(worker) > before + 5, "the worker computes")
    for client in clients:
        client.close()
    eventually(lambda: num_in_flight(engine) == 0, "the server drops the requests", 20)

    def is_idle():
        before = cpu_ticks(worker)
        time.sleep(0.25)
        return cpu_ticks(worker) <= before + 1

    eventually(is_idle, "the worker falls idle")
    answer = engine.client(timeout=60).completions.create(**SHORT)
    assert answer.usage.completion_tokens <= 3


def test_a_wrong_flag_is_reported_with_the_right_one():
    seen = subprocess.run(
        [sys.executable, "-m", "tokasaurus.entry", "prot=1"], capture_output=True, text=True
    )
    assert seen.returncode == 2
    assert "prot" in seen.stderr
    assert "port" in seen.stderr
    assert "Traceback" not in seen.stderr
