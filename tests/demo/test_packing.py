"""Blocks hold whole documents, and their loss counts only what is to be learned."""

from __future__ import annotations

from itertools import islice

import pytest
from transformers import AutoTokenizer

from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus import WORKED_SUMS
from tokasaurus.demo.corpus.document import Call, Chat, Message, Text
from tokasaurus.demo.packing import PROMPT_WEIGHT, Packer
from tokasaurus.demo.tokenizer import render


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(AutoTokenizer.from_pretrained(MODEL_DIR), 256, WORKED_SUMS)


def test_blocks_are_full_and_start_with_a_document(packer: Packer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    batches = list(islice(packer.batches(seed=3, size=4), 10))
    for ids, weights in batches:
        assert ids.shape == weights.shape == (4, 256)
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert (weights[ids == tokenizer.pad_token_id] == 0).all()
    padding = sum(int((ids == tokenizer.pad_token_id).sum()) for ids, _ in batches)
    assert padding < 0.02 * 10 * 4 * 256


def test_the_same_seed_gives_the_same_blocks(packer: Packer) -> None:
    one, same, other = (next(packer.batches(seed, 2))[0] for seed in (5, 5, 6))
    assert (one == same).all()
    assert (one != other).any()


def test_only_words_of_the_assistant_count_in_full(packer: Packer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    chat = Chat((Message("user", "one two"), Message("assistant", "three"), Message("user", "ten")))
    ids = tokenizer(render(chat), add_special_tokens=False)["input_ids"]
    counted = dict(zip(tokenizer.convert_ids_to_tokens(ids), packer.weigh(chat, ids), strict=False))
    assert counted["three"] == 1.0
    assert counted["one"] == counted["Ġtwo"] == counted["ten"] == PROMPT_WEIGHT
    assert counted["<|user|>"] == counted["<|assistant|>"] == counted["<|begin_of_text|>"] == 0.0
    weights = packer.weigh(chat, ids)
    ends = [w for i, w in zip(ids, weights, strict=True) if i == tokenizer.eos_token_id]
    assert ends == [0.0, 1.0, 0.0]  # the assistant decides when its own turn ends


def test_calls_count_in_full_and_what_tools_say_as_prompts(packer: Packer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    call = Message("assistant", "", (Call("red", {}),))
    chat = Chat(
        (Message("user", "one"), call, Message("tool", "ten")), ({"name": "f", "parameters": {}},)
    )
    ids = tokenizer(render(chat), add_special_tokens=False)["input_ids"]
    counted = dict(zip(tokenizer.convert_ids_to_tokens(ids), packer.weigh(chat, ids), strict=False))
    assert counted["red"] == 1.0
    assert counted["ten"] == counted["par"] == PROMPT_WEIGHT


def test_plain_text_counts_from_its_first_word(packer: Packer) -> None:
    text = Text("one two three")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = tokenizer(render(text), add_special_tokens=False)["input_ids"]
    assert packer.weigh(text, ids) == [0.0] + [1.0] * (len(ids) - 1)
