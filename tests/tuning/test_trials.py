"""Trials with real engines: they measure, and whatever happens, nothing runs afterwards."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from engine_process import eventually

from tokasaurus.config.engine import EngineConfig
from tokasaurus.planner.demand import demand_of_shape
from tokasaurus.tuning.trial import Task
from tokasaurus.tuning.trial_process import run_trial

SMALL = {"kv_cache_num_tokens": 2048, "max_seqs_per_forward": 8, "max_tokens_per_forward": 64}
SHAPE = "prompt=16,output=6,n=2,requests=3,spread=0.5"
ENDLESS = "prompt=16,output=500,n=64,requests=500"


def task(shape, repetitions=2, **flags):
    trace = list(demand_of_shape(shape).trace)
    return Task(None, {**SMALL, **flags}, trace, 512, repetitions)


@pytest.fixture
def trials(monkeypatch):
    """Finds the processes of trials that this test, or a process of it, has begun."""
    mark = f"TOKA_TEST={secrets.token_hex(8)}"
    monkeypatch.setenv(*mark.split("="))

    def find():
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                words = (directory / "cmdline").read_bytes().split(b"\0")
                variables = (directory / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"tokasaurus.tuning.trial" in words and mark.encode() in variables:
                found.append(int(directory.name))
        return found

    return find


@pytest.mark.engine
@pytest.mark.processes
def test_a_trial_generates_what_the_workload_asks_and_its_process_ends(trials):
    measured = run_trial(task(SHAPE), ready_s=120, run_s=120)
    assert measured.problem == ""
    assert measured.tokens == demand_of_shape(SHAPE).num_output_tokens
    assert len(measured.seconds) == 2
    assert 0 <= measured.other_work <= 1
    assert measured.tokens_per_s == measured.tokens / min(measured.seconds)
    assert trials() == []


@pytest.mark.engine
@pytest.mark.processes
def test_a_trial_that_takes_too_long_is_ended(trials):
    measured = run_trial(task(ENDLESS), ready_s=120, run_s=0.5)
    assert (measured.is_late, measured.problem) == (True, "had not run the workload after 0 s")
    assert measured.seconds == ()
    assert trials() == []


def test_the_cpu_time_of_a_session_has_that_of_other_processes_in_it():
    program = """
        import subprocess, sys, time
        from tokasaurus.tuning.trial import _session_cpu_s
        before = _session_cpu_s()
        busy = "import time; exec('while time.process_time() < 0.5: pass'); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", busy])
        while _session_cpu_s() - before < 0.5:  # this process sleeps
            time.sleep(0.1)
        child.kill()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, start_new_session=True, timeout=60).returncode == 0


@pytest.mark.long
def test_flags_that_no_engine_takes_are_the_problem_of_a_trial():
    measured = run_trial(task(SHAPE, max_seqs_per_forward=9, max_tokens_per_forward=4), 120, 120)
    assert measured.problem.startswith("max_seqs_per_forward=9 exceeds max_tokens_per_forward=4")
    assert measured.tokens_per_s == 0


@pytest.mark.engine
@pytest.mark.processes
def test_a_trial_ends_with_its_owner(trials):
    program = f"""
        from tokasaurus.planner.demand import demand_of_shape
        from tokasaurus.tuning.trial import Task
        from tokasaurus.tuning.trial_process import run_trial
        trace = list(demand_of_shape({ENDLESS!r}).trace)
        run_trial(Task(None, {SMALL!r}, trace, 512, 1), 120, 120)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])

    def has_begun():
        assert owner.poll() is None
        return trials()

    eventually(has_begun, "the trial begins")
    time.sleep(1)  # it imports, or loads the model
    owner.kill()
    owner.wait()
    eventually(lambda: not trials(), "the trial ends")


@pytest.mark.long
def test_toka_tune_is_stopped_goes_on_and_writes_a_file(trials, tmp_path):
    words = ["tune", "workload=prompt=16,output=8,n=4,requests=40", "run_s=0.5", "max_s=60"]
    command = [sys.executable, "-m", "tokasaurus.entry", *words, "repetitions=1", "dp_size=1"]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "the engine's defaults: " in line:  # the first trial is in the log
            break
    first.send_signal(signal.SIGINT)
    rest = first.stderr.read()
    assert first.wait() == 130
    assert "stopped; the same command goes on from here" in rest
    assert trials() == []
    assert not (tmp_path / "tuned.yaml").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tuned.yaml.trials has 1 trials of an earlier run" in done.stderr
    assert done.stdout.splitlines()[-1] == "toka config=tuned.yaml"
    text = (tmp_path / "tuned.yaml").read_text()
    assert "# workload: prompt=16,output=8,n=4,requests=40; each run took " in text
    assert "# measured: " in text
    config = EngineConfig.from_flags(config=str(tmp_path / "tuned.yaml"))
    assert config.dp_size == 1
    assert yaml.safe_load(text)["device"] == "cpu"
    assert trials() == []
