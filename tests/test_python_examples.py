"""The examples of docs/python.md print what the page says, and it names every method."""

from __future__ import annotations

import pytest
from documentation import ROOT, examples, mismatch, run_python

from tokasaurus import LLM, AsyncLLM

PAGE = "docs/python.md"


@pytest.mark.engine
def test_examples_print_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    wrong = []
    for example in examples(PAGE):
        assert example.language == "python"
        printed = run_python(example.program, namespace)
        wrong.append(mismatch(example.printed or "", printed))
    assert len(wrong) > 3
    assert not any(wrong), "\n\n".join(filter(None, wrong))


def test_the_page_names_every_method():
    text = (ROOT / PAGE).read_text()
    names = {name for kind in (LLM, AsyncLLM) for name in vars(kind) if not name.startswith("_")}
    missing = sorted(name for name in names if f"`{name}" not in text)
    assert missing == []
