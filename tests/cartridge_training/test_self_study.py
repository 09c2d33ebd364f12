"""Conversations about a document: what the model is shown, and what is kept of what it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tokasaurus.cartridge_training.self_study import ChatForm, Sample, converse
from tokasaurus.errors import ConfigError

FORM = ChatForm("<bos>S:", "|U:", "|A:", "U:")


def render(messages: Sequence[dict[str, str]]) -> str:
    marks = {"system": "S", "user": "U"}
    return "<bos>" + "".join(f"{marks[m['role']]}:{m['content']}|" for m in messages) + "A:"


def encode(text: str) -> list[int]:
    return [ord(each) for each in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


class Model:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, questions: Sequence[str], *, whole: bool = True) -> None:
        self.asked: list[list[str]] = []
        self._questions = questions
        self._whole = whole

    def __call__(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float, top_k: int
    ) -> list[Sample]:
        self.asked.append([decode(each) for each in prompts])
        is_first = len(self.asked) == 1
        said = self._questions if is_first else [f"answer {i}" for i in range(len(prompts))]
        return [
            Sample(
                encode(text),
                text,
                is_whole=self._whole if is_first else not text.endswith("1"),
                top_ids=np.zeros((len(text), top_k), np.int64),
                top_logprobs=np.zeros((len(text), top_k), np.float32),
            )
            for text in said
        ]


def talk(model: Model, document: str = "a document", excerpt_tokens: int = 100, count: int = 3):
    return converse(
        model, encode, FORM, document, count=count, seed=0, excerpt_tokens=excerpt_tokens
    )


def test_a_template_is_cut_where_document_and_question_stand():
    assert ChatForm.of(render, "<bos>") == FORM


def test_a_template_without_system_messages_is_refused():
    def refuse(messages: Sequence[dict[str, str]]) -> str:
        raise ValueError("no such role")

    with pytest.raises(ConfigError, match="no such role"):
        ChatForm.of(refuse, "")
    with pytest.raises(ConfigError, match="does not write messages"):
        ChatForm.of(lambda messages: "U:" + messages[-1]["content"], "")


def test_questions_are_asked_of_the_document_and_learnt_without_it():
    model = Model(["why?", " who? more", "tell me"])
    conversations = talk(model)
    assert model.asked[0] == ["<bos>S:a document|U:"] * 3
    assert model.asked[1] == [f"<bos>S:a document|U:{q}|A:" for q in ("why?", "who?", "tell me")]
    # The second answer did not end by itself.
    assert [decode(each.prompt_ids) for each in conversations] == ["U:why?|A:", "U:tell me|A:"]
    assert [each.answer.text for each in conversations] == ["answer 0", "answer 2"]


def test_a_question_without_an_end_is_dropped_and_equal_ones_stand_once():
    model = Model(["why?", "cut of", "why? again"], whole=False)
    talk(model)
    assert model.asked[1] == ["<bos>S:a document|U:why?|A:"]


def test_a_long_document_is_shown_in_excerpts_from_anywhere_in_it():
    document = "".join(map(chr, range(200, 300)))
    model = Model(["why?"] * 50)
    conversations = talk(model, document, excerpt_tokens=10, count=50)
    shown = [each.removeprefix("<bos>S:").removesuffix("|U:") for each in model.asked[0]]
    assert all(each in document and len(each) == 10 for each in shown)
    assert min(map(document.index, shown)) < 20
    assert max(map(document.index, shown)) > 70
    # The same question about other excerpts has other answers.
    assert len(model.asked[1]) == len(set(shown)) > 30
    assert len(conversations) > 25
