"""A new engine takes over from a running one, and no client sees an error."""

from __future__ import annotations

import http.client
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_process import EngineProcess, eventually, running
from steady_load import PROMPT, RunningBatch, SteadyLoad, raw_answer

pytestmark = [pytest.mark.engine, pytest.mark.processes]

SMALL = ("max_tokens_per_forward=256", "kv_cache_num_tokens=16384", "uvicorn_log_level=warning")


@pytest.fixture
def notified(tmp_path, monkeypatch) -> Iterator[socket.socket]:
    """Hears what systemd would hear of the engine."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield told


def restarts(engine: EngineProcess) -> int:
    return engine.log.count("restart: done")


def restart(engine: EngineProcess, load: SteadyLoad | None = None) -> None:
    """Sends the signal, and waits until the old engine is gone."""
    before = restarts(engine)
    engine.signal(signal.SIGUSR2)

    def is_over() -> bool:
        if load is not None:
            load.check()
        assert engine.log.count("restart: refused") == 0, engine.log
        return restarts(engine) > before

    eventually(is_over, "the restart", 120)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_restart_loses_nothing(tmp_path, notified):
    with running(tmp_path, *SMALL, "max_seqs_per_forward=8") as engine:
        roles = ("server", "manager", "worker")
        old = [engine.child(role) for role in roles]
        idle = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
        first, _ = raw_answer(idle)
        batch = RunningBatch(engine, 600)
        with SteadyLoad(engine) as load, engine.client(timeout=120) as client:
            long = client.completions.create(
                **PROMPT, max_tokens=1200, stream=True, extra_body={"ignore_eos": True}
            )
            next(long)
            eventually(lambda: batch.num_completed() > 20, "the batch runs")
            engine.signal(signal.SIGUSR2)
            eventually(lambda: "engine 2 serves" in engine.log, "the new engine serves")
            # A connection from before the restart goes on.
            address = idle.sock.getsockname()
            for _ in range(2):
                assert raw_answer(idle) == (first, False)
            assert idle.sock.getsockname() == address
            before = dict(load.num_answers)
            for _ in long:
                pass
            eventually(lambda: restarts(engine) == 1, "the restart")
            eventually(
                lambda: all(load.num_answers[name] > before[name] + 3 for name in before),
                "all clients have answers of the new engine",
            )
            eventually(lambda: batch.is_completed, "the batch ends")
        batch.check_result()
        assert set(load.num_answers) == {"whole", "streams", "kept alive", "fresh", "files"}
        assert load.num_connections == 1
        assert raw_answer(idle) == (first, False)
        idle.close()
        assert [engine.child(role) for role in roles] != old
        assert [pid for pid in old if exists(pid)] == []
        names = {path.name for path in engine.private.glob("*/*.sock")}
        assert not names & {"connections-1-0.sock", "store-1.sock"}
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0
        assert list(engine.private.iterdir()) == []
    told = [notified.recv(1000).split(b"=")[0] for _ in range(4)]
    assert told == [b"READY", b"RELOADING", b"READY", b"STOPPING"]


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [(), ("server_processes=2", "dp_size=2", "cpu_threads=1", "api_key=none")],
    ids=["one process", "several processes and a key"],
)
def test_ten_restarts_lose_nothing(tmp_path, flags):
    with running(tmp_path, *SMALL, "max_seqs_per_forward=8", *flags) as engine:
        batch = RunningBatch(engine, 5000)
        with SteadyLoad(engine) as load:
            for _ in range(10):
                before = dict(load.num_answers)
                num_completed = batch.num_completed()
                restart(engine, load)
                assert all(load.num_answers[name] > before.get(name, 0) for name in before)
                assert batch.is_completed or batch.num_completed() > num_completed
            print(load.num_answers, load.num_connections, batch.num_completed())
            eventually(lambda: batch.is_completed, "the batch ends", 600)
        batch.check_result()
        assert load.num_connections == 1
        assert "Traceback" not in engine.log
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0
        assert list(engine.private.iterdir()) == []
