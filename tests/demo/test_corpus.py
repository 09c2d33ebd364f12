"""The corpus is the same every time, and never shows what the evaluation asks for."""

from __future__ import annotations

import hashlib
import re
from fractions import Fraction
from itertools import islice, pairwise
from random import Random

import pytest

from tokasaurus.demo import corpus
from tokasaurus.demo.corpus import calculator, copying, documents, tool_table
from tokasaurus.demo.corpus.arithmetic import compute, pair_is_held_out, problem
from tokasaurus.demo.corpus.chat_table import JOKES
from tokasaurus.demo.corpus.dinosaur_table import DINOSAURS
from tokasaurus.demo.corpus.dinosaurs import TOPICS, questions
from tokasaurus.demo.corpus.document import Chat, Document, is_held_out
from tokasaurus.demo.corpus.words import HELD_OUT_WORDS, invent_word
from tokasaurus.demo.tokenizer import render

NUM_DOCUMENTS = 12_000
DIGESTS = {
    "COPYING_FIRST": "2714357620610a6f",
    "WORKED_SUMS": "2e19031d66f79540",
    "CALCULATOR": "6b379d8f3b331446",
}
# Of the first thousand documents.
LAST_DIGESTS = {"EXPRESSIONS": "dd2fc04fb19246ea", "PATTERNS": "c207ebce26803e29"}


@pytest.fixture(scope="module", params=DIGESTS)
def mixture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def training(mixture: str) -> list[Document]:
    return list(islice(documents(seed=0, mixture=getattr(corpus, mixture)), NUM_DOCUMENTS))


@pytest.fixture(scope="module")
def rendered(training: list[Document]) -> str:
    return "\0".join(render(document) for document in training)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_corpus_is_the_one_that_was_trained_on(rendered: str, mixture: str) -> None:
    # After a change of recipe: train again, and write down the new scores.
    assert digest(rendered) == DIGESTS[mixture]


def test_the_last_mixtures_are_those_that_were_trained_on() -> None:
    made = {}
    for name in LAST_DIGESTS:
        first = islice(documents(seed=0, mixture=getattr(corpus, name)), 1000)
        made[name] = digest("\0".join(map(render, first)))
    assert made == LAST_DIGESTS


def test_another_seed_gives_other_documents(training: list[Document]) -> None:
    others = list(islice(documents(seed=1), 1000))
    assert sum(one == other for one, other in zip(others, training, strict=False)) < 10


def test_held_out_words_never_appear(rendered: str) -> None:
    seen = set(re.findall(r"[a-z]+", rendered.lower()))
    assert "banana" in seen
    assert not seen & HELD_OUT_WORDS


def test_held_out_invented_words_never_appear(rendered: str) -> None:
    rng = Random(0)
    asked = {invent_word(rng, held_out=True) for _ in range(2000)}
    # A jumble of three letters may be anything; longer ones do not happen to be words.
    asked = {word for word in asked if len(word) > 4}
    seen = set(re.findall(r"[a-z]+", rendered.lower()))
    assert len(asked) > 1000
    assert not asked & seen


SIGNS = {"plus": "+", "minus": "-", "times": "x", "*": "x"}
# Not inside a number; neighbours may share an operand. A call writes every large sum like this.
SUM = re.compile(r"(?<![\d.])(?=(\d+) ([+\-x*/]|plus|minus|times) (\d+)(?!\.?\d))")


def test_held_out_sums_never_appear(rendered: str) -> None:
    sums = {(int(a), SIGNS.get(op, op), int(b)) for a, op, b in SUM.findall(rendered)}
    assert len(sums) > 700
    assert not [each for each in sums if pair_is_held_out(*each)]


def test_held_out_wordings_never_appear(training: list[Document]) -> None:
    chats = (document for document in training if isinstance(document, Chat))
    said = {m.content.lower().rstrip(".?") for chat in chats for m in chat.messages}
    shown, held_out = (
        {
            question.format(d=d).lower().rstrip(".?")
            for d in DINOSAURS
            for topic in TOPICS
            for question in questions(d, topic, held_out=side)
        }
        for side in (False, True)
    )
    assert len(shown & said) > 500
    assert len(held_out) > 100
    assert not held_out & said


