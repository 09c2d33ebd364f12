"""``log_format=json``: whatever an engine's processes say, from start to end, is JSON lines."""

from __future__ import annotations

import os
import signal

import pytest
from engine_process import eventually, running

pytestmark = [pytest.mark.engine, pytest.mark.processes]

FLAGS = ("log_format=json", "kv_cache_num_tokens=4096", "cpu_threads=1", "max_seqs_per_forward=16")


def test_every_line_of_every_process_is_json(tmp_path):
    with running(tmp_path, *FLAGS, "server_processes=2") as engine:
        engine.get("/health")
        engine.client().completions.create(
            model="m", prompt="Once", max_tokens=2, extra_headers={"X-Request-Id": "mine/7"}
        )

        def access_lines():
            return [line for line in engine.json_log() if "status" in line]

        eventually(access_lines, "a line for the request")
        (line,) = access_lines()
        assert line["process"] in ("http-1", "http-2")
        assert (line["path"], line["status"]) == ("/v1/completions", 200)
        assert line["request_id"] == "mine/7"
        engine.stop()
        processes = {line["process"] for line in engine.json_log()}
        assert processes >= {"server", "http-1", "http-2", "manager", "worker"}


def test_a_process_that_dies_leaves_one_line_that_says_how(tmp_path):
    with running(tmp_path, *FLAGS) as engine:
        (worker,) = {line["pid"] for line in engine.json_log(process="worker")}
        os.kill(worker, signal.SIGKILL)
        assert engine.wait_exit() == 1
        last = engine.json_log()[-1]
        assert last["level"] == "CRITICAL"
        assert last["message"].startswith("the worker ended: killed by SIGKILL")
