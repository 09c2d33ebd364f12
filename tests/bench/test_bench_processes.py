"""toka-bench with real processes: small runs, for their output and for what they leave behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import urllib.request

import msgspec
import pytest

from tokasaurus.bench.clients import Clients
from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedEngine, SimulatedService
from tokasaurus.bench.main import main
from tokasaurus.bench.requests import Requests
from tokasaurus.config.engine import EngineConfig
from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import EngineDead
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.configuration import simulated_slices

pytestmark = [pytest.mark.engine, pytest.mark.processes]


OUTPUT_TOKENS = 5


def new_engine():
    config = EngineConfig(kv_cache_num_tokens=8192, log_level="WARNING")
    return SimulatedEngine(simulated_slices(config), DevicePlan("fixed:0.01", (OUTPUT_TOKENS,)))


@pytest.fixture(scope="module")
def engine():
    """An engine for tests that leave it idle."""
    with new_engine() as running:
        yield running


def printed_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def loop_turns(microseconds, result):
    """A time in turns of an empty Python loop, which take 10 to 50 ns: plausible on any machine."""
    return microseconds * 1e3 / max(result["loop_turn_ns"])


def test_the_cost_of_a_request_to_the_python_client_is_measured(capsys):
    usual, callbacks = gc.get_threshold(), list(gc.callbacks)
    assert main(["client", "quick=T", "connections=100"]) == 0
    result = printed_json(capsys)
    assert (result["connections"], result["gc_threshold"]) == (100, 20_000)
    assert 1_000 < loop_turns(result["us_per_request"], result) < 1_000_000
    assert 0 <= result["gc_share"] < 1
    assert gc.get_threshold() == usual
    assert gc.callbacks == callbacks


@pytest.mark.parametrize("mix", ["easy", "full"])
def test_the_cost_of_steady_decode_is_measured(mix, capsys):
    assert main(["manager", "quick=T", f"mix={mix}", "parts=steady"]) == 0
    result = printed_json(capsys)
    (steady,) = result["steady"]
    assert steady["running"] == 64
    assert 32 <= steady["batch"] <= 96  # with prompts of those that begin
    assert steady["ms_per_step"] == pytest.approx(
        steady["us_per_token"] * steady["batch"] / 1e3, rel=0.01
    )
    assert 0 < loop_turns(steady["us_per_token"], result) < 5_000


def test_the_cost_with_a_pipeline_is_measured(capsys):
    assert main(["manager", "quick=T", "pp_size=3", "parts=steady"]) == 0
    (steady,) = printed_json(capsys)["steady"]
    assert steady["running"] == 64
    assert 8 <= steady["batch"] <= 18  # of four lanes


def test_the_cost_of_whole_sequences_is_measured(capsys):
    assert main(["manager", "quick=T", "parts=start_finish,reference,admission"]) == 0
    result = printed_json(capsys)
    assert "steady" not in result
    assert 0 < loop_turns(1e3 * result["admission_ms"], result) < 2e7
    assert 0 < loop_turns(result["reference_workload_us_per_token"], result) < 5_000
    assert 0 < loop_turns(result["start_finish_us"], result) < 500_000


@pytest.mark.long
def test_the_cost_of_the_server_is_measured(capsys):
    assert main(["server", "quick=T"]) == 0
    result = printed_json(capsys)
    units = ("small_request", "generated_token", "streamed_token", "event")
    assert all(result[f"us_per_{unit}"] > 0 for unit in units)


@pytest.mark.long
def test_the_cost_of_grammars_is_measured(capsys):
    assert main(["grammar", "num_sequences=2", "num_tokens=8", "rounds=1"]) == 0
    result = printed_json(capsys)
    assert result["tokens"] == 2 * 8
    assert all(result["tokens_per_s"][kind] > 0 for kind in ("free", "one grammar"))


def test_what_each_depth_of_look_ahead_costs_is_measured(capsys):
    words = ["fixed=1,8", "num_sequences=16", "mean_length=40", "step_ms=4", "waves=3"]
    assert main(["lookahead", *words]) == 0
    rows = printed_json(capsys)["lookahead"]
    assert [row["steps_ahead"] for row in rows] == ["adaptive", "fixed 1", "fixed 8"]
    _, shallow, deep = rows
    assert shallow["wasted_tokens"] == 0
    assert 0 < deep["wasted_per_sequence"] <= 7
    for row in rows:
        # How long the device waits depends on the machine; here that may be not at all.
        assert row["num_steps"] > 0, row
        assert row["ms_per_step"] == pytest.approx(4 + row["waited_ms_per_step"], abs=1e-4), row
        assert row["waited_share"] == pytest.approx(
            row["waited_ms_per_step"] / row["ms_per_step"], abs=1e-4
        ), row


def test_sequences_end_at_the_length_that_the_device_plans(engine):
    clients = Clients(engine)
    for request in Requests("full").series(0, 8, prompt_tokens=20, max_tokens=30):
        clients.send(request)
    clients.run_to_end(8)
    assert clients.num_tokens == 8 * OUTPUT_TOKENS


def test_aborted_sequences_end(engine):
    clients, max_tokens = Clients(engine), 1000
    for request in Requests("full").series(0, 4, prompt_tokens=20, max_tokens=max_tokens):
        clients.send(msgspec.structs.replace(request, stop_token_ids=()))
    clients.run_until_batch(engine.device.num_batches + 2 * OUTPUT_TOKENS)
    for request_id in range(4):
        clients.abort(request_id)
    clients.run_to_end(4)
    assert clients.num_tokens < 4 * max_tokens


def test_a_dead_process_is_noticed_and_leaves_nothing():
    running = new_engine()
    directory = running._directory
    with running:
        os.kill(running._processes["manager"].pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="manager ended: exit status -9"):
            Clients(running).run_for(5)
    assert all(process.returncode is not None for process in running._processes.values())
    assert not directory.exists()


def test_cpu_time_counts_what_a_process_computes():
    clock_s, start_s = time.process_time(), process_cpu_s(os.getpid())
    while time.process_time() < clock_s + 0.1:
        pass
    counted_s = process_cpu_s(os.getpid()) - start_s
    # ``ps`` is exact to 10 ms.
    assert 0.1 - 0.02 <= counted_s <= time.process_time() - clock_s + 0.02


def test_the_cpu_time_that_ps_prints_is_parsed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "another")
    monkeypatch.setattr("subprocess.check_output", lambda *_, **__: " 1-02:03:04.25\n")
    assert process_cpu_s(1) == 24 * 3600 + 2 * 3600 + 3 * 60 + 4.25


def test_two_simulated_services_run_side_by_side():
    """As they must beside a real engine: neither uses the default port or the default data_dir."""
    flags = EngineConfig(model=str(MODEL_DIR), log_level="WARNING", uvicorn_log_level="warning")
    facts = model_facts(str(MODEL_DIR), None)
    slices, plan = (
        simulated_slices(flags, facts),
        DevicePlan("instant", vocab_size=facts.vocab_size),
    )
    with SimulatedService(slices, plan) as one, SimulatedService(slices, plan) as other:
        for service in (one, other):
            with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/ping") as answer:
                assert answer.status == 200


def test_traces_that_cannot_be_made_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("tokasaurus.bench.server.is_installed", lambda: False)
    assert main(["server", "traces=T"]) == 2
    assert "tokasaurus[otlp]" in capsys.readouterr().err
