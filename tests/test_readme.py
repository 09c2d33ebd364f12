"""The README's commands and programs run, and answer what it says they answer.

A block in a language is a program; a block without one, right after it, is what it prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.engine

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer(README)]


def programs(language: str, containing: str) -> list[tuple[str, str]]:
    """Each program, and what the README says it prints."""
    found = []
    for (kind, code), (next_kind, printed) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind == language and containing in code:
            found.append((code, printed if next_kind == "" else ""))
    return found


def test_curl(engine):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    ((command, printed),) = programs("bash", "curl")
    seen = subprocess.run(
        command.replace("127.0.0.1:10210", f"127.0.0.1:{engine.port}").replace("curl ", "curl -s "),
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    said, says = json.loads(printed), json.loads(seen.stdout)
    assert says["choices"] == said["choices"]
    assert says["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"]


def test_openai_client(engine):
    for program, printed in programs("python", "from openai import OpenAI"):
        seen = subprocess.run(
            [sys.executable, "-c", program.replace("127.0.0.1:10210", f"127.0.0.1:{engine.port}")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert seen.stdout == printed


def test_batch(tmp_path):
    ((command, _),) = programs("bash", "toka-batch run")
    program = f"{sys.executable} -m tokasaurus.launch.batch_run run"
    subprocess.run(command.replace("toka-batch run", program), shell=True, cwd=tmp_path, check=True)
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["response"]["body"]["choices"][0]["text"] == " C D A B C D A B"


def test_lm_eval(engine, tmp_path):
    """As it stands, but on another task: the real one would be downloaded."""
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
    ((command, _),) = programs("bash", "lm_eval")
    for old, new in (
        ("127.0.0.1:10210", f"127.0.0.1:{engine.port}"),
        ("lm_eval ", f"{sys.executable} -m lm_eval "),
        ("gsm8k", f"sums --include_path {tmp_path} --output_path {tmp_path}/scores"),
    ):
        assert old in command
        command = command.replace(old, new)
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)
    (scores,) = (tmp_path / "scores").rglob("results_*.json")
    assert json.loads(scores.read_text())["results"]["sums"]["exact_match,none"] == 1.0


def test_embedded():
    ((program, printed),) = programs("python", "from tokasaurus import")
    seen = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert seen.stdout == printed


def test_ping(engine):
    (command,) = re.findall(r"`(toka-ping [^`]*)`", README)
    arguments = command.replace("toka-ping", "").strip()
    seen = subprocess.run(
        f"{sys.executable} -m tokasaurus.scripts.ping port={engine.port} {arguments}",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(seen.stdout.split()) > 5
