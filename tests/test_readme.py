"""Every command and program of the README runs, and prints what the README says.

Those that would install or download are only read: their targets, extras and flags exist.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import yaml
from documentation import ROOT, examples, mismatch, run_bash, run_python

import tokasaurus
from tokasaurus.commands import COMMANDS
from tokasaurus.config.parser import parse_command_line

README = "README.md"
EXAMPLES = examples(README)
TEXT = (ROOT / README).read_text()
SMALL = {"max_tokens_per_forward": 64, "max_seqs_per_forward": 8, "kv_cache_num_tokens": 2048}
"""Flags with which an engine starts sooner; they change no token."""


def containing(text: str):
    """The examples with this text; at least one."""
    found = [example for example in EXAMPLES if text in example.program]
    assert found, text
    return found


def commands(name: str) -> list[list[str]]:
    """The arguments of each command of the README that runs the program."""
    programs = [each.program for each in EXAMPLES if each.language == "bash"]
    text = "\n".join([*programs, *re.findall("`([^`\n]+)`", TEXT)])
    found = re.findall(rf"^{name}(?: .*)?$", text.replace("\\\n", " "), re.MULTILINE)
    assert found, name
    return [shlex.split(each, comments=True)[1:] for each in found]


def test_every_command_is_tested_here():
    programs = [each.program.replace("\\\n", " ") for each in EXAMPLES if each.language == "bash"]
    names = {line.split()[0] for program in programs for line in program.splitlines()}
    tested = {"make", "pip", "toka", "curl", "toka-ping", "echo", "toka-batch", "lm_eval"}
    assert names == tested


def test_make_has_the_targets():
    targets = [target for arguments in commands("make") for target in arguments]
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pip_installs_what_exists():
    extras = metadata("tokasaurus").get_all("Provides-Extra")
    for _install, *arguments in commands("pip install"):
        for argument in arguments:
            extra = re.fullmatch(r"(?:\.|tokasaurus(?=\[))(?:\[(\w+)\])?", argument)
            assert (ROOT / argument).is_file() or argument == "-c" or extra, argument
            assert extra is None or extra[1] in (None, *extras), argument


def test_the_flags_of_toka_exist():
    for arguments in commands("toka"):
        if arguments and arguments[0] in COMMANDS:
            continue
        config = parse_command_line(arguments, {})
        assert all(hasattr(config, each.split("=")[0]) for each in arguments)


@pytest.mark.engine
def test_curl(engine):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    (example,) = containing("curl")
    output, _ = run_bash(example.at(engine.port).replace("curl ", "curl -s "))
    assert mismatch(example.printed, output) == ""


@pytest.mark.engine
def test_openai_client(engine):
    namespace = {}
    for example in containing("client."):
        assert run_python(example.at(engine.port), namespace) == example.printed


@pytest.mark.engine
def test_ping(engine):
    (example,) = containing("toka-ping")
    program = f"{sys.executable} -m tokasaurus.scripts.ping port={engine.port}"
    output, _ = run_bash(example.program.replace("toka-ping", program))
    assert len(output.split()) > 5


@pytest.mark.engine
def test_batch(tmp_path):
    (example,) = containing("toka-batch run")
    program = f"{sys.executable} -m tokasaurus.launch.batch_run run"
    flags = " ".join(f"{name}={value}" for name, value in SMALL.items())
    run_bash(f"{example.program.rstrip()} {flags}".replace("toka-batch run", program), tmp_path)
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["response"]["body"]["choices"][0]["text"] == " C D A B C D A B"


@pytest.mark.engine
def test_lm_eval(engine, tmp_path, monkeypatch):
    """The command as it stands, but on another task: the real one would be downloaded."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "sums.jsonl"
    data.write_text(json.dumps({"question": "A B C D A B C D A B", "answer": " C D A B C D A B"}))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    (example,) = containing("lm_eval")
    command = example.at(engine.port).replace("\\\n", " ")
    assert "--tasks gsm8k" in command
    command = command.replace("gsm8k", f"sums --include_path {tmp_path}")
    # Reading the harness's own 13,000 tasks takes ten times as long as the rest.
    quick = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", quick)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--output_path", f"{tmp_path}/scores"])
    cli_evaluate()
    (scores,) = (tmp_path / "scores").rglob("results_*.json")
    assert json.loads(scores.read_text())["results"]["sums"]["exact_match,none"] == 1.0


@pytest.mark.engine
def test_embedded(monkeypatch):
    (example,) = containing("from tokasaurus import")
    monkeypatch.setattr(
        tokasaurus, "LLM", functools.partial(tokasaurus.LLM, **SMALL), raising=False
    )
    assert run_python(example.program, {}) == example.printed
