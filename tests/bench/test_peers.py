"""toka-bench peers and toka-bench roofline, with a fake peer and tiny models."""

from __future__ import annotations

import dataclasses
import json
import shlex
import stat
import sys
import xml.etree.ElementTree
from dataclasses import replace

import pytest
import torch

from tokasaurus.bench.main import main
from tokasaurus.bench.peers import command, driver
from tokasaurus.bench.peers.checkpoint import SHAPES, make_checkpoint
from tokasaurus.bench.peers.processes import EngineProcess
from tokasaurus.bench.peers.results import Measurement, Results
from tokasaurus.bench.peers.workloads import WORKLOADS, Workload
from tokasaurus.errors import ConfigError

# As much of vLLM as the driver uses.
FAKE_VLLM = """
import time
from types import SimpleNamespace

__version__ = "9.9"
print("a line that is not an answer")

def SamplingParams(**fields):
    return SimpleNamespace(**fields)

class LLM:
    def __init__(self, model, **flags):
        print(flags)

    def generate(self, prompts, params, use_tqdm):
        time.sleep(0.01)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * each.max_tokens)] * each.n)
            for each in params
        ]
"""

# As much of SGLang as the driver uses.
FAKE_SGLANG = """
__version__ = "8.8"

class Engine:
    def __init__(self, **flags):
        print(flags)

    def generate(self, input_ids, sampling_params):
        assert len(input_ids) == len(sampling_params)
        return [
            {"meta_info": {"completion_tokens": each["max_new_tokens"]}}
            for each in sampling_params
            for _ in range(each["n"])
        ]
"""

MEASURED = Measurement(
    dtype="float32",
    workload="mixed",
    size=1.0,
    shape="tiny",
    tokens=100,
    seconds={"tokasaurus": [1.0, 2.0, 4.0], "vllm": [2.0, 1.0, 4.8]},
    products_s=1.5,
    products_run_s=2.0,
    flags=(),
    date="2026-01-01",
)


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Makes the Python of an environment whose vLLM is this source."""
    monkeypatch.setattr(command, "cache_directory", lambda: tmp_path / "cache")

    def make(source, name="vllm"):
        packages = tmp_path / "packages"
        packages.mkdir()
        (packages / f"{name}.py").write_text(source)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return str(python)

    return make


@pytest.mark.engine
@pytest.mark.processes
def test_engines_take_turns_and_the_results_are_kept(peer, tmp_path, capsys):
    output, plot = tmp_path / "peers.json", tmp_path / "peers.svg"
    flags = ["peers", f"vllm={peer(FAKE_VLLM)}", "shape=tiny", "repetitions=2", f"output={output}"]
    assert main([*flags, "workloads=single,repeated", "size=0.1", "dtypes=float32"]) == 0
    printed = capsys.readouterr()
    order = [line for line in printed.err.splitlines() if "tokens/s" in line]
    names = [line.split(": ")[1].split()[0] for line in order]
    assert names == ["tokasaurus", "vllm", "vllm", "tokasaurus"] * 2
    measured = json.loads(printed.out.splitlines()[-1])["measurements"]
    assert [each["tokens"] for each in measured] == [128, 32 * 64]
    for each in measured:
        assert all(len(seconds) == 2 for seconds in each["seconds"].values())
        assert 0 < each["products_s"] < each["products_run_s"]
    assert main(["peers", "repetitions=0", f"output={output}", f"plot={plot}"]) == 0
    table = capsys.readouterr().out
    assert "| one request alone, float32 " in table
    assert "| repeated, n=32, float32 " in table
    assert "vllm 9.9, tokens/s" in table
    assert "one request alone" in "".join(xml.etree.ElementTree.parse(plot).getroot().itertext())


@pytest.mark.engine
@pytest.mark.processes
def test_ours_with_int8_weights_is_one_more_engine(tmp_path, capsys):
    flags = ["shape=tiny", "workloads=single", "dtypes=float32", "repetitions=1"]
    assert main(["peers", "int8=T", *flags, f"plot={tmp_path / 'peers.svg'}"]) == 0
    printed = capsys.readouterr().out
    assert "times int8" in printed
    (measured,) = json.loads(printed.splitlines()[-1])["measurements"]
    assert list(measured["seconds"]) == ["tokasaurus", "int8"]


def test_a_dry_run_for_a_gpu_says_what_it_would_do(peer, capsys):
    python = peer(FAKE_VLLM)
    flags = [f"vllm={python}", f"sglang={python}", "workloads=repeated", "size=8"]
    assert main(["peers", "device=cuda", "dry_run=T", *flags]) == 0
    *commands, load = capsys.readouterr().out.splitlines()
    settings = [json.loads(shlex.split(line)[-1]) for line in commands]
    assert [each["engine"] for each in settings] == ["tokasaurus", "vllm", "sglang"]
    assert [shlex.split(line)[0] for line in commands] == [sys.executable, python, python]
    for each in settings:
        assert each["dtype"] == "bfloat16"
        # 64 GiB, for the shape of Llama-3.2-1B.
        assert each["cache_tokens"] == (64 << 30) // (2 * 16 * 8 * 64 * 2)
        assert each["max_seqs"] == 4096
    assert "32 requests, 1,024 completions, 65,536 tokens" in load


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["peers", "device=cuda", "shape=tiny"]) != 0
    assert "dry_run=T needs none" in capsys.readouterr().err
    assert main(["roofline", "device=cuda"]) != 0
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.processes
def test_engines_of_a_gpu_run_what_they_are_asked(peer, tmp_path):
    """On this machine's processor, and without SGLang itself."""
    directory = tmp_path / "model"
    directory.mkdir()
    make_checkpoint(SHAPES["tiny"], directory)
    requests = Workload("repeated", 512, 0.1).requests()
    settings = {
        "engine": "sglang",
        "model": str(directory),
        "device": "cpu",
        "dtype": "float32",
        "max_seqs": 64,
        "batch_tokens": 256,
        "cache_gib": 1,
        "cache_tokens": 16384,
        "flags": {},
    }
    with EngineProcess(peer(FAKE_SGLANG, "sglang"), settings) as sglang:
        sglang.await_ready()
        assert sglang.version == "8.8"
        assert sglang.run(requests) > 0
    ours = driver.TokasaurusProcesses(settings)
    asked = [dataclasses.asdict(each) for each in requests]
    assert ours.run(asked) == 32 * 64
    ours.close()


