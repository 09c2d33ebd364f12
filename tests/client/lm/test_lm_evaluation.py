"""The small evaluation: its data, how replies are judged, what reaches the threads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from tokasaurus.client.lm import LanguageModel, LMConfig, json_log_context
from tokasaurus.client.lm.call_log import current_context
from tokasaurus.client.lm.evaluation import (
    MATCHES,
    EvaluationConfig,
    Question,
    evaluate,
    read_questions,
)
from tokasaurus.client.lm.run import _PACKAGE
from tokasaurus.demo.corpus.dinosaur_table import DINOSAURS
from tokasaurus.errors import ConfigError


class Parrot(LanguageModel):
    """Says what it is asked, and remembers in which contexts."""

    def __init__(self):
        super().__init__(LMConfig(model="parrot"))
        self.contexts = []

    def call(self, system_prompt, user_prompt):
        self.contexts.append(current_context())
        return f"{system_prompt}|{user_prompt}"


def config_of(path, **fields) -> EvaluationConfig:
    return EvaluationConfig(data=str(path), **fields)


def test_the_dinosaurs_are_those_of_the_bundled_models_corpus():
    by_name = {dinosaur.name: dinosaur for dinosaur in DINOSAURS}
    questions = read_questions(config_of("dinosaurs.jsonl"))
    assert len(questions) == 2 * len(DINOSAURS)
    for each in questions:
        (name,) = (name for name in by_name if f"{name} " in each.question.replace("?", " "))
        d = by_name[name]
        facts = (d.diet, d.period, d.length, d.place, d.meaning, d.feature)
        assert each.answers[0] in facts, each


def test_the_tags_of_the_reports_are_those_of_the_prompt():
    shipped = _PACKAGE / "configs/finer/memoryless_toka_llama3b.yaml"
    prompt = yaml.safe_load(shipped.read_text())["evaluation"]["system_prompt"]
    questions = read_questions(config_of("finer.jsonl"))
    tags = {each.answers[0] for each in questions}
    assert len(questions) == 36
    assert len(tags) == 12
    assert all(f"{tag}," in prompt.replace("\n", ",") for tag in tags)


JUDGED = [
    ("exact", "  Late\n cretaceous. ", "Late Cretaceous", True),
    ("exact", "the Late Cretaceous", "Late Cretaceous", False),
    ("contains", "It lived in the late Cretaceous.", "Late Cretaceous", True),
    ("contains", "It lived in the Jurassic.", "Late Cretaceous", False),
    ("exact", "", "x", False),
]


def test_replies_are_judged():
    for match, reply, answer, expected in JUDGED:
        assert MATCHES[match](reply, answer) is expected, (match, reply)


def test_every_question_is_asked_once_with_its_context(tmp_path):
    config = config_of(
        "unused", system_prompt="{question}", prompt="<{question}>{x}", num_threads=4
    )
    config = replace(config, match="contains")
    questions = [Question(f"q{index}", ("no", f"q{index}")) for index in range(20)]
    lm = Parrot()
    with json_log_context(run="here"):
        outcomes = sorted(evaluate(lm, questions, config), key=lambda outcome: outcome.index)
    assert [outcome.reply for outcome in outcomes] == [
        f"{{question}}|<q{index}>{{x}}" for index in range(20)
    ]
    assert all(outcome.is_right for outcome in outcomes)
    assert sorted(each["episode_index"] for each in lm.contexts) == list(range(20))
    assert all((each["mode"], each["run"]) == ("val", "here") for each in lm.contexts)


WRONG = [
    ("", "no questions"),
    ("{", "`question` and `answer`"),
    ("[1]", "`question` and `answer`"),
    ('{"question": "q"}', "'answer'"),
    ('{"question": "q", "answer": 3}', "a text or a list"),
    ('{"question": "q", "answer": []}', "a text or a list"),
]


def test_data_that_is_wrong_is_named_with_its_line(tmp_path):
    right = json.dumps({"question": "q", "answer": ["a", "b"]})
    path = tmp_path / "data.jsonl"
    path.write_text(f"{right}\n\n{right}\n")
    assert read_questions(config_of(path)) == [Question("q", ("a", "b"))] * 2
    assert len(read_questions(config_of(path, limit=1))) == 1
    for line, expected in WRONG:
        path.write_text(f"{line}\n")
        with pytest.raises(ConfigError, match=expected):
            read_questions(config_of(path))
