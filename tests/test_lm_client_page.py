"""The examples of docs/lm_client.md print what the page says, and it names every key."""

from __future__ import annotations

import pytest
import yaml
from documentation import ROOT, examples, mismatch, run_python

from tokasaurus.client.lm import LMConfig, TokasaurusConfig, call_log, get_lm_client
from tokasaurus.client.lm.evaluation import EvaluationConfig
from tokasaurus.client.lm.run import RUN, _with_shipped_file
from tokasaurus.config.parser import parse
from tokasaurus.config.schema import flags_of

PAGE = "docs/lm_client.md"
EXAMPLES = examples(PAGE)


def of(language: str):
    found = [example for example in EXAMPLES if example.language == language]
    assert found
    return found


@pytest.mark.engine
def test_examples_print_what_the_page_says(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(call_log, "_base", None)
    namespace = {}
    wrong = []
    for example in of("python"):
        printed = run_python(example.at(engine.port), namespace)
        wrong.append(mismatch(example.printed or "", printed))
    assert not any(wrong), "\n\n".join(filter(None, wrong))
    written = list(tmp_path.glob("results/llm_calls/validation/val_40/actions/*.json"))
    assert len(written) == 1
    assert written[0].name.startswith("action_episode_3_0")


def test_the_page_names_every_key():
    text = (ROOT / PAGE).read_text()
    names = [*LMConfig.model_fields, *TokasaurusConfig.model_fields]
    names += [f"evaluation.{name}" for name in flags_of(EvaluationConfig)]
    assert [name for name in names if f"`{name}" not in text] == []


def test_the_configurations_of_the_page_are_read():
    (shown,) = of("yaml")
    get_lm_client(yaml.safe_load(shown.program)["agent"]["lm_config"]).close()
    for example in of("bash"):
        words = example.program.replace("\\\n", " ").split()
        assert words[:3] == ["python", "-m", "tokasaurus.client.lm.run"]
        config = parse(RUN, _with_shipped_file(words[3:]))
        get_lm_client(config.agent["lm_config"]).close()


def test_the_shipped_files_stand_in_the_checkout_under_the_names_of_the_page():
    for name in ("memoryless_toka_demo.yaml", "finer/memoryless_toka_llama3b.yaml"):
        assert f"configs/{name}" in (ROOT / PAGE).read_text()
        assert (ROOT / "configs" / name).is_file()