def test_a_peer_that_does_not_start_is_an_error_with_its_reason(peer, capsys):
    python = peer("raise SystemExit('this build does not fit that processor')")
    assert main(["peers", f"vllm={python}", "shape=tiny", "workloads=single"]) == 1
    printed = capsys.readouterr().err
    assert "toka-bench peers: error: vllm ended with status 1:" in printed
    assert "this build does not fit that processor" in printed


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("vllm=/no/such/python", "vllm=/no/such/python: there is no such file"),
        ("flags=linear", "flags=linear: expected key=value"),
        ("repetitions=0", "name it with output=FILE"),
        ("sglang=/usr/bin/python3", "compared with device=cuda only"),
        ("size=0", "expected a number above 0"),
        ("workloads=other", "must be one of"),
    ],
)
def test_wrong_flags_are_refused(word, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["peers", "shape=tiny", word]))
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for text in ("{}", "[", '{"versions": {}, "measurements": [{}]}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a file of this command"):
            Results.read(str(path))
        assert path.read_text() == text


def test_a_ratio_is_the_median_of_the_ratios_of_repetitions():
    assert MEASURED.ratio("vllm") == 1.2
    assert MEASURED.rate("vllm") == 50.0
    assert MEASURED.products_share == 0.75


def test_results_survive_their_file(tmp_path):
    path = str(tmp_path / "peers.json")
    results = Results({"tokasaurus": "1", "vllm": "2"})
    results.add(MEASURED)
    results.add(replace(MEASURED, dtype="bfloat16"))
    results.write(path)
    read = Results.read(path)
    assert read.tables() == results.tables()
    assert json.dumps(read.as_json()) == json.dumps(results.as_json())


def test_repetitions_have_the_same_lengths_and_other_ids():
    for name in WORKLOADS:
        workload, again = Workload(name, 512, 0.2), Workload(name, 512, 0.2)
        first, second = workload.requests(), workload.requests()
        assert again.requests() == first, name
        for one, other in zip(first, second, strict=True):
            assert one.prompt != other.prompt, name
            assert len(one.prompt) == len(other.prompt), name
            assert (one.max_tokens, one.n) == (other.max_tokens, other.n), name


def test_repeated_sampling_has_the_same_shape_grouped_and_separate():
    shapes = {}
    for name in ("repeated", "separate"):
        requests = Workload(name, 512).requests()
        assert len({tuple(each.prompt) for each in requests}) == 4
        assert len({tuple(each.prompt[:384]) for each in requests}) == 1
        shapes[name] = (
            sum(each.n for each in requests),
            {(len(each.prompt), each.max_tokens) for each in requests},
        )
    assert shapes["repeated"] == shapes["separate"] == (128, {(512, 64)})


def test_the_roofline_of_the_machine_is_measured(capsys):
    assert main(["roofline", "matrix=64", "memory_mib=1", "rounds=2", "dtypes=float32"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["matrix_gflop_per_s"]) == {"float32"}
    assert result["matrix_gflop_per_s"]["float32"] > 0
    assert result["memory_gb_per_s"] > 0