def test_every_fact_is_asked_for_in_some_wording() -> None:
    assert all(questions(d, topic, held_out=False) for d in DINOSAURS for topic in TOPICS)


def test_solutions_are_right() -> None:
    for held_out in (False, True):
        rng = Random(0)
        for _ in range(500):
            item = problem(rng, held_out=held_out)
            steps = re.findall(r"(\d+) ([+\-x]) (\d+) = (\d+)\.", item.solution)
            assert all(compute(int(a), op, int(b)) == int(c) for a, op, b, c in steps), item
            pairs = [pair_is_held_out(int(a), op, int(b)) for a, op, b, _ in steps]
            assert set(pairs) == {held_out}, item
            assert item.solution.endswith(f"\nAnswer: {steps[-1][3]}"), item
            assert item.answer == int(steps[-1][3]) > 0, item


def test_invented_words_come_from_the_requested_side_of_the_split() -> None:
    rng = Random(0)
    assert not any(is_held_out(invent_word(rng)) for _ in range(500))
    assert all(is_held_out(invent_word(rng, held_out=True)) for _ in range(100))


def test_conversations_alternate_and_end_with_the_assistant(training: list[Document]) -> None:
    for document in training:
        if isinstance(document, Chat):
            spoken = [message for message in document.messages if message.role != "system"]
            roles = ["user" if message.role == "tool" else message.role for message in spoken]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(bool(message.content.strip()) != bool(message.calls) for message in spoken)
            for message, following in pairwise(spoken):
                assert bool(message.calls) == (following.role == "tool")


def test_calls_are_of_offered_tools_with_their_parameters(training: list[Document]) -> None:
    for document in training:
        if isinstance(document, Chat):
            offered = {tool["name"]: tool["parameters"]["properties"] for tool in document.tools}
            assert len(offered) == len(document.tools)
            for call in (call for message in document.messages for call in message.calls):
                assert list(call.arguments) == list(offered[call.name]), call
            assert not set(offered) & set(tool_table.HELD_OUT_EXPRESSION_NAMES)
            parameters = {name for properties in offered.values() for name in properties}
            assert not parameters & set(tool_table.HELD_OUT_EXPRESSION_PARAMETERS)


def test_large_sums_are_worked_out_and_on_the_requested_side_of_the_split() -> None:
    for held_out in (False, True):
        rng = Random(0)
        for _ in range(1000):
            item = calculator.large_sum(rng, held_out=held_out)
            pairs = zip(item.numbers, item.operators, item.numbers[1:], strict=False)
            sides = {calculator.pair_is_held_out(*pair) for pair in pairs}
            assert sides == {held_out}, item
            assert all(number in item.question for number in item.numbers), item
            exact = eval(re.sub(r"([\d.]+)", r"Fraction('\1')", item.expression))
            assert abs(Fraction(item.result) - exact) <= Fraction(1, 20_000), item


def test_short_patterns_are_continued_where_they_were_cut() -> None:
    rng = Random(0)
    sizes = set()
    for _ in range(300):
        messages = copying.short_pattern_chat(rng, 512).messages
        for asked, said in zip(messages[::2], messages[1::2], strict=True):
            answer = said.content.split()
            size = len(set(answer))
            question = asked.content.removesuffix("what comes next?").removesuffix(" ...")
            items = question.rstrip(" .").split()[-2 * size :] + answer
            assert items[size:] == items[:-size], asked
            sizes.add(size)
    assert sizes == {2, 3, 4}


def test_jokes_and_dinosaurs_are_distinct() -> None:
    assert len(set(JOKES)) == len(JOKES)
    assert len({d.name for d in DINOSAURS}) == len(DINOSAURS)
