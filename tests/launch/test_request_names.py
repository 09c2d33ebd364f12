"""A request has one name in the log of every process, whoever gave it."""

from __future__ import annotations

import json

import pytest
from engine_process import eventually, started

pytestmark = pytest.mark.engine

FLAGS = (
    "log_format=json",
    "log_level=DEBUG",
    "kv_cache_num_tokens=4096",
    "cpu_threads=1",
    "max_seqs_per_forward=16",
)


def lines_of(engine, **fields):
    """The lines of the log so far that have these fields; the last one may be incomplete."""
    lines = [json.loads(line) for line in engine.log.splitlines(keepends=True) if line[-1:] == "\n"]
    return [line for line in lines if fields.items() <= line.items()]


def ready_port(engine):
    assert engine.process.poll() is None, engine.log
    ready = [line for line in lines_of(engine) if line["message"].startswith("ready: ")]
    if ready:
        engine._port = int(ready[0]["message"].rsplit(":", 1)[1].removesuffix("/v1"))
    return bool(ready)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_all_processes_name_a_request_alike(tmp_path, num_processes):
    with started(tmp_path, *FLAGS, f"server_processes={num_processes}") as engine:
        eventually(lambda: ready_port(engine), "ready")
        engine.client().completions.create(
            model="m", prompt="Once", max_tokens=2, extra_headers={"X-Request-Id": "mine/7"}
        )
        names = {"server", "manager", "worker"}
        if num_processes > 1:
            names |= {"http-1"}

        def processes():
            found = {line["process"] for line in lines_of(engine, request_id="mine/7")}
            return {"http-1" if name == "http-2" else name for name in found}

        eventually(lambda: processes() == names, names)
        if num_processes == 1:
            check_batch(engine)


def check_batch(engine):
    """The request id in the output of a batch leads to the lines of the log."""
    client = engine.client()
    line = {
        "custom_id": "first one",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "Once", "max_tokens": 2},
    }
    file = client.files.create(file=json.dumps(line).encode(), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch")
    output = client.batches.retrieve(batch.id).output_file_id
    name = json.loads(client.files.content(output).text)["response"]["request_id"]
    found = lines_of(engine, request_id=name)
    assert {line["process"] for line in found} == {"server", "manager", "worker"}
    assert any("'first one'" in line["message"] for line in found)
