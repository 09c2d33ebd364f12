"""The examples of docs/clients.md print what the page says, and it names the versions tested."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from documentation import ROOT, examples, mismatch, run_bash, run_python
from engine_process import PROGRAM

PAGE = "docs/clients.md"


def printed(example):
    return example.printed or ""


def test_python_examples_print_what_the_page_says(engine, monkeypatch, capfd):
    monkeypatch.setattr("litellm.suppress_debug_info", True)
    namespace, wrong = {}, []
    for example in examples(PAGE):
        if example.language == "python":
            said = run_python(example.at(engine.port), namespace)
            wrong.append(mismatch(printed(example), said))
    assert len(wrong) >= 8
    assert not any(wrong), "\n\n".join(filter(None, wrong))


@pytest.mark.timeout(600)
def test_lm_eval_examples_print_what_the_page_says(engine, tmp_path, monkeypatch):
    """In the project's environment, which has the harness."""
    monkeypatch.setenv("PATH", f"{Path(PROGRAM[0]).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = [example for example in examples(PAGE) if example.language == "bash"]
    assert len(found) == 4
    for example in found:
        said, _ = run_bash(example.at(engine.port), tmp_path)
        assert mismatch(printed(example), said) == ""


def test_the_page_names_the_versions_that_are_tested():
    rows = re.findall(r"^\| \[(.*)\]\(.*\) \| (.*) \|$", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert len(rows) == 5
    for name, versions in rows:
        if name != "lm_eval":
            assert version(name) in versions.split(", "), name
