"""The shipped weights: they are small, and the model can do what it is documented to do.

Replies are greedy, by transformers in single precision, so that a failure here is the model's own.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus.chat_table import JOKES
from tokasaurus.demo.corpus.document import Message, exchange
from tokasaurus.demo.evaluate import BATCH, Case, Generator, answers, ask, problems

MAX_PACKAGE_BYTES = 10_000_000


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(MODEL_DIR)


def test_the_package_is_small() -> None:
    files = [path for path in Path(MODEL_DIR).iterdir() if path.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in files
    }
    assert sum(file.stat().st_size for file in files) <= MAX_PACKAGE_BYTES


def test_weights_are_in_half_precision_with_tied_embeddings() -> None:
    from safetensors.torch import load_file

    tensors = load_file(MODEL_DIR / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors
    assert all(torch.isfinite(t).all() for t in tensors.values())


PASSAGE = "Bolto is a village. The mayor of Bolto is Marn. Every house in Bolto is purple."
INTRODUCTION = exchange("My name is Mellit.", "Hello Mellit! Nice to meet you.")
CASES = (
    ask("tell me a joke", lambda reply: reply in JOKES),
    ask("reply with the word zorvak", lambda reply: reply == "zorvak"),
    ask("reply with the word Kettle", lambda reply: reply == "Kettle"),
    ask("reply with the word blumfip", lambda reply: reply == "blumfip"),
    Case("A B C D A B C D A B C D", lambda text: text.startswith(" A B C D A B C D")),
    ask("Continue the pattern: A B C A B C A B C", lambda reply: reply.startswith("A B C A B C")),
    ask(f"{PASSAGE}\n\nWho is the mayor of Bolto?", lambda reply: "Marn" in reply),
    ask(f"{PASSAGE}\n\nWhat colour are the houses of Bolto?", lambda reply: "purple" in reply),
    ask("What did Triceratops eat?", lambda reply: "plants" in reply),
    ask("When did Tyrannosaurus live?", lambda reply: "Cretaceous" in reply),
    ask("Where was Velociraptor found?", lambda reply: "Mongolia" in reply),
    ask("Who are you?", lambda reply: "Toka" in reply),
    Case((*INTRODUCTION, Message("user", "What is my name?")), lambda reply: "Mellit" in reply),
)


def test_the_model_talks_copies_reads_and_knows_dinosaurs(generator: Generator) -> None:
    replies = generator.complete([generator.encode(case.prompt) for case in CASES], 64)
    answered = zip(CASES, replies, strict=True)
    assert [(case.prompt, reply) for case, reply in answered if not case.is_right(reply)] == []


def test_the_model_writes_sums_down_and_gets_some_right(generator: Generator) -> None:
    # Guessing a number up to 40 would be right about 1 time in 40 (scores: docs/demo_model.md).
    chosen = problems(Random(1))[:BATCH]
    replies = generator.complete(
        [generator.encode((Message("user", p.question),)) for p in chosen], 64
    )
    assert sum("\nAnswer: " in reply for reply in replies) > 0.95 * len(replies)
    rights = [answers(p.answer)(reply) for p, reply in zip(chosen, replies, strict=True)]
    assert 0.12 * len(rights) < sum(rights) < 0.9 * len(rights)


def test_the_model_ends_its_turn(generator: Generator) -> None:
    ids = torch.tensor([generator.encode((Message("user", "Hello"),))])
    output = generator.model.generate(ids, max_new_tokens=64, do_sample=False, temperature=None)
    assert output[0, -1] == generator.tokenizer.eos_token_id
