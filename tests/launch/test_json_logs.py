"""``log_format=json``: whatever an engine's processes say, from start to end, is JSON lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from engine_process import eventually, running, started

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


def test_warnings_restarts_and_the_end_are_lines_too(tmp_path):
    flags = (*FLAGS, "host=0.0.0.0", "enable_chosen_logprobs=F", "use_cudagraphs=T")
    with running(tmp_path, *flags) as engine:
        warnings = ["host=0.0.0.0 lets", "enable_chosen_logprobs has no effect", "use_cudagraphs"]
        for number in (1, 2):
            lines = [line["message"] for line in engine.json_log(level="WARNING")]
            for warning in warnings:
                assert [line.startswith(warning) for line in lines].count(True) == number, lines
            if number == 1:
                engine.signal(signal.SIGUSR2)
                eventually(lambda: "restart: done" in engine.log, "the restart", 120)
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0
        said = {
            role: [
                line["message"]
                for line in engine.json_log(level="INFO", process=role)
                if "status" not in line
            ]
            for role in ("toka", "server")
        }
    check_each_begins(
        said["toka"],
        "process id",
        "restart: engine 2 starts beside engine 1",
        "restart: engine 2 serves; engine 1 takes no more connections, and finishes",
        "engine 1 has ended",
        "restart: done",
        "engine 2 has ended",
    )
    # These are of two processes.
    check_each_begins(
        sorted(said["server"]),
        "draining",
        "engine 1 leaves files and batches to engine 2",
        "engine 2 has the files and batches now",
        "process id",
        "process id",
        "ready: ",
        "ready: ",
    )


def check_each_begins(messages, *beginnings):
    assert len(messages) == len(beginnings), messages
    for message, words in zip(messages, beginnings, strict=True):
        assert message.startswith(words), messages


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with started(tmp_path, *FLAGS, f"model={tmp_path / 'gone'}") as engine:
        assert engine.wait_exit() == 2
        (line,) = engine.json_log(level="CRITICAL")
    assert line["process"] == "toka"
    assert "no such directory" in line["message"]


def test_a_refused_command_line_is_a_line_if_it_says_that_lines_are_json(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("log_format: json\n")
    rows = [
        (["log_format=text", "prot=1"], {}),
        (["log_format=jsn", "prot=1"], {}),
        (["log_format=json", "prot=1"], {}),
        (["prot=1", f"config={file}"], {}),
        (["prot=1"], {"OVERRIDES": "log_format=json"}),
        (["log_format=json", "host=nowhere.invalid"], {}),
    ]
    program = f"from tokasaurus.entry import run\nfor row in {rows!r}: print(run(*row))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == 6 * ["2"]
    *text, _, _, _, _ = lines = done.stderr.splitlines()
    assert [line.startswith("toka: error: unknown flag") for line in text] == [True, True]
    logged = [json.loads(line) for line in lines[2:]]
    assert [line["level"] for line in logged] == 4 * ["CRITICAL"], lines
    assert all("unknown flag 'prot'" in line["message"] for line in logged[:3])
    assert logged[3]["message"].startswith("cannot listen on host=nowhere.invalid")
