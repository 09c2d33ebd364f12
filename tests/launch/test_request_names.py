"""A request has one name in the log of every process, whoever gave it."""

from __future__ import annotations

import pytest
from engine_process import eventually, running

pytestmark = [pytest.mark.engine, pytest.mark.processes]

FLAGS = (
    "log_format=json",
    "log_level=DEBUG",
    "kv_cache_num_tokens=4096",
    "cpu_threads=1",
    "max_seqs_per_forward=16",
)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_all_processes_name_a_request_alike(tmp_path, num_processes):
    with running(tmp_path, *FLAGS, f"server_processes={num_processes}") as engine:
        engine.client().completions.create(
            model="m", prompt="Once", max_tokens=2, extra_headers={"X-Request-Id": "mine/7"}
        )
        names = {"server", "manager", "worker"}
        if num_processes > 1:
            names |= {"http-1"}

        def processes():
            found = {line["process"] for line in engine.json_log(request_id="mine/7")}
            return {"http-1" if name == "http-2" else name for name in found}

        eventually(lambda: processes() == names, names)
        if num_processes == 1:
            check_batch(engine)


def check_batch(engine):
    """The request id in the output of a batch leads to the lines of the log."""
    line = {
        "custom_id": "first one",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "Once", "max_tokens": 2},
    }
    (answer,) = engine.answered_batch([line])
    found = engine.json_log(request_id=answer["response"]["request_id"])
    assert {line["process"] for line in found} == {"server", "manager", "worker"}
    assert any("'first one'" in line["message"] for line in found)
