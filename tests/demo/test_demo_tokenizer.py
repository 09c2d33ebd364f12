"""The tokenizer loses nothing, adds one BOS, and splits a word alike with and without a space."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus import documents
from tokasaurus.demo.corpus.document import Chat
from tokasaurus.demo.corpus.words import invent_word
from tokasaurus.demo.tokenizer import MAX_LENGTH, VOCAB_SIZE, render


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_any_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(0)
    texts = [
        "",
        " ",
        "  two  spaces ",
        "\n\n\t",
        "naïve café",
        "日本語 🦖🦕",
        "a\u0301\u200d\x00\ufffd",
    ]
    for _ in range(300):
        points = [
            rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x11_0000)))
            for _ in range(20)
        ]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_plain_text_gets_bos_exactly_once(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("A B C")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_chat_template_writes_what_training_used(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [d for d in islice(documents(seed=2), 300) if isinstance(d, Chat)]
    assert any(message.role == "system" for chat in chats for message in chat.messages)
    for chat in chats:
        messages = [{"role": m.role, "content": m.content} for m in chat.messages]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == render(chat)


def test_a_chat_prompt_has_bos_once_and_ends_where_the_reply_begins(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["<|begin_of_text|>", "<|user|>", "Hi", "<|end|>", "<|assistant|>"]


def test_an_unknown_role_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="Unknown role: wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "Hi"}], tokenize=False)


def test_a_space_before_a_word_changes_its_first_piece_only(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rng = Random(1)
    for word in [invent_word(rng, held_out=True) for _ in range(200)]:
        bare, spaced = tokenizer.tokenize(word), tokenizer.tokenize(" " + word)
        assert spaced in (["Ġ", *bare], ["Ġ" + bare[0], *bare[1:]])


def test_sizes_agree_with_the_configuration(tokenizer: PreTrainedTokenizerFast) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == VOCAB_SIZE
    assert tokenizer.model_max_length == config["max_position_embeddings"] == MAX_LENGTH
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"] == generation["bos_token_id"]
