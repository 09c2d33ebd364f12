"""toka-bench with real processes: small, for what it prints and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from tokasaurus.bench.clients import Clients
from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedEngine
from tokasaurus.bench.main import main
from tokasaurus.bench.requests import Requests
from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import EngineDead
from tokasaurus.planner.configuration import simulated_slices

pytestmark = pytest.mark.engine


def engine(cost="instant", output_tokens=None):
    plan = DevicePlan(cost) if output_tokens is None else DevicePlan(cost, output_tokens)
    return SimulatedEngine(
        simulated_slices(EngineConfig(kv_cache_num_tokens=8192, log_level="WARNING")), plan
    )


@pytest.mark.parametrize("mix", ["easy", "full"])
def test_the_cost_of_steady_decode_is_measured(mix, capsys):
    assert main(["manager", "quick=T", f"mix={mix}", "parts=steady"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (steady,) = result["steady"]
    assert steady["running"] == 64
    assert 32 <= steady["batch"] <= 72
    assert steady["ms_per_step"] == pytest.approx(
        steady["us_per_token"] * steady["batch"] / 1e3, rel=0.01
    )
    assert 0 < steady["us_per_token"] < 200


def test_the_cost_of_whole_sequences_is_measured(capsys):
    assert main(["manager", "quick=T", "parts=start_finish,reference,admission"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "steady" not in result
    assert 0 < result["admission_ms"] < 1000
    assert 0 < result["reference_workload_us_per_token"] < 200
    assert 0 < result["start_finish_us"] < 20_000


def test_a_shallow_lookahead_lets_the_device_wait_and_a_deep_one_wastes_tokens(capsys):
    words = ["fixed=1,8", "num_sequences=16", "mean_length=20", "step_ms=4"]
    assert main(["lookahead", *words]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["lookahead"]
    assert [row["steps_ahead"] for row in rows] == ["adaptive", "fixed 1", "fixed 8"]
    _, shallow, deep = rows
    assert shallow["waited_ms_per_step"] > deep["waited_ms_per_step"]
    assert shallow["wasted_tokens"] == 0
    assert 0 < deep["wasted_per_sequence"] <= 7
    assert deep["ms_per_step"] >= 4


def test_sequences_end_where_the_device_says():
    with engine(output_tokens=(5,)) as running:
        clients = Clients(running)
        for request in Requests("full").series(0, 8, prompt_tokens=20, max_tokens=30):
            clients.send(request)
        clients.run_to_end(8)
        assert clients.num_tokens == 8 * 5


def test_what_is_aborted_ends():
    with engine(cost="fixed:0.01") as running:
        clients = Clients(running)
        for request in Requests("full").series(0, 4, prompt_tokens=20, max_tokens=4000):
            clients.send(request)
        clients.run_until_batch(5)
        for request_id in range(4):
            clients.abort(request_id)
        clients.run_to_end(4)
        assert clients.num_tokens < 4 * 1000


def test_a_process_that_dies_is_noticed_and_nothing_is_left():
    running = engine()
    directory = running._directory
    with running:
        os.kill(running._processes["manager"].pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="manager ended: exit status -9"):
            Clients(running).run_for(5)
    assert all(process.returncode is not None for process in running._processes.values())
    assert not directory.exists()


def test_cpu_time_counts_what_a_process_computes():
    before, end = process_cpu_s(os.getpid()), time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert 0.08 <= process_cpu_s(os.getpid()) - before <= 0.2


def test_cpu_time_by_ps(monkeypatch):
    monkeypatch.setattr(sys, "platform", "another")
    monkeypatch.setattr("subprocess.check_output", lambda *_, **__: " 1-02:03:04.25\n")
    assert process_cpu_s(1) == 24 * 3600 + 2 * 3600 + 3 * 60 + 4.25
