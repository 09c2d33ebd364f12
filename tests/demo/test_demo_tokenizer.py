"""The tokenizer loses nothing, adds one BOS, and splits a word alike with and without a space."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokasaurus.demo import MODEL_DIR
from tokasaurus.demo.corpus import CALCULATOR, documents
from tokasaurus.demo.corpus.document import Chat
from tokasaurus.demo.corpus.words import invent_word
from tokasaurus.demo.tokenizer import (
    CHAT_TEMPLATE,
    MAX_LENGTH,
    VOCAB_SIZE,
    for_template,
    render,
    tools_for_template,
)


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


def test_the_shipped_chat_template_is_that_of_the_recipe(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_chat_template_writes_what_training_used(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = islice(documents(seed=2, mixture=CALCULATOR), 300)
    chats = [document for document in stream if isinstance(document, Chat)]
    for with_tools in (False, True):
        some = [chat for chat in chats if bool(chat.tools) == with_tools]
        assert any(message.role == "system" for chat in some for message in chat.messages)
    assert any(message.calls for chat in chats for message in chat.messages)
    for chat in chats:
        messages, tools = for_template(chat.messages), tools_for_template(chat.tools)
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        assert text == render(chat)


USER = {"role": "user", "content": "Hi"}
CALLS = [
    {"type": "function", "function": {"name": "f", "arguments": {"é": 1}}},
    {"type": "function", "function": {"name": "g", "arguments": "not JSON"}},
]
SAID = {"role": "tool", "content": " one ", "tool_call_id": "call_1"}


def test_the_chat_template_joins_calls_and_what_tools_say(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    calls = (
        '<tool_call>\n{"name": "f", "arguments": {"é": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": not JSON}\n</tool_call><|end|>'
    )
    said = "<tool_response>\none\n</tool_response>"
    for content, before in ((None, ""), ("Wait.", "Wait.\n")):
        caller = {"role": "assistant", "content": content, "tool_calls": CALLS}
        text = tokenizer.apply_chat_template([USER, caller, SAID, SAID, USER], tokenize=False)
        assert text == (
            f"<|begin_of_text|><|user|>Hi<|end|><|assistant|>{before}{calls}"
            f"<|user|>{said}\n{said}<|end|><|user|>Hi<|end|>"
        )


def test_the_chat_template_writes_tools_in_any_order_of_fields(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    schema = {"type": "object", "properties": {}}
    tools = [
        {"type": "function", "function": {"parameters": schema, "name": "f", "description": "x"}},
        {"type": "function", "function": {"parameters": schema, "name": "g"}},
    ]
    written = (
        '<tools>\n{"name": "f", "description": "x", "parameters": {"type": "object",'
        ' "properties": {}}}\n'
        '{"name": "g", "parameters": {"type": "object", "properties": {}}}\n</tools><|end|>'
    )
    system = {"role": "system", "content": "Be kind. "}
    for messages, opening in (([USER], ""), ([system, USER], "Be kind.\n\n")):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert text == f"<|begin_of_text|><|system|>{opening}{written}<|user|>Hi<|end|>"


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
