"""The shipped weights: small enough, and they mean what they say.

Greedy replies by transformers in single precision, so that a failure here is the model's own.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus.chat_table import JOKES
from tokasaurus.demo.corpus.document import Message
from tokasaurus.demo.evaluate import Generator, answers, problems

MAX_PACKAGE_BYTES = 10_000_000


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(MODEL_DIR)


def reply(generator: Generator, *contents: str) -> str:
    """The answer to a conversation that the user begins and ends."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], content) for i, content in enumerate(contents))
    return generator.complete([generator.encode(messages)], max_tokens=64)[0]


def completion(generator: Generator, text: str, max_tokens: int) -> str:
    return generator.complete([generator.encode(text)], max_tokens)[0]


def test_the_package_is_small() -> None:
    files = [path for path in Path(MODEL_DIR).iterdir() if path.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in files
    }
    assert sum(file.stat().st_size for file in files) <= MAX_PACKAGE_BYTES


def test_it_is_stored_in_half_precision_with_tied_embeddings() -> None:
    from safetensors.torch import load_file

    tensors = load_file(MODEL_DIR / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_it_tells_a_joke(generator: Generator) -> None:
    assert reply(generator, "tell me a joke") in JOKES


@pytest.mark.parametrize("word", ["zorvak", "Kettle", "blumfip"])
def test_it_says_a_word_back(generator: Generator, word: str) -> None:
    assert reply(generator, f"reply with the word {word}") == word


def test_it_goes_on_with_a_pattern(generator: Generator) -> None:
    assert completion(generator, "A B C D A B C D A B C D", 12).startswith(" A B C D A B C D")
    assert reply(generator, "Continue the pattern: A B C A B C A B C").startswith("A B C A B C")


def test_it_answers_from_a_passage(generator: Generator) -> None:
    passage = "Bolto is a village. The mayor of Bolto is Marn. Every house in Bolto is purple."
    assert "Marn" in reply(generator, f"{passage}\n\nWho is the mayor of Bolto?")
    assert "purple" in reply(generator, f"{passage}\n\nWhat colour are the houses of Bolto?")


def test_it_knows_dinosaurs(generator: Generator) -> None:
    assert "plants" in reply(generator, "What did Triceratops eat?")
    assert "Cretaceous" in reply(generator, "When did Tyrannosaurus live?")
    assert "Mongolia" in reply(generator, "Where was Velociraptor found?")


def test_it_remembers_a_name(generator: Generator) -> None:
    assert "Mellit" in reply(
        generator, "My name is Mellit.", "Hello Mellit! Nice to meet you.", "What is my name?"
    )


def test_it_knows_who_it_is(generator: Generator) -> None:
    assert "Toka" in reply(generator, "Who are you?")


def test_it_writes_sums_down_and_gets_some_right(generator: Generator) -> None:
    # Guessing a number up to 40 would be right about 1 time in 40 (scores: docs/demo_model.md).
    chosen = problems(Random(1))
    replies = generator.complete(
        [generator.encode((Message("user", p.question),)) for p in chosen], 64
    )
    assert sum("\nAnswer: " in reply for reply in replies) > 0.95 * len(replies)
    rights = [answers(p.answer)(reply) for p, reply in zip(chosen, replies, strict=True)]
    assert 0.12 * len(rights) < sum(rights) < 0.9 * len(rights)


def test_it_ends_its_turn(generator: Generator) -> None:
    ids = torch.tensor([generator.encode((Message("user", "Hello"),))])
    output = generator.model.generate(ids, max_new_tokens=64, do_sample=False, temperature=None)
    assert output[0, -1] == generator.tokenizer.eos_token_id
