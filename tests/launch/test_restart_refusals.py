"""A restart that is refused or fails leaves the old engine as it was, and says why."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_process import EngineProcess, eventually, running
from steady_load import PROMPT, raw_answer

from tokasaurus.demo import MODEL_DIR

pytestmark = [pytest.mark.engine, pytest.mark.processes]

SMALL = ("max_tokens_per_forward=256", "kv_cache_num_tokens=16384", "uvicorn_log_level=warning")


def begin_restart(engine: EngineProcess, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tokasaurus.entry", "restart", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(engine.private)},
    )


def refusal(engine: EngineProcess, *words: str) -> str:
    """What `toka restart` says on its standard error; its exit status is 1."""
    asking = begin_restart(engine, *words)
    printed, errors = asking.communicate(timeout=60)
    assert asking.returncode == 1, (printed, errors)
    assert "Traceback" not in errors
    return errors


def answer(engine: EngineProcess) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
    text, _ = raw_answer(connection)
    connection.close()
    return text


def post(engine: EngineProcess, path: str, body: object = None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, "" if body is None else json.dumps(body), headers)
    status = connection.getresponse().status
    connection.close()
    assert status == 200


def outside_the_log(engine: EngineProcess) -> list[str]:
    """Lines that a process has printed, which with log_format=json would not be JSON."""
    return [line for line in engine.log.splitlines() if line.startswith("toka: ")]


def answer_to_rubbish(engine: EngineProcess, rubbish: bytes) -> str:
    """What the keeper says to somebody who sends no note that it knows."""
    (path,) = engine.private.glob("*/control.sock")
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(30)
        link.connect(str(path))
        link.sendall(rubbish)
        said = b""
        while data := link.recv(1 << 16):
            said += data
    return said.decode()


def new_process(asking: subprocess.Popen[str]) -> int:
    """The process id of the new engine."""
    assert asking.stdout is not None
    for line in asking.stdout:
        found = re.search(r"a new engine starts \(process id (\d+)\)", line)
        if found is not None:
            return int(found[1])
    raise AssertionError("no new engine was started")


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_what_cannot_start_leaves_the_old_engine_as_it_was(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with running(tmp_path, *SMALL) as engine:
        old, text = engine.child("server"), answer(engine)
        num_outside = len(outside_the_log(engine))
        rows = [
            ("prot=1", "unknown flag 'prot': the nearest is 'port'"),
            (f"model={empty}", "config.json"),
            (f"model={tmp_path / 'gone'}", "no such directory"),
            ("kv_cache_num_tokens=1000000000000", "so a new one beside it has"),
            ("host=0.0.0.0", "host=0.0.0.0, and the engine has host=127.0.0.1"),
            (f"data_dir={tmp_path / 'elsewhere'}", "and batches are in"),
        ]
        for word, expected in rows:
            said = refusal(engine, word)
            assert expected in said, word
            assert "the old engine goes on" in said, word
            assert expected in engine.log, word
        assert len(outside_the_log(engine)) == num_outside
        # Such as a later version's `toka restart` may send.
        unknown = b'{"type":"AskRestart","words":["\xff"]}\n'
        for rubbish in (b'{"type":"Ask"}\n', b"ask\n", unknown, b"[" * 100_000 + b"\n"):
            assert "toka runs another version" in answer_to_rubbish(engine, rubbish)
        assert (engine.child("server"), answer(engine)) == (old, text)

        asking = begin_restart(engine)
        new = new_process(asking)
        os.kill(new, signal.SIGSTOP)  # or it might serve before the second restart is asked for
        assert "another restart is on its way" in refusal(engine)
        os.kill(new, signal.SIGKILL)
        assert "the new engine cannot serve: killed by SIGKILL" in asking.communicate(timeout=60)[1]
        assert asking.returncode == 1

        post(engine, "/pause?mode=keep")
        assert "it is paused" in refusal(engine)
        post(engine, "/resume")
        post(engine, "/update_weights_from_disk", {"model_path": str(MODEL_DIR)})
        eventually(
            lambda: engine.metrics().get("weights_version") == 1, "the figures know the new weights"
        )
        assert "toka restart model=" in refusal(engine)
        assert "cannot serve" in refusal(engine, f"model={empty}")
        assert answer(engine) == text
        assert len(list(engine.private.glob("tokasaurus-*"))) == 2  # the keeper's, and the engine's


@pytest.mark.long
def test_sigterm_ends_both_engines_of_a_restart(tmp_path):
    """The new one, which is not ready, at once; the old one after its last request."""
    with running(tmp_path, *SMALL) as engine, engine.client(timeout=60) as client:
        stream = client.completions.create(
            **PROMPT, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        asking = begin_restart(engine)
        new = new_process(asking)
        engine.signal(signal.SIGTERM)
        assert "toka was told to end" in asking.communicate(timeout=60)[1]
        assert sum(bool(each.choices[0].text) for each in stream) > 100
        assert engine.wait_exit() == 0
        assert not exists(new)
        assert list(engine.private.iterdir()) == []


@pytest.mark.long
def test_the_new_engine_takes_the_place_of_one_that_dies_meanwhile(tmp_path):
    with running(tmp_path, *SMALL) as engine:
        text = answer(engine)
        asking = begin_restart(engine)
        new_process(asking)
        os.kill(engine.child("server"), signal.SIGKILL)
        assert answer(engine) == text  # it waits in the queue of the port
        assert asking.communicate(timeout=60)[0].strip().endswith("the old one had ended before")
        assert asking.returncode == 0
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0


@pytest.mark.long
def test_the_status_is_that_of_the_engine_that_has_served(tmp_path):
    """It died. That its successor has a wrong flag, status 2, would keep systemd from a start."""
    with running(tmp_path, *SMALL) as engine:
        asking = begin_restart(engine, "prot=1")
        new = new_process(asking)
        os.kill(new, signal.SIGSTOP)
        os.kill(engine.child("server"), signal.SIGKILL)
        eventually(lambda: "the new engine takes its place" in engine.log, "the death is seen")
        os.kill(new, signal.SIGCONT)
        assert "unknown flag 'prot'" in asking.communicate(timeout=60)[1]
        assert engine.wait_exit() == 1
